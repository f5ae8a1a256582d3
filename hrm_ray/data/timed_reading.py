"""Reading as much of a corpus as a time allows.

One job: the rows of a corpus until the time is up, and which share of it they were. What is done with the rows is the
caller's matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

from hrm_ray.data.catalog import RowPosition
from hrm_ray.data.chunks import Corpus, PlacedRow, corpus_rows
from hrm_ray.data.file_kinds import FileKind
from hrm_ray.data.parts import Part
from hrm_ray.data.readers import known_rows
from hrm_ray.data.rows import BadRow
from hrm_ray.data.streams import ReadingWatch

Clock: TypeAlias = Callable[[], float]

_SURE_BYTES = 1 << 20
"""Decompressors take in up to 128 KiB before they give the first row, which must be little beside what was read."""


class TimeUp(Exception):
    """Ends a reading in the middle of a row. It never leaves this module."""


class Timer:
    """A time that runs out: `timeout_s` seconds from now on (None: never)."""

    def __init__(self, timeout_s: float | None, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._timeout_s = timeout_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since it was made."""
        return self._clock() - self._began

    @property
    def up(self) -> bool:
        """Whether the time is over."""
        return self._timeout_s is not None and self.elapsed_s >= self._timeout_s

    def part(self, share: float) -> Timer:
        """A timer that runs out when this share of the whole time of this one is over."""
        within = Timer(None if self._timeout_s is None else share * self._timeout_s, self._clock)
        within._began = self._began
        return within

    def has_spent(self, spent_s: float, share: float) -> bool:
        """Whether `spent_s` is this share of the whole time, or more."""
        return self._timeout_s is not None and spent_s >= share * self._timeout_s

    def raise_if_up(self) -> None:
        """Raises TimeUp where the time is over."""
        if self.up:
            raise TimeUp


class TimedReading:
    """The rows of `corpus` from its beginning (those before its offset included), until `timer` runs out.

    The time is looked at after each row and before stored bytes are read, so that a long way to the first row ends as
    well. What the library for data sets of the Hub does in between cannot be ended.
    """

    def __init__(self, corpus: Corpus, timer: Timer) -> None:
        self._corpus, self._timer = corpus, timer
        self._place = RowPosition(0, 0)
        self._passed: int | None = 0
        self.rows_read = 0
        self.ended = False
        """Whether all of the corpus was read."""

    def __iter__(self) -> Iterator[PlacedRow]:
        watch = ReadingWatch(self._timer.raise_if_up)
        try:
            for row, after in corpus_rows(self._corpus, watch=watch):
                if isinstance(row, BadRow) and row.ends_part:
                    # A library may have made another error of the one that ended its reading.
                    self._timer.raise_if_up()
                    self._passed = 0
                else:
                    self._passed = None if watch.passed_bytes is None else watch.passed_bytes()
                self._place = after
                self.rows_read += 1
                yield row, after
                self._timer.raise_if_up()
        except TimeUp:
            return
        self.ended = True

    @property
    def share(self) -> float | None:
        """Which share of the corpus was read, as far as bytes tell, 0 to 1; None where they do not."""
        if self.ended:
            return 1.0
        total = sum(part.bytes for part in self._corpus.parts)
        if self._place.part == len(self._corpus.parts):
            return None
        present = self._corpus.parts[self._place.part]
        passed = sum(part.bytes for part in self._corpus.parts[: self._place.part]) + self._bytes_of(present)
        compressed = present.kind is not None and present.kind.compression is not None
        return passed / total if (_SURE_BYTES if compressed else 0) < passed < total else None

    def _bytes_of(self, part: Part) -> float:
        """Bytes of the present part that lie behind."""
        if part.kind == FileKind("parquet", None):
            # Its columns do not lie in the order of its rows.
            rows = known_rows(part, self._corpus.source)
            return part.bytes * self._place.row / rows if rows else 0
        return min(self._passed or 0, part.bytes)
