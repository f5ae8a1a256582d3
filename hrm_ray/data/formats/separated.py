"""Tables as text: .csv and .tsv, with the columns' names in the first row (quotes as in RFC 4180; tabs for .tsv).

A bad record is lost alone."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, BinaryIO

from hrm_ray.data.formats.lines import too_long
from hrm_ray.data.rows import ROW_BYTES, BadRow, Cursor, Row, not_utf8
from hrm_ray.data.streams import Unreadable
from hrm_ray.errors import Fault

_QUOTES = "Double the quotes inside a quoted field, and close it"


class _Lines:
    """The lines of a stream as text, with where they end and what was wrong with the last ones."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.offset = self.number = 0
        self.fault: tuple[UnicodeDecodeError, int] | None = None
        self.too_long = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(ROW_BYTES + 1)
        if not line:
            raise StopIteration
        begins, self.offset, self.number = self.offset, self.offset + len(line), self.number + 1
        if len(line) > ROW_BYTES:
            # Nothing says where the next record begins.
            self.too_long = True
            raise StopIteration
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            # Read to the record's end, so that the next one begins where it should.
            self.fault = self.fault or (error, begins + error.start)
            text = line.decode("utf-8", "replace")
        return text.removeprefix("\ufeff") if begins == 0 else text

    def seek(self, offset: int) -> None:
        """Go on at a byte of the stream."""
        self._stream.seek(offset)
        self.offset = offset


def separated_rows(stream: BinaryIO, cursor: Cursor, delimiter: str) -> Iterator[Row]:
    """The rows of a table as text; marks are the bytes where records begin. Raises Unreadable where it cannot go on."""
    # The csv module has one limit for the process, which other users may have raised further.
    csv.field_size_limit(max(csv.field_size_limit(), ROW_BYTES))
    lines = _Lines(stream)
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    header, fault = _header(records, lines, cursor)
    if fault is not None:
        raise Unreadable(fault)
    if not header:
        return
    wanted = [header.index(name) for name in cursor.columns.names]
    if cursor.mark is not None:
        lines.seek(cursor.mark)
        cursor.row = cursor.start
    while True:
        number, lines.fault = lines.number + 1, None
        where = f"{cursor.where}:{number}" if cursor.mark is None else f"{cursor.where}, row {cursor.row + 1}"
        wrong: Fault | None = None
        record: list[str] = []
        try:
            record = next(records)
            if not record:
                continue
        except StopIteration:
            if lines.too_long:
                raise Unreadable(too_long(where)) from None
            return
        except csv.Error as error:
            wrong = Fault(where, f"not a {delimiter!r}-separated record ({error})", _QUOTES)
        row = cursor.next_row()
        if row >= cursor.start:
            mark = lines.offset if cursor.marked else None
            wrong = _undecodable(lines, where) or wrong or _uneven(record, header, where)
            if wrong is not None:
                yield BadRow(wrong, where, row, mark)
            else:
                yield cursor.columns.picked([record[index] for index in wanted], where, row, mark)


def _header(records: Any, lines: _Lines, cursor: Cursor) -> tuple[list[str], Fault | None]:
    """The names of the columns, and what is wrong with them; none where the stream is empty."""
    where = f"{cursor.where}:1"
    try:
        header: list[str] = next((record for record in records if record), [])
    except csv.Error as error:
        return [], Fault(where, f"the names of the columns cannot be read ({error})", _QUOTES)
    if lines.too_long:
        return [], too_long(where)
    wrong = _undecodable(lines, where)
    if wrong is None and header:
        wrong = cursor.columns.absent(header, cursor.where, "file")
    return header, wrong


def _undecodable(lines: _Lines, where: str) -> Fault | None:
    if lines.fault is None:
        return None
    error, offset = lines.fault
    return not_utf8(where, error, offset)


def _uneven(record: list[str], header: list[str], where: str) -> Fault | None:
    if len(record) == len(header):
        return None
    reason = f"this record has {len(record)} fields, the header names {len(header)}"
    return Fault(where, reason, "Give each record all fields; quote those that hold separators")
