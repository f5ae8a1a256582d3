"""A time limit for reading."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

Clock: TypeAlias = Callable[[], float]


class TimeUp(Exception):
    """Ends reading in the middle of a row. Whoever passes a timer to a reader catches it."""


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
