"""Numbers in reports: exact or estimated, and the spread of many numbers in fixed memory."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from statistics import median_low
from typing import Literal, TypeAlias

Certainty: TypeAlias = Literal["exact", "about", "at least"]

_KEPT = 1 << 17


@dataclass(frozen=True)
class Figure:
    """A whole number: counted, estimated from a part of the data, or a lower bound."""

    value: int
    certainty: Certainty = "exact"


@dataclass(frozen=True)
class Spread:
    """Minimum, median and maximum of some numbers; the median is that of a sample if there are very many."""

    least: int
    median: int
    most: int


class Lengths:
    """Numbers in fixed memory: all of them up to 131072, then every second one, then every fourth."""

    def __init__(self) -> None:
        self._kept: array[int] = array("q")
        self._step, self._left = 1, 0
        self._least, self._most = 0, -1

    def add(self, length: int) -> bool:
        """Add one; returns whether it is longer than all before."""
        longer = length > self._most
        self._least = min(self._least, length) if self._most >= 0 else length
        self._most = max(self._most, length)
        if self._left == 0:
            self._kept.append(length)
            if len(self._kept) == _KEPT:
                self._kept = self._kept[::2]
                self._step *= 2
            self._left = self._step
        self._left -= 1
        return longer

    @property
    def spread(self) -> Spread | None:
        """None where there is no number."""
        return Spread(self._least, median_low(self._kept), self._most) if self._kept else None
