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
        rest = max(self.total_steps - self.warmup_steps, 1)
        progress = min(max((step - self.warmup_steps) / rest, 0.0), 1.0)
        return SCHEDULES[self.kind](self, progress)


def _cosine(schedule: Schedule, progress: float) -> float:
    return schedule.min_ratio + (1 - schedule.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(schedule: Schedule, progress: float) -> float:
    return 1 - (1 - schedule.min_ratio) * progress


def _constant(schedule: Schedule, progress: float) -> float:
    return 1.0


def _wsd(schedule: Schedule, progress: float) -> float:
    """Warm-up, stable, decay: flat, then linear over the last `wsd_decay_ratio` of the run (arXiv 2404.06395)."""
    if schedule.wsd_decay_ratio == 0:
        return 1.0
    falling = max(progress - (1 - schedule.wsd_decay_ratio), 0.0) / schedule.wsd_decay_ratio
    return 1 - (1 - schedule.min_ratio) * falling


SCHEDULES: dict[str, Callable[[Schedule, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
}
"""By the name that `--lr-schedule` takes."""
