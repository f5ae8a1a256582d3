"""JSON lines (.jsonl): each non-blank line is one row, an object. A bad line is lost alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from hrm_ray.data.rows import ROW_BYTES, BadRow, Cursor, Row, TextColumns, kind_name, not_utf8
from hrm_ray.errors import DataError, Fault

_BOM = b"\xef\xbb\xbf"
_SKIPPED_AT_ONCE = 1 << 20


def jsonl_rows(stream: BinaryIO, cursor: Cursor) -> Iterator[Row]:
    """The rows of a stream of JSON lines; marks are the bytes where lines begin."""
    offset = number = 0
    if cursor.mark is not None:
        stream.seek(cursor.mark)
        cursor.row, offset = cursor.start, cursor.mark
    while line := stream.readline(ROW_BYTES + 1):
        begins, number = offset, number + 1
        offset += len(line)
        if len(line) > ROW_BYTES:
            offset += _rest_of_line(stream, line)
        elif is_blank(line):
            continue
        row = cursor.next_row()
        if row >= cursor.start:
            # Which line it is can be known only where all before it were read.
            where = f"{cursor.where}:{number}" if cursor.mark is None else f"{cursor.where}, row {row + 1}"
            yield _row(line, where, begins, cursor.columns, row, offset if cursor.marked else None)


def _row(line: bytes, where: str, begins: int, columns: TextColumns, row: int, mark: int | None) -> Row:
    if len(line) > ROW_BYTES:
        return BadRow(too_long(where), where, row, mark)
    try:
        values = parse_line(line, where, begins)
    except DataError as error:
        return BadRow(error.faults[0], where, row, mark)
    return columns.document(values or {}, where, row, mark)


def too_long(where: str) -> Fault:
    """The fault of a row that is longer than may be held in memory."""
    return Fault(where, f"this row is longer than {ROW_BYTES >> 20} MiB", "Divide it into several documents")


def _rest_of_line(stream: BinaryIO, line: bytes) -> int:
    """Skips to the end of a line; returns the number of bytes skipped."""
    length = 0
    while line and not line.endswith(b"\n"):
        line = stream.readline(_SKIPPED_AT_ONCE)
        length += len(line)
    return length


def is_blank(line: bytes) -> bool:
    """Whether a line is only white space, which is not a row."""
    return line.isspace() or (line.startswith(_BOM) and not line[len(_BOM) :].strip())


def parse_line(line: bytes, where: str, offset: int) -> dict[str, object] | None:
    """The object on one line, None for a blank line. `where` is file:line, `offset` the line's first byte in the file,
    both for the DataError that is raised for anything else."""
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(where, error, offset + error.start)) from error
    if is_blank(line):
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(Fault(where, f"this line is not JSON ({error})", "Put one JSON object on each line")) from error
    if not isinstance(row, dict):
        reason = f"this row is {kind_name(row)}, not an object"
        raise DataError(Fault(where, reason, "Put one JSON object on each line"))
    return row
