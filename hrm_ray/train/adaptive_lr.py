"""Learning-rate control from the loss trend: plateau lowers, stable holds, divergence steps back.

One job: a pure rule from (state, a window's mean loss) to (new state, what to do), and the window that feeds it. The
factor it keeps multiplies the schedule's; it never rises, so the schedule stays an upper bound. The idea of the plateau
is PyTorch's `ReduceLROnPlateau`; here windows are counted in weight updates and hold all ranks' losses.
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
    """What is known of the loss: the factor in force, the best window since the last change, windows since without a
    better one, and windows still to pass before the next is judged."""

    factor: float = 1.0
    best: float | None = None
    waited: int = 0
    cooling: int = 0


@dataclass(frozen=True)
class Action:
    """What one window led to, and why, in a person's words."""

    kind: Literal["hold", "lower", "step_back"]
    reason: str


def judge(rule: AdaptiveLrSettings, trend: Trend, loss: float) -> tuple[Trend, Action]:
    """The trend after one more window of mean loss `loss`, and what to do.

    In this order: a window of the cool-down is only counted. A loss that is not finite, or more than `divergence_rise`
    above the best, is divergence: the factor goes back by `divergence_factor`. A loss at least `min_improvement` below
    the best is stable: it is the new best. `plateau_windows` others in a row are a plateau: the factor is lowered by
    `plateau_factor`. After either change the cool-down begins and the trend is judged anew. At `min_factor` the factor
    stays.
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
    """The control of one run: gathers each rank's losses and judges every whole window, on all ranks alike."""

    def __init__(self, rule: AdaptiveLrSettings, warmup_steps: int) -> None:
        self.rule = rule
        self.warmup_steps = warmup_steps
        self.trend = Trend()
        self._steps = 0
        self._loss: Tensor | None = None

    @property
    def factor(self) -> float:
        """What the schedule's learning rate is multiplied by, in (0, 1]."""
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
        """For a checkpoint, as JSON holds it; a collective.

        The window begun is summed over ranks and goes on on the leading one, so that any number of ranks can take it up
        and the run that goes on here takes the same numbers.
        """
        if self._loss is None:
            return {**asdict(self.trend), "window_steps": 0, "window_loss": 0.0}
        total = sum_over_ranks(self._loss)
        self._loss = total if leads else torch.zeros_like(total)
        return {**asdict(self.trend), "window_steps": self._steps, "window_loss": float(total)}

    def load(self, state: dict[str, Any], leads: bool, zero: Tensor) -> None:
        """Take up what `state` gave, on all ranks; `zero` is a scalar of the type and device that `observe` gets."""
        known = dict(state)
        self._steps = known.pop("window_steps")
        begun = known.pop("window_loss")
        self.trend = Trend(**known)
        self._loss = None if self._steps == 0 else zero + (begun if leads else 0.0)
