"""Plain text (.txt, .md): what a row is (TextRows), cut out of a stream of any length.

A row longer than PIECE_BYTES comes in pieces, cut after the ends of lines, so that no row is held in memory whole. All
but the last piece say that the row `continues`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from hrm_ray.data.formats.lines import is_blank
from hrm_ray.data.rows import BadRow, Cursor, Document, Row, not_utf8
from hrm_ray.data.streams import Unreadable, read_to_damage
from hrm_ray.errors import Fault

PIECE_BYTES = 1 << 20
"""Up to this length (1 MiB, a longish book) a row is one piece."""

_BOM = b"\xef\xbb\xbf"


class _Piece(NamedTuple):
    """Bytes of a row that stand at `begins` in the file, where the next piece or row begins, and the number of the line
    that `begins` is in, counted from where reading began."""

    content: bytes
    begins: int
    ends: int
    line: int
    continues: bool


def text_rows(stream: BinaryIO, cursor: Cursor) -> Iterator[Row]:
    """The rows of a text file, by `cursor.text_rows`; marks are the bytes where they, or their pieces, begin. Raises
    Unreadable where columns are wanted."""
    if cursor.columns.pairs:
        raise Unreadable(_no_columns(cursor), not_text=True)
    offset = 0
    if cursor.mark is not None:
        stream.seek(cursor.mark)
        cursor.row, cursor.piece, offset = cursor.start, cursor.start_piece, cursor.mark
    # Reading that begins inside a row begins inside a line of it.
    inside = cursor.piece > 0
    if cursor.text_rows == "line":
        pieces = _lines(_line_pieces(stream, offset), inside)
    elif cursor.text_rows == "paragraph":
        pieces = _paragraphs(_line_pieces(stream, offset), inside)
    else:
        pieces = _file_pieces(stream, offset, from_start=cursor.mark is None)
    in_file = cursor.text_rows in ("document", "mebibyte")
    for piece in pieces:
        row, number = cursor.row, cursor.piece
        continues = cursor.next_piece(piece.continues and cursor.text_rows != "mebibyte")
        if (row, number) < (cursor.start, cursor.start_piece):
            continue
        content = piece.content
        if in_file:
            where = cursor.where if not piece.begins else f"{cursor.where}, byte {piece.begins}"
        else:
            where = f"{cursor.where}:{piece.line}" if cursor.mark is None else f"{cursor.where}, row {row + 1}"
            if not continues:
                content = content.removesuffix(b"\n").removesuffix(b"\r")
        bom = len(_BOM) if piece.begins == 0 and content.startswith(_BOM) else 0
        mark = piece.ends if cursor.marked else None
        try:
            text = (content[bom:] if bom else content).decode("utf-8")
        except UnicodeDecodeError as error:
            fault = not_utf8(where, error, piece.begins + bom + error.start)
            whole_file = cursor.text_rows == "document"
            yield BadRow(fault, where, row, mark, False, number, continues, whole_file=whole_file)
        else:
            yield Document(text, where, row, mark, None, None, number, continues)


def text_row(content: bytes, cursor: Cursor, row: int, mark: int | None = None) -> Row:
    """The one row of a text file of at most PIECE_BYTES bytes that is a row as a whole."""
    if cursor.columns.pairs:
        return BadRow(_no_columns(cursor), cursor.where, row, mark, passed_over=cursor.lenient, whole_file=True)
    bom = len(_BOM) if content.startswith(_BOM) else 0
    try:
        return Document(content[bom:].decode("utf-8"), cursor.where, row, mark)
    except UnicodeDecodeError as error:
        fault = not_utf8(cursor.where, error, bom + error.start)
        return BadRow(fault, cursor.where, row, mark, whole_file=True)


def _file_pieces(stream: BinaryIO, offset: int, *, from_start: bool) -> Iterator[_Piece]:
    """All of a file; one that is empty has one empty piece."""
    ahead = b""
    while True:
        # One byte more than a piece, to see whether it is the last.
        more, damaged = read_to_damage(stream, PIECE_BYTES + 1 - len(ahead))
        ahead += more
        if damaged is not None:
            # What is readable stays; the rest of this row is lost.
            content = _whole_characters(ahead)
            if content:
                yield _Piece(content, offset, offset + len(content), 1, True)
            raise damaged
        cut = len(ahead) if len(ahead) <= PIECE_BYTES else _cut(ahead)
        content, ahead = ahead[:cut], ahead[cut:]
        if not content and not from_start:
            return
        begins, from_start = offset, False
        offset += len(content)
        yield _Piece(content, begins, offset, 1, bool(ahead))
        if not ahead:
            return


def _line_pieces(stream: BinaryIO, offset: int) -> Iterator[_Piece]:
    """The lines of a file with their ends; `continues`: the line does."""
    ahead, number = b"", 1
    while True:
        line = ahead if ahead.endswith(b"\n") else ahead + stream.readline(PIECE_BYTES + 1 - len(ahead))
        if not line:
            return
        ahead = b""
        if len(line) > PIECE_BYTES:
            cut = _between_characters(line)
            line, ahead = line[:cut], line[cut:]
        begins, offset = offset, offset + len(line)
        yield _Piece(line, begins, offset, number, bool(ahead))
        number += not ahead


def _lines(pieces: Iterator[_Piece], inside: bool) -> Iterator[_Piece]:
    """The lines that are not blank. `inside`: the first piece continues a line."""
    for piece in pieces:
        if inside or piece.continues or not is_blank(piece.content):
            yield piece
        inside = piece.continues


def _paragraphs(pieces: Iterator[_Piece], inside: bool) -> Iterator[_Piece]:
    """Runs of lines that are not blank. `inside`: the first piece continues a paragraph."""
    held: list[_Piece] = []
    size = 0
    damaged: Unreadable | None = None
    while True:
        try:
            piece = next(pieces, None)
        except Unreadable as error:
            piece, damaged = None, error
        if piece is None:
            break
        blank = not inside and not piece.continues and is_blank(piece.content)
        inside = piece.continues
        if held and (blank or size + len(piece.content) > PIECE_BYTES):
            yield _joined(held, continues=not blank)
            held, size = [], 0
        if not blank:
            held.append(piece)
            size += len(piece.content)
    if held:
        yield _joined(held, continues=damaged is not None)
    if damaged is not None:
        raise damaged


def _joined(pieces: list[_Piece], *, continues: bool) -> _Piece:
    content = b"".join(piece.content for piece in pieces)
    return _Piece(content, pieces[0].begins, pieces[-1].ends, pieces[0].line, continues)


def _cut(ahead: bytes) -> int:
    """Where a piece ends: after the last end of a line, else between two characters."""
    return ahead.rfind(b"\n", 0, PIECE_BYTES) + 1 or _between_characters(ahead)


def _between_characters(ahead: bytes) -> int:
    """The last place in PIECE_BYTES between two characters; PIECE_BYTES where the bytes are not UTF-8."""
    for cut in range(PIECE_BYTES, PIECE_BYTES - 4, -1):
        if ahead[cut] & 0xC0 != 0x80:
            return cut
    return PIECE_BYTES


def _whole_characters(content: bytes) -> bytes:
    """The bytes without those of a character that is cut at their end."""
    for length, lead in ((1, 0xC0), (2, 0xE0), (3, 0xF0)):
        if len(content) >= length and content[-length] >= lead:
            return content[:-length]
    return content


def _no_columns(cursor: Cursor) -> Fault:
    reason = f"a text file has no column `{cursor.columns.names[0]}`"
    return Fault(cursor.where, reason, "Give files with columns for prompts and responses, such as .jsonl")
