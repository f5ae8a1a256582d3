"""The adaptive learning rate: a factor on the schedule that falls when the loss stops falling or diverges.

The factor never rises, so the schedule stays an upper bound. Like PyTorch's `ReduceLROnPlateau`, but windows are
counted in weight updates and their mean loss is that of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hrm_ray.settings.adaptive_lr import AdaptiveLrSettings


@dataclass(frozen=True)
class Trend:
    """The current factor, the best window's loss since the last change, the number of windows since then without
    improvement (`waited`), and the windows left of the cool-down (`cooling`)."""

    factor: float = 1.0
    best: float | None = None
    waited: int = 0
    cooling: int = 0


@dataclass(frozen=True)
class Action:
    """The decision after one window, and the reason as text."""

    kind: Literal["hold", "lower", "step_back"]
    reason: str


def judge(rule: AdaptiveLrSettings, trend: Trend, loss: float) -> tuple[Trend, Action]:
    """The trend after one more window of mean loss `loss`, and the action to take.

    Checked in this order: a window of the cool-down is only counted. A loss that is not finite, or more than
    `divergence_rise` above the best, is divergence: the factor is multiplied by `divergence_factor`. A loss at least
    `min_improvement` below the best is the new best. `plateau_windows` other windows in a row are a plateau: the factor
    is multiplied by `plateau_factor`. Each change starts the cool-down and a new trend. The factor stays above
    `min_factor`.
    """
    if trend.cooling > 0:
        return replace(trend, cooling=trend.cooling - 1), Action("hold", "the last change is settling")
    best = trend.best
    if not math.isfinite(loss):
        return _changed(rule, trend, "step_back", f"the mean loss is {loss}")
    if best is None:
        return replace(trend, best=loss, waited=0), Action("hold", f"the first window, with mean loss {loss:.6g}")
    if loss > best + rule.divergence_rise * abs(best):
        return _changed(rule, trend, "step_back", f"the mean loss rose to {loss:.6g} from {best:.6g}")
    if loss <= best - rule.min_improvement * abs(best) and loss < best:
        return replace(trend, best=loss, waited=0), Action("hold", f"the mean loss fell to {loss:.6g} from {best:.6g}")
    waited = trend.waited + 1
    if waited < rule.plateau_windows:
        reason = f"the mean loss {loss:.6g} is no better than {best:.6g} for {waited} window(s)"
        return replace(trend, waited=waited), Action("hold", reason)
    return _changed(rule, trend, "lower", f"{waited} window(s) brought nothing better than a mean loss of {best:.6g}")


def _changed(
    rule: AdaptiveLrSettings, trend: Trend, kind: Literal["lower", "step_back"], why: str
) -> tuple[Trend, Action]:
    cut = rule.plateau_factor if kind == "lower" else rule.divergence_factor
    factor = max(trend.factor * cut, rule.min_factor)
    anew = Trend(factor=factor, cooling=rule.cooldown_windows)
    if factor >= trend.factor:
        return replace(anew, factor=trend.factor), Action("hold", f"{why}, and the factor is at its minimum already")
    at_minimum = ", its minimum" if factor == rule.min_factor else ""
    return anew, Action(kind, f"{why}: {factor:.6g} of the schedule's from now on{at_minimum}")


class AdaptiveLr:
    """The adaptive learning rate of one run: sums losses over a window and judges it, alike on all ranks."""

    def __init__(self, rule: AdaptiveLrSettings, warmup_steps: int) -> None:
        self.rule = rule
        self.warmup_steps = warmup_steps
        self.trend = Trend()
        self._steps = 0
        self._loss: Tensor | None = None

    @property
    def factor(self) -> float:
        """Multiplier of the schedule's learning rate, in (0, 1]."""
        return self.trend.factor

    def observe(self, position: float, loss: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Action | None:
        """Take in this rank's part of the loss of the update at `position`; parts of all ranks add up to the whole.

        Gives the action at the end of a window, whose sum is the only collective, and None else. Updates of the warm-up
        are left out: their learning rate says nothing of the one to be controlled. `loss` is a scalar in float64 where
        the device has it.
        """
        if position <= self.warmup_steps:
            return None
        self._loss = loss.clone() if self._loss is None else self._loss + loss
        self._steps += 1
        if self._steps < self.rule.window_steps:
            return None
        mean = float(sum_over_ranks(self._loss)) / self._steps
        self._steps, self._loss = 0, None
        self.trend, action = judge(self.rule, self.trend, mean)
        return action

    def state(self, sum_over_ranks: Callable[[Tensor], Tensor], leads: bool) -> dict[str, Any]:
        """JSON values for a checkpoint; a collective."""
        if self._loss is None:
            return {**asdict(self.trend), "window_steps": 0, "window_loss": 0.0}
        # Rank 0 keeps the sum over ranks from here on, as after a resume with any number of ranks.
        total = sum_over_ranks(self._loss)
        self._loss = total if leads else torch.zeros_like(total)
        return {**asdict(self.trend), "window_steps": self._steps, "window_loss": float(total)}

    def load(self, state: dict[str, Any], leads: bool, zero: Tensor) -> None:
        """Restore what `state` gave, on all ranks; `zero` is a scalar of the dtype and device that `observe` gets."""
        trend = dict(state)
        self._steps, window_loss = trend.pop("window_steps"), trend.pop("window_loss")
        self.trend = Trend(**trend)
        self._loss = None if self._steps == 0 else zero + (window_loss if leads else 0.0)
