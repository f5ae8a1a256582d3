"""Learning-rate schedules: pure functions of a position counted in weight updates.

The first update is at position 1 (ACTV1_SPEC, section 11).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hrm_ray.train.adaptive_lr import AdaptiveLr


@dataclass(frozen=True)
class Schedule:
    """Warm-up to 1 over `warmup_steps`, then `kind` down to `min_ratio` at `total_steps`."""

    kind: str
    warmup_steps: int
    total_steps: int
    min_ratio: float
    wsd_decay_ratio: float

    def factor(self, step: float) -> float:
        """Multiplier of the base rate at position `step`; flat past the end."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return SCHEDULES[self.kind](self, step)

    def progress(self, step: float, start: float) -> float:
        """The share of the way from `start` to the end of the run at `step`, in 0..1."""
        return min(max((step - start) / max(self.total_steps - start, 1), 0.0), 1.0)


def _cosine(schedule: Schedule, step: float) -> float:
    progress = schedule.progress(step, schedule.warmup_steps)
    return schedule.min_ratio + (1 - schedule.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(schedule: Schedule, step: float) -> float:
    return 1 - (1 - schedule.min_ratio) * schedule.progress(step, schedule.warmup_steps)


def _constant(schedule: Schedule, step: float) -> float:
    return 1.0


def _wsd(schedule: Schedule, step: float) -> float:
    """Warm-up, stable, decay: flat, then linear over the last `wsd_decay_ratio` of all updates (arXiv 2404.06395)."""
    start = max(schedule.total_steps * (1 - schedule.wsd_decay_ratio), schedule.warmup_steps)
    return 1 - (1 - schedule.min_ratio) * schedule.progress(step, start)


SCHEDULES: dict[str, Callable[[Schedule, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
}
"""By the name that `--lr-schedule` takes."""


@dataclass(frozen=True)
class LrSchedule:
    """The learning rates of the weights and of the puzzle table, and the factors that both follow."""

    schedule: Schedule
    lr: float
    puzzle_emb_lr: float
    adaptive: AdaptiveLr | None = None

    def factor(self, position: float) -> float:
        """Multiplier of both rates for the update at `position` (see ScheduleClock; the first is at 1)."""
        factor = self.schedule.factor(position)
        return factor if self.adaptive is None else factor * self.adaptive.factor


@dataclass
class ScheduleClock:
    """The schedule's position, in weight updates.

    A run alone counts its applied updates. With `samples_per_update` the clock counts samples instead, so that workers
    of unequal speed, and one that starts late, stand where the samples of all of them have come to.
    """

    position: float = 0
    samples_per_update: float | None = None

    def advance(self, samples: float) -> None:
        """Count one applied update of `samples` samples."""
        self.position += 1 if self.samples_per_update is None else samples / self.samples_per_update
