"""A text corpus as one sequence of rows, and how much of it was read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from hrm_ray.data.catalog import RowPosition
from hrm_ray.data.file_kinds import FileKind
from hrm_ray.data.hub import split_rows
from hrm_ray.data.parts import Part, TextSource
from hrm_ray.data.readers import known_rows, read_part
from hrm_ray.data.rows import BadRow, OnBadRow, Row
from hrm_ray.data.streams import ReadingWatch
from hrm_ray.data.timer import TimeUp
from hrm_ray.settings.hub_name import HUB

PlacedRow: TypeAlias = tuple[Row, RowPosition]
"""A row, and the position after it."""

_BEGINNING = RowPosition(0, 0)
_SURE_BYTES = 1 << 20
"""Decompressors take in up to 128 KiB before they give the first row, which must be little beside what was read."""


@dataclass(frozen=True)
class Corpus:
    """What is read, and how it is cut into blocks and chunks. Rows before `offset` are skipped; of the rest at most
    `max_rows` are used. With `ascii_only` rows with other characters are left out and counted; with `on_bad_row` "skip"
    so are rows that cannot be read."""

    source: TextSource
    parts: tuple[Part, ...]
    samples_per_block: int
    chunk_size: int
    offset: int = 0
    max_rows: int | None = None
    ascii_only: bool = False
    on_bad_row: OnBadRow = "fail"

    @property
    def random_access(self) -> bool:
        """Whether reading may begin at any row without reading the rows before it."""
        return all(part.random_access for part in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes of the parts as stored; 0 where unknown."""
        return sum(part.bytes for part in self.parts)


class CorpusReading:
    """The rows of `corpus` from `start` on, each with the position after it; rows before the offset are included.

    `on_read` is called with this reading after each row and before stored bytes are read, so that it can show progress
    or stop reading even before the first row. What it raises propagates, except that TimeUp just ends the rows. Reading
    of the Hub cannot be stopped between two rows.
    """

    def __init__(
        self,
        corpus: Corpus,
        start: RowPosition = _BEGINNING,
        on_read: Callable[[CorpusReading], None] | None = None,
    ) -> None:
        self._corpus, self._position, self._on_read = corpus, start, on_read
        self._from_beginning = start == _BEGINNING
        self._passed_bytes: int | None = 0
        self.rows_read = 0
        self.ended = False
        """Whether the last row of the corpus was read."""

    def __iter__(self) -> Iterator[PlacedRow]:
        start = self._position
        try:
            for number in range(start.part, len(self._corpus.parts)):
                yield from self._part(number, start if number == start.part else RowPosition(number, 0))
        except TimeUp:
            return
        self.ended = True

    def _part(self, number: int, start: RowPosition) -> Iterator[PlacedRow]:
        watch = None if self._on_read is None else ReadingWatch(self._check)
        part = self._corpus.parts[number]
        for row in read_part(part, self._corpus.source, start.row, start.mark, start.piece, watch=watch):
            if isinstance(row, BadRow) and row.ends_part:
                # A library may have made another error of the one that `on_read` raised.
                self._check()
                # Reading resumes at the next part: behind the last row of this one the same error would come again.
                self._position, self._passed_bytes = RowPosition(number + 1, 0), 0
            else:
                # A row counts where it ends.
                at = (row.row, row.mark, row.piece + 1) if row.continues else (row.row + 1, row.mark)
                self._position = RowPosition(number, *at)
                self._passed_bytes = None if watch is None or watch.passed_bytes is None else watch.passed_bytes()
            self.rows_read += not row.continues
            yield row, self._position
            self._check()

    def _check(self) -> None:
        if self._on_read is not None:
            self._on_read(self)

    @property
    def share(self) -> float | None:
        """The share of the corpus that was read or skipped, by bytes (for a data set of the Hub, by rows), 0 to 1; None
        if unknown or without `on_read`."""
        if self.ended:
            return 1.0
        parts, number = self._corpus.parts, self._position.part
        if number == len(parts):
            return None
        present, total = parts[number], self._corpus.bytes
        if present.address.startswith(HUB):
            rows = split_rows(present.address)
            return self.rows_read / rows if rows and self._from_beginning and self.rows_read < rows else None
        passed = sum(part.bytes for part in parts[:number]) + self._bytes_of(present)
        compressed = present.kind is not None and present.kind.compression is not None
        return passed / total if (_SURE_BYTES if compressed else 0) < passed < total else None

    def _bytes_of(self, part: Part) -> float:
        """Bytes read of the current part."""
        if part.kind == FileKind("parquet", None):
            # Columns do not lie in the order of rows.
            rows = known_rows(part, self._corpus.source)
            return part.bytes * self._position.row / rows if rows else 0
        return min(self._passed_bytes or 0, part.bytes)
