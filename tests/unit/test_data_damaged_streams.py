"""Streams that are damaged or cut: the rows before the damage stay, the rest is one bad row."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hrm_ray.data.chunks import read_chunks
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.formats import texts as text_files
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.readers import known_rows
from hrm_ray.data.rows import BadRow, Document
from tests.support.corpora import COMPRESSIONS, FORMATS, rows_of, write, write_tar, write_zip
from tests.support.runs import TINY, hrm, refused

LINES = [f"Zeile {number} äöü {random.Random(number).random()}" for number in range(4000)]
WHOLE = {"txt": "\n".join(LINES).encode(), "md": "\n\n".join(LINES).encode()}
WHOLE |= {form: FORMATS[form](LINES) for form in ("jsonl", "json", "csv", "tsv")}


def cut_in_the_middle(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damaged_in_the_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 64]) + content[middle + 64 :]


@pytest.mark.parametrize("damage", [cut_in_the_middle, damaged_in_the_middle])
@pytest.mark.parametrize("text_rows", ["document", "line", "paragraph"])
@pytest.mark.parametrize("form", WHOLE)
def test_a_damaged_gzip_keeps_what_is_before(tmp_path: Path, form: str, text_rows: str, damage: object) -> None:
    if text_rows != "document" and form not in ("txt", "md"):
        return
    assert callable(damage)
    path = write(tmp_path / f"a.{form}.gz", damage(COMPRESSIONS["gz"](WHOLE[form])))
    *before, last = rows_of(path, text_rows=text_rows)
    assert isinstance(last, BadRow) and last.ends_part
    texts = [row.text for row in before if isinstance(row, Document)]
    good = len(LINES) * 2 // 5
    if form in ("txt", "md") and text_rows == "document":
        assert WHOLE[form].decode().startswith("".join(texts)[: good * 20])
        assert [row.row for row in before] == [0] and last.row == 0
        (part,) = list_parts(TextSource(str(path))).parts
        assert known_rows(part, TextSource(str(path))) in (1, None)
    elif not (form == "txt" and text_rows == "paragraph"):
        assert texts[:good] == LINES[:good]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("piece_bytes", [5000, 1 << 20])
def test_every_compression_keeps_the_beginning_of_a_text(
    tmp_path: Path, compression: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "PIECE_BYTES", piece_bytes)
    # A block of bzip2, 900 kB of text, is lost as a whole.
    lines = range(60_000 if compression == "bz2" else 15_000)
    content = "".join(f"Zeile {number} äöü {random.Random(number).random()}\n" for number in lines).encode()
    path = write(tmp_path / f"a.txt.{compression}", cut_in_the_middle(COMPRESSIONS[compression](content)))
    (*before, last), text = rows_of(path), content.decode()
    joined = "".join(row.text for row in before if isinstance(row, Document))
    assert isinstance(last, BadRow) and text.startswith(joined)
    assert len(joined) > len(text) // 10


@pytest.mark.parametrize("form", ["txt", "jsonl"])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_a_cut_member_keeps_its_beginning(tmp_path: Path, form: str, suffix: str) -> None:
    members = {f"a.{form}": WHOLE[form], f"b.{form}": WHOLE[form]}
    if suffix == "zip":
        path = write_zip(tmp_path / "a.zip", members)
        content = path.read_bytes()
        begin = len(content) // 2
        path.write_bytes(content[: begin + 9000] + bytes(64) + content[begin + 9064 :])
    else:
        path = write_tar(tmp_path / f"a.{suffix}", members)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    rows = rows_of(path)
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert rows[-1] == bad[-1] and bad[-1].ends_part == (suffix != "zip")
    texts = [row.text for row in rows if isinstance(row, Document)]
    if form == "jsonl":
        sound = len(rows) - len(bad) if suffix != "zip" else len(LINES) + 500
        assert len(LINES) + 400 < len(texts) < 2 * len(LINES) and texts[:sound] == (LINES * 2)[:sound]
    elif suffix != "zip":
        # A short text in a zip is one piece, whose checksum comes first.
        assert len(texts) == 2 and WHOLE["txt"].decode().startswith(texts[1]) and len(texts[1]) > 1000


def test_a_run_on_a_damaged_text_names_the_way_out_and_takes_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", cut_in_the_middle(COMPRESSIONS["gz"](WHOLE["txt"])))
    words = ("train", "--dataset-file", path, *TINY, "--vocab-size", "300", "--dry-run")
    refused(5, *words, naming=("a.txt.gz", "cannot be read", "--on-bad-row skip"))
    ran = hrm(*words, "--on-bad-row", "skip")
    assert ran.code == 0, ran.err
    corpus = Corpus(TextSource(str(path)), list_parts(TextSource(str(path))).parts, 100, 100, on_bad_row="skip")
    (chunk,) = read_chunks(corpus)
    assert chunk.entry.rows == chunk.entry.bad == 1 and len(chunk.documents[0].text) > len(WHOLE["txt"]) // 5
    assert "The rest of this file is skipped" in chunk.notes[0]
