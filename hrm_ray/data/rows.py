"""Rows of a corpus: documents, and bad rows with what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from hrm_ray.data.streams import ReadingWatch
from hrm_ray.errors import Fault, listed

ROW_BYTES = 64 << 20
"""A row longer than this (64 MiB) is refused: what is read is held one row at a time, and memory must have a bound."""


@dataclass(frozen=True)
class Document:
    """One document: its text, and where it is.

    `where` is for messages (file and line); `row` is its number in the part from 0, bad rows counted; `mark`, where the
    part can be read from any row, is where the next row begins. For a pair `text` is prompt + response, and both are
    given as well.
    """

    text: str
    where: str
    row: int
    mark: int | None = None
    prompt: str | None = None
    response: str | None = None
    piece: int = 0
    """Of a text that comes in pieces: number of this piece, from 0."""
    continues: bool = False
    """Whether the text goes on in the next piece, which has the same `row`."""
    remark: str = ""
    """Of the first document of a file: how the file is read, where that is not what its name says."""


@dataclass(frozen=True)
class BadRow:
    """A row (or a piece of one) that cannot be read, and why; `ends_part`: the rest of the part cannot be read
    either."""

    fault: Fault
    where: str
    row: int
    mark: int | None = None
    ends_part: bool = False
    piece: int = 0
    continues: bool = False
    not_text: bool = False
    """Whether the row looks like one of a file that is no text data."""
    passed_over: bool = False
    """Whether it stands for a file that is no text data, which ends no run."""
    whole_file: bool = False
    """Whether it is all of its file."""


Row: TypeAlias = Document | BadRow

TextRows: TypeAlias = Literal["document", "paragraph", "line", "mebibyte"]
"""What a row of a plain text file is: the file, a block between blank lines, a line that is not blank, or (as in
version 0.1) each mebibyte of it, cut after the end of a line."""

OnBadRow: TypeAlias = Literal["fail", "skip"]
"""What happens at a bad row."""


class TextColumns:
    """The columns that hold a document: one of text, or prompt and response."""

    def __init__(self, text: str, prompt: str | None, response: str | None) -> None:
        self.pairs = prompt is not None and response is not None
        self.names: tuple[str, ...] = (prompt or "", response or "") if self.pairs else (text,)
        self._options: tuple[str, ...] = ("--prompt-column", "--response-column") if self.pairs else ("--text-column",)

    def document(self, values: Mapping[str, object], where: str, row: int, mark: int | None) -> Row:
        """The document of a row whose columns are `values`."""
        try:
            picked = [values[name] for name in self.names]
        except KeyError:
            absent = self.absent(values, where)
            if absent is None:
                raise
            return BadRow(absent, where, row, mark, not_text=True)
        return self.picked(picked, where, row, mark)

    def picked(self, values: Sequence[object], where: str, row: int, mark: int | None) -> Row:
        """The document of a row of which only the columns `names` were taken."""
        for number, value in enumerate(values):
            # Plain ASCII, the usual case, needs no closer look.
            if type(value) is not str or not value.isascii():
                fault = self._no_text(value, number, where)
                if fault is not None:
                    return BadRow(fault, where, row, mark)
        if self.pairs:
            prompt, response = str(values[0]), str(values[1])
            return Document(prompt + response, where, row, mark, prompt, response)
        return Document(str(values[0]), where, row, mark)

    def absent(self, there: Iterable[str], where: str, what: str = "row") -> Fault | None:
        """The fault of a row (or of a file: `what`) without one of the columns, or with two of a name."""
        columns = list(there)
        for name, option in zip(self.names, self._options, strict=True):
            if columns.count(name) > 1:
                reason = f"the {what} has {columns.count(name)} columns of this name"
                return Fault(f"{where}, column `{name}`", reason, f"Rename one, or name another with {option}")
            if name not in columns:
                reason = f"the {what} has no such column; it has: {listed(sorted(columns))}"
                hint = f"Name another with {option}"
                chats = [column for column in columns if column in ("messages", "conversations")]
                if chats and option == "--text-column":
                    hint += f", or give --messages-column {chats[0]} for chats"
                return Fault(f"{where}, column `{name}`", reason, hint)
        return None

    def _no_text(self, value: object, number: int, where: str) -> Fault | None:
        """What is wrong with a value that should be text; None where it is."""
        place = f"{where}, column `{self.names[number]}`"
        if isinstance(value, bytes):
            try:
                value.decode("utf-8")
            except UnicodeDecodeError as error:
                return not_utf8(place, error, error.start)
        if not isinstance(value, str):
            reason = f"its value is {kind_name(value)}, not a string"
            return Fault(place, reason, f"Name another with {self._options[number]}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            reason = f"character {error.start} is half of a surrogate pair, which is not text"
            return Fault(place, reason, "Write the character itself, or the pair")
        return None


@dataclass
class Cursor:
    """The state of reading a part.

    `row` is the number of the next row, `piece` that of its next piece; what is below `start` and `start_piece` is
    skipped. With `mark` reading begins at the row `start` (its piece `start_piece`), which begins there. `marked`: rows
    have marks. `where` names the present file for people; in an archive it moves from member to member, while rows are
    counted through. `watch` follows how far reading has come.
    """

    columns: TextColumns
    where: str
    start: int = 0
    mark: int | None = None
    marked: bool = False
    row: int = 0
    watch: ReadingWatch | None = None
    text_rows: TextRows = "document"
    start_piece: int = 0
    piece: int = 0
    encoding: str | None = None
    """Of text files without a byte-order mark; None: UTF-8."""
    delimiter: str | None = None
    """Between the fields of .csv and .tsv; None: the suffix's own, or what the header shows."""
    lenient: bool = False
    """Whether a file that holds no text data is passed over."""
    remark: str = ""
    """How the present file is read, where that is not what its name says; see Document."""

    def next_row(self) -> int:
        """Counts a row, and returns its number."""
        self.row, self.piece = self.row + 1, 0
        return self.row - 1

    def next_piece(self, continues: bool) -> bool:
        """Counts a piece of the current row, which `continues` or ends with it; returns `continues`."""
        if continues:
            self.piece += 1
        else:
            self.row, self.piece = self.row + 1, 0
        return continues

    def bad(self, fault: Fault) -> BadRow:
        """Counts a bad row, and returns it."""
        return BadRow(fault, self.where, self.next_row())


def skippable(fault: Fault) -> Fault:
    """The fault of a bad row that ends the run, with the way to go on without the row."""
    return replace(fault, hint=f"{fault.hint}, or skip bad rows with --on-bad-row skip")


def unreadable(bad: int, files: int, adjective: str = "") -> str:
    """The number of bad rows in words; `files` of them are whole files."""
    counts = [(bad - files, f"{adjective}row"), (files, f"{adjective}file")]
    return " and ".join(f"{count:,} {what}{'' if count == 1 else 's'}" for count, what in counts if count)


def not_utf8(where: str, error: UnicodeDecodeError, offset: int) -> Fault:
    """The fault of bytes that are not UTF-8; `offset` is the wrong byte's position in the file or value."""
    reason = f"byte {offset} (0x{error.object[error.start]:02x}) is not UTF-8: {error.reason}"
    hint = f"Convert the file to UTF-8, or name its encoding (for example --encoding {_encoding_example(error)})"
    return Fault(where, reason, hint)


def _encoding_example(error: UnicodeDecodeError) -> str:
    """The name of an encoding in which the bytes around an error can be text; a guess for messages."""
    begin = max(0, error.start - 100)
    near = error.object[begin : error.start + 200]
    if b"\0" in near:
        return "utf-16-le" if (begin + near.index(b"\0")) % 2 else "utf-16-be"
    runs = re.findall(rb"[\x80-\xff]+", near)
    high = b"".join(runs)
    names: tuple[str, ...] = ("gb18030", "big5", "koi8-r")
    # Japanese kana begin with one of two bytes in Shift-JIS; letters with accents stand alone in cp1252.
    if (high.count(0x82) + high.count(0x83)) * 6 > len(high):
        names = ("shift_jis", *names)
    elif sum(len(run) == 1 for run in runs) * 3 > len(runs):
        return "cp1252"
    for name in names:
        after = error.object[error.start : error.start + 200]
        try:
            after.decode(name)
        except UnicodeDecodeError as other:
            # The slice may end within a character.
            if other.start < len(after) - 4:
                continue
        return name
    return "cp1252"


def kind_name(value: object) -> str:
    """A value's type in JSON's own words."""
    kinds = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "a string",
        bytes: "binary",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")
