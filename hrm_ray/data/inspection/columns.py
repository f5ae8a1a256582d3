"""The columns of a corpus: names, types, and how many rows fill them, from a few rows of a few parts.

Rows go through the same readers as in training, which take one or two columns only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from hrm_ray.data.file_kinds import TEXT_FORMATS
from hrm_ray.data.parts import Part, TextSource
from hrm_ray.data.readers import read_part
from hrm_ray.data.rows import Document, Row, TextColumns
from hrm_ray.data.streams import ReadingWatch
from hrm_ray.data.timer import Timer, TimeUp
from hrm_ray.errors import Fault

_PARTS, _ROWS_OF_PART = 5, 200

_TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    bytes: "binary",
    list: "list",
    dict: "object",
}


@dataclass(frozen=True)
class ColumnFacts:
    """A column: types of its values (the most frequent first; none where all are missing), and in how many of the rows
    it holds something, which a null and an empty string are not."""

    name: str
    types: tuple[str, ...]
    filled: int


@dataclass(frozen=True)
class TableFacts:
    """The columns of the `rows` rows that were looked at, in `parts` parts."""

    rows: int
    parts: int
    columns: tuple[ColumnFacts, ...]


class _Tally(TextColumns):
    """Columns that count the values of all columns instead of making documents of them."""

    def __init__(self) -> None:
        super().__init__("", None, None)
        self.names = ()
        self.rows = 0
        self.types: dict[str, dict[str, int]] = {}
        self.filled: dict[str, int] = {}

    def absent(self, there: Iterable[str], where: str, what: str = "row") -> Fault | None:
        """Called first by readers that select columns of a table: all of them are selected."""
        self.names = tuple(dict.fromkeys(there))
        for name in self.names:
            self.types.setdefault(name, {})
        return None

    def picked(self, values: Sequence[object], where: str, row: int, mark: int | None) -> Row:
        return self.document(dict(zip(self.names, values, strict=True)), where, row, mark)

    def document(self, values: Mapping[str, object], where: str, row: int, mark: int | None) -> Row:
        self.rows += 1
        for name, value in values.items():
            seen = self.types.setdefault(name, {})
            if value is not None:
                kind = _TYPES.get(type(value), type(value).__name__)
                seen[kind] = seen.get(kind, 0) + 1
                if value != "":
                    self.filled[name] = self.filled.get(name, 0) + 1
        return Document("", where, row, mark)

    def facts(self, parts: int) -> TableFacts:
        columns = (
            ColumnFacts(name, tuple(sorted(types, key=lambda kind: -types[kind])), self.filled.get(name, 0))
            for name, types in self.types.items()
        )
        return TableFacts(self.rows, parts, tuple(columns))


def read_columns(parts: Sequence[Part], source: TextSource, timer: Timer) -> TableFacts:
    """The columns of the first rows of a few parts, which lie evenly in the corpus; plain texts have none. Rows
    that cannot be read are skipped: reading the texts reports them."""
    tally = _Tally()
    tables = [part for part in parts if part.kind is None or part.kind.form not in TEXT_FORMATS]
    step = max(1, -(-len(tables) // _PARTS))
    looked_at = 0
    for part in tables[::step]:
        before = tally.rows
        try:
            rows = read_part(part, source, watch=ReadingWatch(timer.raise_if_up), columns=tally)
            for _ in islice(rows, _ROWS_OF_PART):
                timer.raise_if_up()
        except TimeUp:
            break
        finally:
            looked_at += tally.rows > before
    return tally.facts(looked_at)
