"""The table of formats, and what each needs from its stream: decompressed, seekable or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import BinaryIO

from hrm_ray.data.file_kinds import FileKind
from hrm_ray.data.formats.columnar import arrow_rows, has_arrow_index, parquet_rows
from hrm_ray.data.formats.lines import jsonl_rows
from hrm_ray.data.formats.recode import utf8_stream
from hrm_ray.data.formats.separated import separated_rows
from hrm_ray.data.formats.texts import text_rows
from hrm_ray.data.formats.values import json_rows
from hrm_ray.data.rows import BadRow, Cursor, Document, Row
from hrm_ray.data.streams import Unreadable, decompressed, seekable_copy

READERS: Mapping[str, Callable[[BinaryIO, Cursor], Iterator[Row]]] = {
    "txt": text_rows,
    "md": text_rows,
    "html": text_rows,
    "csv": partial(separated_rows, delimiter=","),
    "tsv": partial(separated_rows, delimiter="\t"),
    "json": json_rows,
    "jsonl": jsonl_rows,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
}


_COLUMNAR = frozenset({"parquet", "arrow"})
_OBJECTS = frozenset({"json", "jsonl"})
_ROWS_LOOKED_AT = 20
"""First rows without the columns that show that a file of objects is no text data."""


def format_rows(
    stream: BinaryIO, kind: FileKind, cursor: Cursor, *, stored_bytes: int, seekable: bool
) -> Iterator[Row]:
    """The rows of a stream of `stored_bytes` bytes, a buffered reader. Raises Unreadable where it cannot go on."""
    opened = decompressed(stream, kind.compression, cursor.where, stored_bytes)
    cursor.remark = ""
    read = READERS[kind.form]
    if kind.form not in _COLUMNAR:
        opened = utf8_stream(opened, kind, cursor)
        rows = _unless_no_text(read(opened, cursor), cursor) if kind.form in _OBJECTS else read(opened, cursor)
        yield from _remarked(rows, cursor)
    elif seekable and kind.compression is None:
        yield from read(opened, cursor)
    elif kind.form == "parquet" or has_arrow_index(opened):
        with seekable_copy(opened, cursor.where) as copy:
            yield from read(copy, cursor)
    else:
        yield from read(opened, cursor)


def _remarked(rows: Iterator[Row], cursor: Cursor) -> Iterator[Row]:
    """The rows, with the reader's remark on the first document, where reading begins with the file."""
    from_start = cursor.row >= cursor.start and cursor.mark is None
    for row in rows if from_start else ():
        if cursor.remark and isinstance(row, Document):
            yield replace(row, remark=cursor.remark)
            break
        yield row
        if not cursor.remark:
            break
    yield from rows


def _unless_no_text(rows: Iterator[Row], cursor: Cursor) -> Iterator[Row]:
    """The rows of a file. Raises Unreadable where the first ones show that the file is no text data and the cursor is
    lenient; such a file then counts as one row, wherever reading began."""
    if not cursor.lenient or cursor.mark is not None:
        yield from rows
        return
    begin, start = cursor.row, cursor.start
    # A file that was passed over before the start must be passed over again, to count its rows alike.
    cursor.start = begin
    held: list[Row] = []
    raised: Unreadable | None = None
    try:
        for row in islice(rows, _ROWS_LOOKED_AT):
            held.append(row)
            if not (isinstance(row, BadRow) and row.not_text):
                break
    except Unreadable as error:
        raised = error
    finally:
        cursor.start = start
    faults = [row.fault for row in held if isinstance(row, BadRow) and row.not_text]
    if held and len(faults) == len(held):
        cursor.row = begin
        raise Unreadable(faults[0], not_text=True)
    yield from (row for row in held if row.row >= start)
    if raised is not None:
        raise raised
    yield from rows
