"""Text files that are not plain UTF-8: in another encoding, or HTML. They are read as UTF-8 streams of their text."""

from __future__ import annotations

import codecs
import io
import re
from html.parser import HTMLParser
from typing import Any, BinaryIO, cast

from hrm_ray.data.file_kinds import FileKind
from hrm_ray.data.rows import Cursor
from hrm_ray.data.streams import BUFFER_BYTES, Unreadable
from hrm_ray.errors import Fault

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
_HIDDEN = frozenset({"script", "style", "template"})
_PARAGRAPHS = re.compile("p|h[1-6]|pre|table|[uod]l|blockquote|article|section|header|footer|figure|hr")
_LINES = re.compile("br|div|li|tr|d[td]|title|option|address|aside|main|nav|form|fieldset|(fig)?caption|center|body")


def utf8_stream(stream: BinaryIO, kind: FileKind, cursor: Cursor) -> BinaryIO:
    """The text in `stream`, a buffered reader at its beginning, as UTF-8; the stream itself where it is that already.

    A byte-order mark decides on the encoding, then what an HTML file says of itself, then `cursor.encoding`. The result
    cannot be sought in, so its rows have no marks. Raises Unreadable where a file of which only the content can say
    whether it is text is none, and later for bytes that are not in the encoding.
    """
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
    if named is not None:
        try:
            return codecs.lookup(named[1].decode("ascii")).name
        except LookupError:
            pass
    return codecs.lookup(cursor.encoding).name if cursor.encoding is not None else "utf-8"


def _check_is_text(begin: bytes, encoding: str, where: str) -> None:
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(begin)
    except UnicodeDecodeError as error:
        reason = f"does not look like text (byte {error.start} is not {encoding.upper()})"
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
        self._html = _HtmlText() if html else None
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
        except UnicodeDecodeError as error:
            # What stands before the wrong byte is still text.
            self._decoder.setstate(state)
            text = self._decoder.decode(data[: max(0, error.start - kept)])
            at = self._read_bytes - kept + error.start
            reason = f"byte {at} (0x{error.object[error.start]:02x}) is not {self._encoding.upper()}: {error.reason}"
            hint = "Give the encoding that it has with --encoding, or convert it to UTF-8"
            self._error, self._ended = Unreadable(Fault(self._where, reason, hint)), True
        self._read_bytes += len(data)
        if self._read_bytes == len(data):
            text = text.removeprefix("\ufeff")
        if self._html is not None:
            text = self._html.text_of(text, final=self._ended)
        # A lone surrogate, which UTF-7 may give, is no text.
        self._ready = text.encode("utf-8", "replace")


class _HtmlText(HTMLParser):
    """The text of HTML, given piece by piece: spaces run together as a browser shows them, blocks begin new lines."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._out: list[str] = []
        self._gap = ""
        self._hidden = self._preformatted = 0
        self._begun = False

    def text_of(self, html: str, *, final: bool) -> str:
        """The text that is complete after `html`."""
        self.feed(html)
        if final:
            self.close()
            if self._begun:
                self._out.append("\n")
        text = "".join(self._out)
        self._out.clear()
        return text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _HIDDEN
        self._preformatted += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in _HIDDEN))
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        self._break(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        """Skips <![...]>, for which the base class raises where it does not know the keyword."""
        mark = "]]>" if self.rawdata.startswith("<![CDATA[", i) else ">"
        end = self.rawdata.find(mark, i)
        return -1 if end < 0 else end + len(mark)

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._preformatted:
            if data:
                self._put(data)
            return
        words = " ".join(re.split(r"[ \t\n\r\f]+", data))
        if words.startswith(" "):
            self._gap = self._gap or " "
        if words.strip(" "):
            self._put(words.strip(" "))
            self._gap = " " if words.endswith(" ") else ""

    def _put(self, text: str) -> None:
        if self._begun:
            self._out.append(self._gap)
        self._out.append(text)
        self._gap, self._begun = "", True

    def _break(self, tag: str) -> None:
        if _PARAGRAPHS.fullmatch(tag):
            self._gap = "\n\n"
        elif _LINES.fullmatch(tag) and self._gap != "\n\n":
            self._gap = "\n"
        elif tag in ("td", "th") and "\n" not in self._gap:
            self._gap = "\t"
