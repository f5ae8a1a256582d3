"""Reading from any row on: with the mark of the row before, or by passing rows over, it is the tail of the whole."""

from __future__ import annotations

import string
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.formats import columnar, lines
from hrm_ray.data.formats import texts as text_files
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.readers import known_rows, read_part
from hrm_ray.data.rows import Row, TextRows
from tests.support.corpora import COMPRESSIONS, FORMATS, parquet_bytes, write, write_tar, write_zip

LETTERS = st.text(string.ascii_letters + ' ,"\n\t\ré🙂', max_size=12)
TEXTS = st.lists(LETTERS, max_size=14)
BAD_LINES = st.sampled_from([b"", b"nope", b'{"text": 1}', b'{"b": "x"}', b"\xff", b"   ", b'{"text": "y"}', b"x" * 90])


@st.composite
def corpora(draw: st.DrawFn) -> tuple[str, bytes | dict[str, bytes]]:
    """A file's name with its bytes, or an archive's with its members."""
    if draw(st.booleans()):
        return draw(files())
    members = {
        f"{number}/{name}": content for number, (name, content) in enumerate(draw(st.lists(files(), max_size=4)))
    }
    return draw(st.sampled_from(["a.zip", "a.tar", "a.tar.gz"])), members or {"a.txt": b""}


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    form = draw(st.sampled_from([*FORMATS, "txt", "bad.jsonl", "bad.csv", "groups.parquet"]))
    if form == "txt":
        content = "".join(draw(TEXTS)).encode()
    elif form.startswith("bad"):
        content = draw(st.sampled_from([b"", b"text\n"])) + b"\n".join(draw(st.lists(BAD_LINES, max_size=10)))
    elif form == "groups.parquet":
        content = parquet_bytes(draw(TEXTS), draw(st.integers(1, 5)))
    else:
        content = FORMATS[form](draw(TEXTS))
    compression = draw(st.sampled_from(["", "", *COMPRESSIONS]))
    if not compression:
        return f"a.{form}", content
    content = COMPRESSIONS[compression](content)
    # Now and then cut short.
    return f"a.{form}.{compression}", content[: draw(st.sampled_from([len(content)] * 4 + [len(content) // 2]))]


def without_where(rows: list[Row]) -> list[Row]:
    """After a mark nobody knows the number of the line, so that people are told the number of the row."""
    return [replace(row, where="", fault=None) if hasattr(row, "fault") else replace(row, where="") for row in rows]


def position_after(row: Row) -> tuple[int, int | None, int]:
    """Row, mark and piece at which reading goes on."""
    return (row.row, row.mark, row.piece + 1) if row.continues else (row.row + 1, row.mark, 0)


@settings(max_examples=150, deadline=None)
@given(corpora(), st.sampled_from(get_args(TextRows)), st.data())
def test_reading_from_a_row_on_is_the_tail_of_the_whole(
    corpus: tuple[str, bytes | dict[str, bytes]], text_rows: TextRows, data: st.DataObject
) -> None:
    name, content = corpus
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "PIECE_BYTES", 16)
        patch.setattr("hrm_ray.data.archives.members.PIECE_BYTES", 16)
        patch.setattr("hrm_ray.data.readers.PIECE_BYTES", 16)
        patch.setattr(lines, "ROW_BYTES", 80)
        patch.setattr(columnar, "_BATCH_ROWS", 2)
        path = Path(folder) / name
        if isinstance(content, bytes):
            write(path, content)
        else:
            (write_zip if path.suffix == ".zip" else write_tar)(path, content)
        source = TextSource(str(path), text_rows=text_rows)
        (part,) = list_parts(source).parts
        whole = list(read_part(part, source))
        at: tuple[int, int | None, int] = (0, None, 0)
        for row in whole:
            # An error that ends a part has no number of a piece.
            assert (row.row, row.piece) == (at[0], at[2]) or (row.row == at[0] and not row.piece)
            at = position_after(row)
        rows = len(whole) - sum(row.continues for row in whole)
        assert all(
            (row.mark is not None) == part.random_access for row in whole if not getattr(row, "ends_part", False)
        )
        assert known_rows(part, source) in (None, rows)
        start = data.draw(st.integers(0, len(whole)))
        row, mark, piece = position_after(whole[start - 1]) if start else (0, None, 0)
        tail = list(read_part(part, source, row, None, piece))
        ended = bool(whole) and getattr(whole[-1], "ends_part", False)
        assert tail == whole[start:] or (ended and start == len(whole) and len(tail) == 1)
        if start and part.random_access:
            marked = list(read_part(part, source, row, mark, piece))
            assert without_where(marked) == without_where(tail)


@pytest.mark.parametrize("form", [*FORMATS, "txt", "zip"])
def test_every_row_can_be_the_first(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"row {number}\n" for number in range(11)]
    if form == "zip":
        path = write_zip(tmp_path / "a.zip", {f"{number:02}.txt": text.encode() for number, text in enumerate(texts)})
    else:
        path = write(tmp_path / f"a.{form}", "".join(texts).encode() if form == "txt" else FORMATS[form](texts))
    source = TextSource(str(path), text_rows="document" if form == "zip" else "line")
    (part,) = list_parts(source).parts
    whole = list(read_part(part, source))
    if form == "txt":
        texts = [text.rstrip() for text in texts]
    assert [row.text for row in whole] == texts  # type: ignore[union-attr]
    assert part.random_access == (form != "json")
    for start in range(12):
        assert list(read_part(part, source, start)) == whole[start:]
        if start and part.random_access:
            marked = list(read_part(part, source, start, whole[start - 1].mark))
            assert without_where(marked) == without_where(whole[start:])


def test_a_mark_is_used_and_not_only_counted_to(tmp_path: Path) -> None:
    for form in ("jsonl", "csv"):
        path = write(tmp_path / f"a.{form}", FORMATS[form](["one", "two", "three", "four"]))
        source = TextSource(str(path))
        (part,) = list_parts(source).parts
        whole = list(read_part(part, source))
        content = bytearray(path.read_bytes())
        begin = content.index(b"one")
        content[begin : begin + 3] = b"\xff\xff\xff"
        path.write_bytes(bytes(content))
        marked = list(read_part(part, source, 2, whole[1].mark))
        assert [row.text for row in marked] == ["three", "four"]  # type: ignore[union-attr]
        assert marked[0].where == f"{path}, row 3"
