"""A loss of the weights alone, beside an objective's losses of the data.

One job: add it to every pass so that a weight update has it once, however its rows are cut over micro-batches, passes
and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hrm_ray.model.objective import AnyObjective, SegmentOutput, Term


@dataclass(frozen=True)
class Regulariser:
    """`coefficient` times the scalar that `loss` gives, called `name` in the metrics; `metrics` adds numbers to look
    at."""

    name: str
    coefficient: float
    loss: Callable[[], Tensor]
    metrics: Callable[[], dict[str, Tensor]]


def regularise(objective: AnyObjective, regulariser: Regulariser) -> None:
    """Let every call of `objective` give out the regulariser's term too.

    It weighs as much in a pass as the pass has of the step's rows, and these are counted anyway: so all of them
    together make one, also after the micro-batches have been cut smaller.
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
