"""Regularisation: a loss of the weights alone, added to the losses of an objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hrm_ray.model.objective import AnyObjective, SegmentOutput, Term


@dataclass(frozen=True)
class Regulariser:
    """A loss, `coefficient` times the scalar that `loss` returns, called `name` in the metrics; `metrics` gives more
    numbers to log."""

    name: str
    coefficient: float
    loss: Callable[[], Tensor]
    metrics: Callable[[], dict[str, Tensor]]


def regularise(objective: AnyObjective, regulariser: Regulariser) -> None:
    """Let every call of `objective` return the regulariser's term too.

    The term of a pass is weighted by the pass's share of the step's rows: the passes of a weight update add up to the
    loss once, however its rows are split over micro-batches, passes and ranks.
    """

    def with_term(called: Any, given: tuple[Any, ...], output: SegmentOutput[Any]) -> SegmentOutput[Any]:
        batch, carry = given
        rows = objective.weights(batch, carry)["rows"] / objective.passes_per_step
        loss = regulariser.loss()
        term = Term(regulariser.name, loss * rows, "rows", regulariser.coefficient)
        numbers = {regulariser.name: loss.detach(), **regulariser.metrics()}
        metrics = {name: (number, number.new_ones(())) for name, number in numbers.items()}
        return replace(output, terms=(*output.terms, term), metrics=output.metrics | metrics)

    objective.register_forward_hook(with_term)
