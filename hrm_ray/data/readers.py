"""Documents out of .txt and .jsonl files, one after the other.

One job: files -> Document, in a fixed order, with faults that name file and line. A .txt file is one document; each
line of a .jsonl file is one object with a text column, or with a prompt and a response column. It does not tokenise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_ray.data.parts import Part
from hrm_ray.data.puzzles.format import DESCRIPTION
from hrm_ray.data.splits import TEXT_SUFFIXES, WHOLE, split_files
from hrm_ray.errors import DataFault, Fault, SettingsError

_UTF8 = "Convert the file to UTF-8"


@dataclass(frozen=True)
class TextSource:
    """Where documents come from. With `prompt_column` and `response_column` (both or none) rows are pairs."""

    path: Path
    split: str = WHOLE
    text_column: str = "text"
    prompt_column: str | None = None
    response_column: str | None = None
    apart: str | None = None
    """A split that is held out of this one, where this one is all of a folder that has no split of its name."""

    def plain(self) -> dict[str, Any]:
        """JSON values."""
        return {**self.__dict__, "path": str(self.path)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> TextSource:
        """What `plain` gave."""
        return cls(**{**plain, "path": Path(plain["path"])})

    @property
    def pairs(self) -> bool:
        """True where rows are prompt and response."""
        return self.prompt_column is not None and self.response_column is not None


@dataclass(frozen=True)
class Document:
    """One document: its text, and where it stands (`row` is the line in a .jsonl file, 1 for .txt).

    For a pair `text` is prompt + response, and both are given as well.
    """

    text: str
    where: str
    row: int
    mark: int | None = None
    prompt: str | None = None
    response: str | None = None
    continues: bool = False


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read."""

    fault: Fault
    where: str
    row: int
    mark: int | None = None
    ends_part: bool = False


def read_part(
    part: Part, source: TextSource, start_row: int = 0, mark: int | None = None
) -> Iterator[Document | BadRow]:
    """The rows of a part."""
    file = Path(part.address)
    if file.suffix.lower() == ".jsonl":
        rows = _read_jsonl(file, source, start_row, mark)
    else:
        rows = _read_txt(file, source) if start_row == 0 else iter(())
    while True:
        try:
            row = next(rows, None)
        except DataFault as error:
            yield BadRow(error.faults[0], part.name, 0, None, True)
            return
        if row is None:
            return
        yield row


def text_files(source: TextSource) -> list[Path]:
    """The files that `source` reads as documents, resolved; none for a puzzle set. Raises as `read_documents`."""
    if source.path.is_dir() and (source.path / DESCRIPTION).is_file():
        return []
    if source.path.suffix.lower() not in TEXT_SUFFIXES and not source.path.is_dir():
        return []
    return [file.resolve() for file in split_files(source.path, source.split, source.apart).files]


def read_documents(source: TextSource) -> Iterator[Document]:
    """The documents of `source`, files in sorted order, rows in file order; empty texts are left in.

    Raises SettingsError for a path or columns that cannot be used, DataFault for data that cannot be read or holds no
    text.
    """
    _check_columns(source)
    any_text = False
    for file in split_files(source.path, source.split, source.apart).files:
        for document in _read_jsonl(file, source) if file.suffix.lower() == ".jsonl" else _read_txt(file, source):
            any_text = any_text or bool(document.text)
            yield document
    if not any_text:
        raise DataFault(Fault(str(source.path), "it is empty, there is no text in it", "Give data with text in it"))


def _check_columns(source: TextSource) -> None:
    if (source.prompt_column is None) != (source.response_column is None):
        given = source.prompt_column or source.response_column
        raise SettingsError(
            Fault(
                f"column `{given}`",
                "a prompt column and a response column go together",
                "Give both --prompt-column and --response-column, or neither",
            )
        )


def _read_txt(file: Path, source: TextSource) -> Iterator[Document]:
    if source.pairs:
        raise DataFault(
            Fault(
                str(file),
                f"a .txt file has no column `{source.prompt_column}`",
                "Give .jsonl files for prompts and responses",
            )
        )
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(str(file), error, error.start) from error
    yield Document(text.removeprefix("\ufeff"), str(file), 0)


def _read_jsonl(file: Path, source: TextSource, start_row: int = 0, mark: int | None = None) -> Iterator[Document]:
    offset = mark or 0
    row_number = start_row - 1
    with file.open("rb") as lines:
        lines.seek(offset)
        for number, line in enumerate(lines, start=1):
            where = f"{file}:{number}"
            row = parse_line(line, where, offset)
            offset += len(line)
            if row is None:
                continue
            row_number += 1
            if source.prompt_column is not None and source.response_column is not None:
                prompt = _column(row, source.prompt_column, where, "--prompt-column")
                response = _column(row, source.response_column, where, "--response-column")
                yield Document(prompt + response, where, row_number, offset, prompt, response)
            else:
                yield Document(_column(row, source.text_column, where, "--text-column"), where, row_number, offset)


def parse_line(line: bytes, where: str, offset: int) -> dict[str, object] | None:
    """The object on one line of a .jsonl file, None for a blank line. `where` is file:line, `offset` the line's first
    byte in the file, both for the fault."""
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error, offset + error.start) from error
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataFault(Fault(where, f"this line is not JSON ({error})", "Put one JSON object on each line")) from error
    if not isinstance(row, dict):
        raise DataFault(Fault(where, f"this row is {_kind(row)}, not an object", "Put one JSON object on each line"))
    return row


def _column(row: dict[str, object], column: str, where: str, option: str) -> str:
    if column not in row:
        there = ", ".join(sorted(row)) or "none"
        raise DataFault(
            Fault(
                f"{where}, column `{column}`",
                f"the row has no such column; it has: {there}",
                f"Name another with {option}",
            )
        )
    value = row[column]
    if not isinstance(value, str):
        raise DataFault(
            Fault(
                f"{where}, column `{column}`",
                f"its value is {_kind(value)}, not a string",
                f"Name another with {option}",
            )
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"character {error.start} is half of a surrogate pair, which is no text"
        raise DataFault(
            Fault(f"{where}, column `{column}`", reason, "Write the character itself, or the pair")
        ) from error
    return value


def _not_utf8(where: str, error: UnicodeDecodeError, offset: int) -> DataFault:
    reason = f"byte {offset} (0x{error.object[error.start]:02x}) is not UTF-8: {error.reason}"
    return DataFault(Fault(where, reason, _UTF8))


def _kind(value: object) -> str:
    """A JSON value's type in JSON's own words."""
    kinds = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), "a string")
