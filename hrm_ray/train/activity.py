"""What a worker does at present, and when it last made progress: marked by the thread that trains, read by another."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

Phase: TypeAlias = Literal["starting", "first step", "data", "step", "records", "evaluation", "checkpoint", "ending"]
"""`data` is the wait for a batch, within a step; `records` is between a step and the next."""
_KEPT_STEPS = 31


class Activity:
    """A mark costs under a microsecond. Each attribute is replaced as a whole, so a reader needs no lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.phase: Phase = "starting"
        self.step = 0
        """The weight update that is being made, or was made last."""
        self.marks = 0
        """Increases with each progress."""
        self.progress_s = clock()
        """When the last progress was made, by the clock."""
        self.longest_s: dict[Phase, float] = {}
        """The longest time without progress within a phase that was left at least once."""
        self._gap_s = 0.0
        self._steps_s: deque[float] = deque(maxlen=_KEPT_STEPS)

    def progressed(self) -> None:
        """Mark progress within the present phase."""
        now_s = self._clock()
        self._gap_s = max(self._gap_s, now_s - self.progress_s)
        self.progress_s = now_s
        self.marks += 1

    def enter(self, phase: Phase) -> None:
        """Mark progress, and that `phase` begins."""
        self.progressed()
        self.longest_s[self.phase] = max(self._gap_s, self.longest_s.get(self.phase, 0.0))
        self._gap_s = 0.0
        self.phase = phase

    @contextmanager
    def doing(self, phase: Phase, then: Phase | None = None) -> Iterator[None]:
        """Inside is `phase`; after it `then`, or the phase that was before."""
        begun_s, before = self._clock(), self.phase
        self.enter(phase)
        yield
        self.enter(then or before)
        if phase == "step":
            self._steps_s.append(self.progress_s - begun_s)

    def lasted(self, phase: Phase, longest_s: float | None) -> None:
        """Set the longest time of a phase of which this thread does a part alone; None: not known."""
        if longest_s is None:
            self.longest_s.pop(phase, None)
        else:
            self.longest_s[phase] = longest_s

    @property
    def idle_s(self) -> float:
        """Seconds since the last progress."""
        return self._clock() - self.progress_s

    @property
    def step_s(self) -> float | None:
        """The median time of the last steps, the first one left out; None before the second step."""
        taken_s = tuple(self._steps_s)
        return statistics.median(taken_s) if taken_s else None
