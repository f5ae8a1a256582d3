"""Learning-rate schedules as pure functions of the weight update's number.

One job: the factor by which base rates are multiplied. The first update is number 1 (ACTV1_SPEC, section 11).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Warm-up to 1 over `warmup_steps`, then `kind` down to `min_ratio` at `total_steps`."""

    kind: str
    warmup_steps: int
    total_steps: int
    min_ratio: float
    wsd_decay_ratio: float

    def factor(self, step: int) -> float:
        """Multiplier of the base rate for update number `step` (from 1); flat past the end."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return SCHEDULES[self.kind](self, step)

    def progress(self, step: int, start: float) -> float:
        """How far `step` is on the way from `start` to the end of the run, in 0..1."""
        return min(max((step - start) / max(self.total_steps - start, 1), 0.0), 1.0)


def _cosine(schedule: Schedule, step: int) -> float:
    progress = schedule.progress(step, schedule.warmup_steps)
    return schedule.min_ratio + (1 - schedule.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(schedule: Schedule, step: int) -> float:
    return 1 - (1 - schedule.min_ratio) * schedule.progress(step, schedule.warmup_steps)


def _constant(schedule: Schedule, step: int) -> float:
    return 1.0


def _wsd(schedule: Schedule, step: int) -> float:
    """Warm-up, stable, decay: flat, then linear over the last `wsd_decay_ratio` of all updates (arXiv 2404.06395)."""
    start = max(schedule.total_steps * (1 - schedule.wsd_decay_ratio), schedule.warmup_steps)
    return 1 - (1 - schedule.min_ratio) * schedule.progress(step, start)


SCHEDULES: dict[str, Callable[[Schedule, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
}
"""By the name that `--lr-schedule` takes."""
