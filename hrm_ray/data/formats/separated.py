"""Tables as text: .csv and .tsv, with the columns' names in the first row (quotes as in RFC 4180; tabs for .tsv). Where
the columns are not found with the suffix's own delimiter, but with another one, that is taken.

A bad record is lost alone."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

from hrm_ray.data.formats.lines import too_long
from hrm_ray.data.rows import ROW_BYTES, BadRow, Cursor, Row, not_utf8
from hrm_ray.data.streams import Unreadable
from hrm_ray.errors import Fault

_DELIMITERS = (",", "\t", ";", "|")
"""What is tried, in this order, where the columns are not found with the suffix's own."""
_NAMES = {"\t": "tabs", " ": "spaces"}
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
    own = cursor.delimiter or delimiter
    header, delimiter = _header(lines, cursor, own)
    if not header:
        return
    if delimiter != own:
        cursor.remark = f"separated by {_shown(delimiter)}"
    records = csv.reader(lines, delimiter=delimiter, strict=True)
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
            wrong = Fault(where, f"not a record separated by {_shown(delimiter)} ({error})", _QUOTES)
        row = cursor.next_row()
        if row >= cursor.start:
            mark = lines.offset if cursor.marked else None
            wrong = _undecodable(lines, where) or wrong or _uneven(record, header, where)
            if wrong is not None:
                yield BadRow(wrong, where, row, mark)
            else:
                yield cursor.columns.picked([record[index] for index in wanted], where, row, mark)


def _header(lines: _Lines, cursor: Cursor, own: str) -> tuple[list[str], str]:
    """The names of the columns, and the delimiter between them; no names where the stream is empty. Raises
    Unreadable."""
    where = f"{cursor.where}:1"
    taken: list[str] = []

    def first_lines() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    header, wrong = _first_record(first_lines(), own)
    if lines.too_long:
        raise Unreadable(too_long(where))
    undecodable = _undecodable(lines, where)
    if undecodable is not None:
        raise Unreadable(undecodable)
    wanted = cursor.columns.names
    delimiter, best = own, header
    for other in () if cursor.delimiter is not None else _DELIMITERS:
        if _is_found(best, wanted):
            break
        names = _first_record(iter(taken), other)[0]
        if _is_found(names, wanted) or len(names) > max(1, len(best)):
            delimiter, best = other, names
    if wrong is not None and not best:
        reason = f"the names of the columns cannot be read ({wrong})"
        raise Unreadable(Fault(where, reason, _QUOTES), not_text=True)
    absent = cursor.columns.absent(best, cursor.where, "file") if best else None
    if absent is not None:
        if len(best) == 1 or delimiter != own:
            reason = f"{absent.reason} (separated by {_shown(delimiter)})"
            absent = replace(absent, reason=reason, hint=f"{absent.hint}, or the delimiter with --delimiter")
        raise Unreadable(absent, not_text=not any(best.count(name) > 1 for name in wanted))
    return best, delimiter


def _is_found(names: list[str], wanted: Sequence[str]) -> bool:
    """Whether these are the names of the columns; where none is wanted, several look like it."""
    return set(wanted) <= set(names) and (bool(wanted) or len(names) > 1)


def _first_record(lines: Iterator[str], delimiter: str) -> tuple[list[str], csv.Error | None]:
    """The first record that is not blank, and what is wrong with it."""
    try:
        return next((record for record in csv.reader(lines, delimiter=delimiter, strict=True) if record), []), None
    except csv.Error as error:
        return [], error


def _shown(delimiter: str) -> str:
    return _NAMES.get(delimiter) or f"`{delimiter}`"


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
