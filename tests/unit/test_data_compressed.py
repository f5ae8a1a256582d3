"""Compressed files: damage in the middle, bombs, files that change or vanish, and flat memory."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from pathlib import Path

import pytest

from hrm_ray.data import streams
from hrm_ray.data.formats import texts
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.readers import read_part
from hrm_ray.data.rows import BadRow
from hrm_ray.errors import ResourceError
from tests.support.corpora import COMPRESSIONS, FORMATS, faults_of, rows_of, shown, texts_of, write


def varied(count: int) -> list[str]:
    """Texts that do not compress well."""
    return [f"{number} {(number * 2654435761) % 2**64:x} {number**7:x}" for number in range(count)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_rows_before_the_damage_come_and_then_the_fault(tmp_path: Path, compression: str) -> None:
    # The blocks of bz2, of 900 kB, come whole or not at all.
    texts = varied(40_000 if compression == "bz2" else 20_000)
    content = bytearray(COMPRESSIONS[compression](FORMATS["csv"](texts)))
    damaged = len(content) * 9 // 10
    # All the rest: zstd without a checksum does not notice a little damage.
    content[damaged:] = b"\xff" * (len(content) - damaged)
    path = write(tmp_path / f"a.csv.{compression}", bytes(content))
    rows = rows_of(path)
    last = rows[-1]
    assert isinstance(last, BadRow) and last.ends_part and last.row == len(rows) - 1
    # A decompressor may make something of the first damaged bytes.
    good = sum(1 for row, text in zip(shown(rows), texts, strict=False) if row == text)
    assert good >= 10_000 and shown(rows)[:good] == texts[:good]
    assert path.name in str(last.fault) and "copy it again" in str(last.fault)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_file_cut_short_gives_what_it_has_and_the_fault(tmp_path: Path, compression: str) -> None:
    texts = varied(2000)
    content = COMPRESSIONS[compression](FORMATS["jsonl"](texts))
    path = write(tmp_path / f"a.jsonl.{compression}", content[:-10])
    assert texts_of(path)[-1] == "<end>"
    other = write(tmp_path / f"b.jsonl.{compression}", b"this was never compressed at all")
    assert texts_of(other) == ["<end>"]


def test_a_wrong_checksum_is_told_after_all_rows(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(FORMATS["jsonl"](varied(10))))
    content[-6] ^= 1
    path = write(tmp_path / "a.jsonl.gz", bytes(content))
    assert texts_of(path) == [*varied(10), "<end>"]


def test_several_compressed_files_in_one_are_one(tmp_path: Path) -> None:
    for compression, compress in COMPRESSIONS.items():
        content = b"".join(compress(FORMATS["jsonl"]([text])) for text in ("a", "b"))
        assert texts_of(write(tmp_path / f"a.jsonl.{compression}", content)) == ["a", "b"], compression


def test_a_bomb_is_refused_and_text_that_packs_well_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = b'{"text": "' + b"x" * 1000 + b'"}\n'
    repeated = write(tmp_path / "a.jsonl.gz", gzip.compress(row * 2000))
    assert shown(rows_of(repeated)).count("x" * 1000) == 2000
    monkeypatch.setattr(streams, "EXPANSION_FROM_BYTES", 1 << 20)
    monkeypatch.setattr(streams, "EXPANSION", 100)
    rows = rows_of(repeated)
    assert shown(rows)[-1] == "<end>" and 500 < len(rows) < 2000
    assert "more than 100 times as much (possibly a bomb)" in faults_of(repeated)[0]
    monkeypatch.setattr(streams, "EXPANSION", 500)
    monkeypatch.setattr(streams, "TOTAL_BYTES", 1 << 20)
    assert "expands to more than" in faults_of(repeated)[0]


def test_a_compressed_table_is_copied_and_the_copy_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = varied(300)
    path = write(tmp_path / "a.parquet.gz", gzip.compress(FORMATS["parquet"](texts)))
    monkeypatch.setattr(streams, "SPOOL_MEMORY_BYTES", 1000)
    assert texts_of(path) == texts
    monkeypatch.setattr(streams, "SPOOL_BYTES", 2000)
    assert texts_of(path) == ["<end>"] and "longer than" in faults_of(path)[0]


def test_no_room_for_the_copy_is_not_the_data_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    path = write(tmp_path / "a.parquet.gz", gzip.compress(FORMATS["parquet"](varied(300))))
    monkeypatch.setattr(streams, "SPOOL_MEMORY_BYTES", 1000)
    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    with pytest.raises(ResourceError, match="no space"):
        rows_of(path)


def test_a_file_that_vanishes_or_changes_is_told(tmp_path: Path) -> None:
    source = TextSource(str(write(tmp_path / "a.jsonl", FORMATS["jsonl"](["a", "b"]))))
    (part,) = list_parts(source).parts
    write(tmp_path / "a.jsonl", FORMATS["jsonl"](["a", "b", "c"]))
    (row,) = read_part(part, source)
    assert isinstance(row, BadRow) and row.ends_part and "had" in str(row.fault) and "a.jsonl" in str(row.fault)
    (tmp_path / "a.jsonl").unlink()
    (row,) = read_part(part, source, start_row=1)
    assert isinstance(row, BadRow) and row.row == 1 and "is gone" in str(row.fault)


def test_a_file_that_is_cut_while_it_is_read_is_told(tmp_path: Path) -> None:
    texts = varied(40_000)
    source = TextSource(str(write(tmp_path / "a.jsonl", FORMATS["jsonl"](texts))))
    (part,) = list_parts(source).parts
    rows = read_part(part, source)
    got = [next(rows)]
    os.truncate(part.address, part.bytes // 2)
    got += rows
    assert shown(got)[-1] == "<end>" and len(got) < len(texts)
    assert "while it was read" in str(got[-1].fault)  # type: ignore[union-attr]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="no file is unreadable for this user")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a")
    path.chmod(0)
    assert "no permission" in faults_of(path)[0]


def test_reading_is_not_permitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "a")

    def refuse(*words: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    rows = rows_of(path)
    monkeypatch.undo()
    assert shown(rows) == ["<end>"] and "no permission" in str(rows[0].fault)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv.zst", "a.txt", "a.parquet.bz2", "a.arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SPOOL_MEMORY_BYTES", 1 << 16)
    monkeypatch.setattr(texts, "PIECE_BYTES", 1 << 16)
    _, form, *compression = name.split(".")

    def peak(rows: int) -> int:
        text = "".join(f"{number} line\n" for number in range(2500))
        content = (text * rows).encode() if form == "txt" else FORMATS[form]([text] * rows)
        path = write(tmp_path / name, COMPRESSIONS[compression[0]](content) if compression else content)
        del content
        tracemalloc.start()
        count = sum(1 for _ in rows_of_lazily(path))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count >= min(rows, 4)
        return most

    small, large = peak(20), peak(120)
    assert large < small + (1 << 20), (small, large)


def rows_of_lazily(path: Path) -> object:
    source = TextSource(str(path))
    for part in list_parts(source).parts:
        yield from read_part(part, source)
