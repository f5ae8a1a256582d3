"""JSON files (.json): an array of objects, or objects one after the other, one at a time out of a file of any length.

The rows after a syntax error cannot be separated from it, so such an error ends the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from hrm_ray.data.formats.lines import too_long
from hrm_ray.data.rows import ROW_BYTES, BadRow, Cursor, Row, kind_name, not_utf8
from hrm_ray.data.streams import Unreadable, read_to_damage
from hrm_ray.errors import Fault

_READ_BYTES = 256 << 10
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_HINT = "Write an array of objects: [{...}, {...}]"
# An error, or the end of a number, nearer than this to the end of what was read may be due to what is still to come.
_MARGIN = 16


def json_rows(stream: BinaryIO, cursor: Cursor) -> Iterator[Row]:
    """The rows of a .json stream. Raises Unreadable where it cannot go on."""
    text = _Window(stream, cursor.where)
    is_array = text.peek() == "["
    if is_array:
        text.step()
    first = True
    while character := text.peek():
        if is_array and character == "]":
            text.step()
            if text.peek():
                raise Unreadable(Fault(text.where(), "more text follows the end of the array", _HINT))
            return
        if is_array and not first:
            if character != ",":
                raise Unreadable(Fault(text.where(), "there is no comma between two rows", _HINT))
            text.step()
            text.peek()
        where = text.where()
        try:
            value = text.value()
        except Unreadable as error:
            error.not_text = first and error.not_text
            raise
        first = False
        row = cursor.next_row()
        if row >= cursor.start:
            if isinstance(value, dict):
                yield cursor.columns.document(value, where, row, None)
            else:
                fault = Fault(where, f"this row is {kind_name(value)}, not an object", _HINT)
                yield BadRow(fault, where, row, not_text=True)
    if is_array:
        raise Unreadable(Fault(text.where(), "the array does not end", "The file may be cut short: copy it again"))


class _Window:
    """A part of the stream as text, read on at its end and dropped at its beginning."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._bytes, self._lines, self._counted = 0, 0, 0
        self._ended = False
        self._fault: Fault | None = None
        self._damaged: Unreadable | None = None

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._at = _end(_SPACE.match(self._text, self._at))
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                self._check()
                return ""
            self._grow()

    def step(self) -> None:
        """Go one character on."""
        self._at += 1

    def where(self) -> str:
        """File and line of the present position."""
        self._lines += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return f"{self._name}:{self._lines + 1}"

    def value(self) -> object:
        """The JSON value that begins here; the window then stands behind it. Raises Unreadable where there is none."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                at_the_end = error.pos + _MARGIN >= len(self._text) or error.msg.startswith("Unterminated string")
                if self._ended or not at_the_end:
                    self._check()
                    # What ends within a value may be cut short; what is wrong before its end is something else.
                    cut = error.msg.startswith("Unterminated string") or not self._text[error.pos :].strip()
                    raise Unreadable(Fault(self.where(), f"not JSON ({error.msg})", _HINT), not_text=not cut) from error
            except (ValueError, RecursionError) as error:
                raise Unreadable(Fault(self.where(), f"not JSON ({error})", _HINT)) from error
            else:
                if self._ended or isinstance(value, dict | list | str) or end + _MARGIN < len(self._text):
                    self._at = end
                    return value
            if len(self._text) - self._at > ROW_BYTES:
                raise Unreadable(too_long(self.where()))
            self._grow()

    def _check(self) -> None:
        if self._fault is not None:
            raise Unreadable(self._fault)

    def _grow(self) -> None:
        """Read as much again as there is, so that a long value is not parsed too often. Raises Unreadable behind what
        could be read of a damaged stream."""
        if self._damaged is not None:
            raise self._damaged
        self.where()
        self._text = self._text[self._at :]
        self._at = self._counted = 0
        more, self._damaged = read_to_damage(self._stream, max(_READ_BYTES, len(self._text)))
        kept = len(self._decoder.getstate()[0])
        self._ended = not more and self._damaged is None
        try:
            self._text += self._decoder.decode(more, final=self._ended)
        except UnicodeDecodeError as error:
            # The rows before the wrong byte are still to come.
            begins = self._bytes - kept
            self._text += error.object[: error.start].decode("utf-8-sig" if begins == 0 else "utf-8")
            self._fault = not_utf8(self._name, error, begins + error.start)
            self._ended = True
        self._bytes += len(more)


def _end(found: re.Match[str] | None) -> int:
    if found is None:
        raise ValueError("no match")
    return found.end()
