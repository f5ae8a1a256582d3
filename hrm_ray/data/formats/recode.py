"""Text files that are not plain UTF-8: in another encoding, or HTML. They are read as UTF-8 streams of their text."""

from __future__ import annotations

import codecs
import io
import re
from contextlib import suppress
from html import unescape
from typing import Any, BinaryIO, cast

from hrm_ray.data.file_kinds import FileKind
from hrm_ray.data.formats.lines import too_long
from hrm_ray.data.rows import ROW_BYTES, Cursor
from hrm_ray.data.streams import BUFFER_BYTES, Unreadable
from hrm_ray.errors import Fault
from hrm_ray.settings.data import is_text_encoding

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    # Before UTF-16, whose marks are beginnings of these.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HTML_CHARSET = re.compile(rb"""<(?:meta|\?xml)\b[^>]*?(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:-]+)""", re.I)
_BEGIN_BYTES = 4096
_STEP_BYTES = 64 << 10
_TAG = re.compile(r"<(/?)([A-Za-z][^\s/>]*)")
_QUOTED_MARKS = 4
_HIDDEN = frozenset({"script", "style", "template"})
_PARAGRAPHS = re.compile("p|h[1-6]|pre|table|[uod]l|blockquote|article|section|header|footer|figure|hr")
_LINES = re.compile("br|div|li|tr|d[td]|title|option|address|aside|main|nav|form|fieldset|(fig)?caption|center|body")


def utf8_stream(stream: BinaryIO, kind: FileKind, cursor: Cursor) -> BinaryIO:
    """The text in `stream`, a buffered reader at its beginning, as UTF-8; the stream itself where it is that already.

    A byte-order mark decides on the encoding, then what an HTML file says of itself, then `cursor.encoding`. The result
    cannot be sought in, so its rows have no marks. Raises Unreadable where a file of which only the content can say
    whether it is text is none, and later for bytes that are not in the encoding.
    """
    if cursor.mark is not None:
        # Only plain UTF-8 gives marks; its beginning need not be read again.
        return stream
    begin: bytes = stream.peek(_BEGIN_BYTES)  # type: ignore[attr-defined]
    encoding = _encoding_of(begin, kind, cursor)
    if kind.guessed:
        _check_is_text(begin, encoding, cursor.where)
    if encoding == "utf-8" and kind.form != "html":
        return stream
    cursor.mark, cursor.marked = None, False
    return cast(
        BinaryIO, io.BufferedReader(_Recoded(stream, encoding, kind.form == "html", cursor.where), BUFFER_BYTES)
    )


def utf8_text(content: bytes, kind: FileKind, cursor: Cursor) -> bytes:
    """`utf8_stream` for all bytes of a short file, whose mark stays as it is."""
    encoding = _encoding_of(content[:_BEGIN_BYTES], kind, cursor)
    if kind.guessed:
        _check_is_text(content[:_STEP_BYTES], encoding, cursor.where)
    if encoding == "utf-8" and kind.form != "html":
        return content
    return io.BufferedReader(_Recoded(io.BytesIO(content), encoding, kind.form == "html", cursor.where)).read()


def _encoding_of(begin: bytes, kind: FileKind, cursor: Cursor) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if begin.startswith(mark):
            if encoding != "utf-8":
                cursor.remark = f"{encoding.upper()} by its byte-order mark"
            return encoding
    named = _HTML_CHARSET.search(begin) if kind.form == "html" else None
    # A file may name anything, also a codec that is none for text ("hex").
    if named is not None and is_text_encoding(named[1].decode("ascii")):
        return codecs.lookup(named[1].decode("ascii")).name
    if cursor.encoding is None and begin.count(0) * 4 > len(begin):
        cursor.remark = "many NUL characters, as in UTF-16 without a byte-order mark (--encoding utf-16-le)"
    return codecs.lookup(cursor.encoding).name if cursor.encoding is not None else "utf-8"


def _check_is_text(begin: bytes, encoding: str, where: str) -> None:
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(begin)
    except UnicodeError as error:
        # Some codecs ("idna") do not say which byte is wrong.
        wrong = f"byte {error.start}" if isinstance(error, UnicodeDecodeError) else "the beginning"
        reason = f"does not look like text ({wrong} is not {encoding.upper()})"
        hint = "Leave it out, or name its encoding with --encoding"
        raise Unreadable(Fault(where, reason, hint), not_text=True) from error
    if "\0" in text:
        reason = "does not look like text (it contains NUL characters)"
        raise Unreadable(Fault(where, reason, "Leave it out"), not_text=True)


class _Recoded(io.RawIOBase):
    """A stream's text as UTF-8; of HTML, the text without the markup."""

    def __init__(self, source: BinaryIO, encoding: str, html: bool, where: str) -> None:
        super().__init__()
        self._source, self._encoding, self._where = source, encoding, where
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._html: list[str] | None = [] if html else None
        self._html_characters = 0
        self._ready, self._read_bytes = b"", 0
        self._ended = False
        self._error: Unreadable | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            self._fill()
        if not self._ready and self._error is not None:
            raise self._error
        view = memoryview(buffer)
        data, self._ready = self._ready[: len(view)], self._ready[len(view) :]
        view[: len(data)] = data
        return len(data)

    def _fill(self) -> None:
        try:
            data = self._source.read1(_STEP_BYTES)  # type: ignore[attr-defined]
        except Unreadable as error:
            data, self._error = b"", error
        self._ended = not data
        state = self._decoder.getstate()
        kept = len(state[0])
        try:
            text = self._decoder.decode(data, final=self._ended and self._error is None)
        except UnicodeError as error:
            text, begin = "", self._read_bytes - kept
            wrong, reason = f"the text from byte {begin} on", str(error)
            if isinstance(error, UnicodeDecodeError):
                wrong, reason = f"byte {begin + error.start} (0x{error.object[error.start]:02x})", error.reason
                # What stands before the wrong byte is still text, but not in Punycode or UTF-16 without a mark.
                self._decoder.setstate(state)
                with suppress(UnicodeError):
                    text = self._decoder.decode(data[: max(0, error.start - kept)])
            hint = "Give the encoding that it has with --encoding, or convert it to UTF-8"
            self._error = Unreadable(Fault(self._where, f"{wrong} is not {self._encoding.upper()}: {reason}", hint))
            self._ended = True
        self._read_bytes += len(data)
        if self._read_bytes == len(data):
            text = text.removeprefix("\ufeff")
        if self._html is not None:
            self._html.append(text)
            self._html_characters += len(text)
            if self._html_characters > ROW_BYTES:
                raise Unreadable(too_long(self._where))
            text = _HtmlText().text_of("".join(self._html)) if self._ended else ""
        # A lone surrogate, which UTF-7 may give, is no text.
        self._ready = text.encode("utf-8", "replace")


class _HtmlText:
    """The text of HTML: spaces run together as a browser shows them, blocks begin new lines.

    The standard library's parser takes time that grows with the square of the length for some broken files; here each
    character is looked at a bounded number of times.
    """

    def __init__(self) -> None:
        self._out: list[str] = []
        self._gap = ""
        self._preformatted = 0

    def text_of(self, html: str) -> str:
        """The text of a whole document."""
        at = 0
        while at < len(html):
            tag = html.find("<", at)
            self._text(unescape(html[at:] if tag < 0 else html[at:tag]))
            if tag < 0:
                break
            at = self._markup(html, tag)
        return "".join(self._out) + "\n" * bool(self._out)

    def _markup(self, html: str, begin: int) -> int:
        """Takes the tag, comment or lone `<` at `begin`; returns where it ends, or the end of all."""
        for opening, closing in (("<!--", "-->"), ("<![CDATA[", "]]>"), ("<!", ">"), ("<?", ">")):
            if html.startswith(opening, begin):
                end = html.find(closing, begin + len(opening))
                if opening == "<![CDATA[":
                    self._text(html[begin + len(opening) : end if end >= 0 else len(html)])
                return len(html) if end < 0 else end + len(closing)
        name = _TAG.match(html, begin)
        if name is None:
            self._text("<")
            return begin + 1
        end = html.find(">", begin)
        # A `>` within quotes is part of an attribute.
        for _ in range(_QUOTED_MARKS):
            if end >= 0 and html.count('"', begin, end) % 2:
                end = html.find(">", end + 1)
        if end < 0:
            return len(html)
        tag, closes = name[2].lower(), bool(name[1])
        if tag == "pre":
            self._preformatted = max(0, self._preformatted + (-1 if closes else 1))
        self._break(tag)
        if tag in _HIDDEN and not closes:
            hidden = re.compile(f"</{tag}", re.IGNORECASE).search(html, end)
            return len(html) if hidden is None else hidden.start()
        return end + 1

    def _text(self, data: str) -> None:
        if self._preformatted and data:
            self._put(data)
            return
        words = " ".join(re.split(r"[ \t\n\r\f]+", data))
        if words.startswith(" "):
            self._gap = self._gap or " "
        if words.strip(" "):
            self._put(words.strip(" "))
            self._gap = " " if words.endswith(" ") else ""

    def _put(self, text: str) -> None:
        if self._out:
            self._out.append(self._gap)
        self._out.append(text)
        self._gap = ""

    def _break(self, tag: str) -> None:
        if _PARAGRAPHS.fullmatch(tag):
            self._gap = "\n\n"
        elif _LINES.fullmatch(tag) and self._gap != "\n\n":
            self._gap = "\n"
        elif tag in ("td", "th") and "\n" not in self._gap:
            self._gap = "\t"
