"""When a run must stop so that it has saved before --max-time is over."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

from hrm_ray.types import StopReason

Part: TypeAlias = Literal["step", "evaluation", "save"]
_KEPT = 5
"""The slowest of so many of the last steps (evaluations, saves) counts."""
_UNKNOWN_SAVE = 0.1
_UNKNOWN_SAVE_S = 10.0
"""A save that was never measured: this share of the time that is left at the start, and at most so many seconds."""
_MARGIN = 1.5
"""Factor on the time of a save: the final weights are written after the last checkpoint."""


class TimeLimit:
    """Measures the parts of a run, and says at the start of a step whether it must be the last.

    `stop_by_s` is in seconds since the epoch, None without a limit.
    """

    def __init__(self, stop_by_s: float | None, clock: Callable[[], float] = lambda: time.time()) -> None:
        self._stop_by_s = stop_by_s
        self._clock = clock
        self._took_s: dict[Part, deque[float]] = {part: deque(maxlen=_KEPT) for part in ("step", "evaluation", "save")}
        self._unknown_save_s = 0.0
        if self._stop_by_s is not None:
            self._unknown_save_s = max(0.0, min(_UNKNOWN_SAVE_S, _UNKNOWN_SAVE * (self._stop_by_s - clock())))
        self.due: tuple[int, int] = (0, 0)
        """Evaluations that this step and the next bring, and saves after this step or still being written."""

    @contextmanager
    def measuring(self, part: Part) -> Iterator[None]:
        """Measure what the block does."""
        begun_s = self._clock()
        yield
        self.measured(part, self._clock() - begun_s)

    def measured(self, part: Part, took_s: float) -> None:
        """Take into account how long a part took."""
        self._took_s[part].append(took_s)

    def poll(self) -> StopReason | None:
        """MAX_TIME where this step, another one and what comes between and after them no longer fit."""
        if self._stop_by_s is None:
            return None
        evaluations, saves = self.due
        save_s = max(self._took_s["save"], default=self._unknown_save_s)
        evaluation_s = max(self._took_s["evaluation"], default=0.0)
        step_s = max(self._took_s["step"], default=0.0)
        needed_s = 2 * step_s + evaluations * evaluation_s + (_MARGIN + saves) * save_s
        return StopReason.MAX_TIME if self._clock() + needed_s >= self._stop_by_s else None
