"""Text files (.txt, .md): a file is one row. One longer than PIECE_BYTES is several rows, cut after the ends of lines,
so that no file is held in memory whole; the rows joined are its text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from hrm_ray.data.rows import BadRow, Cursor, Document, Row, not_utf8
from hrm_ray.data.streams import Unreadable
from hrm_ray.errors import Fault

PIECE_BYTES = 1 << 20
"""Up to this length (1 MiB, a longish book) a file is one document."""

_BOM = b"\xef\xbb\xbf"


def text_rows(stream: BinaryIO, cursor: Cursor) -> Iterator[Row]:
    """The rows of a text file; marks are the bytes where they begin. Raises Unreadable where columns are wanted."""
    if cursor.columns.pairs:
        raise Unreadable(_no_columns(cursor))
    offset = 0
    if cursor.mark is not None:
        stream.seek(cursor.mark)
        cursor.row, offset = cursor.start, cursor.mark
    ahead = b""
    while True:
        # One byte more than a piece, to see whether it is the last.
        ahead += stream.read(PIECE_BYTES + 1 - len(ahead))
        cut = len(ahead) if len(ahead) <= PIECE_BYTES else _cut(ahead)
        piece, ahead = ahead[:cut], ahead[cut:]
        if not piece and (offset or cursor.mark is not None):
            return
        row = cursor.next_row()
        if row >= cursor.start:
            yield text_row(piece, cursor, row, offset, offset + len(piece) if cursor.marked else None)
        offset += len(piece)
        if not ahead:
            return


def _cut(ahead: bytes) -> int:
    """Where a piece ends: after the last end of a line, else between two characters."""
    line = ahead.rfind(b"\n", 0, PIECE_BYTES) + 1
    if line:
        return line
    for cut in range(PIECE_BYTES, PIECE_BYTES - 4, -1):
        if ahead[cut] & 0xC0 != 0x80:
            return cut
    return PIECE_BYTES


def text_row(piece: bytes, cursor: Cursor, row: int, offset: int = 0, mark: int | None = None) -> Row:
    """One row out of the bytes `piece` of a text file, which stand at `offset` in it."""
    where = cursor.where if offset == 0 else f"{cursor.where}, byte {offset}"
    if cursor.columns.pairs:
        return BadRow(_no_columns(cursor), where, row, mark)
    bom = len(_BOM) if offset == 0 and piece.startswith(_BOM) else 0
    try:
        text = (piece[bom:] if bom else piece).decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow(not_utf8(where, error, offset + bom + error.start), where, row, mark)
    return Document(text, where, row, mark)


def _no_columns(cursor: Cursor) -> Fault:
    reason = f"a text file has no column `{cursor.columns.names[0]}`"
    return Fault(cursor.where, reason, "Give files with columns for prompts and responses, such as .jsonl")
