"""The interface between model and training loop: an objective, which is the module that a strategy wraps.

Its forward is one segment. It returns loss *sums* with the names of their denominators; the loop divides them by totals
over micro-batches, segments and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.transformer import Transformer

CarryT = TypeVar("CarryT")

Batch = dict[str, Tensor]
"""Columns (see types.py) as tensors on the worker's device."""


@dataclass(frozen=True)
class Term:
    """One loss term of a segment: coefficient x (sum over the batch) / (total of the named denominator)."""

    name: str
    total: Tensor
    denominator: str
    coefficient: float = 1.0


@dataclass(frozen=True)
class SegmentOutput(Generic[CarryT]):
    """Result of one segment: loss terms, the detached carry, and metrics as (total, weight) pairs.

    A metric's total may be a vector, which then has one weight.
    """

    terms: tuple[Term, ...]
    carry: CarryT
    metrics: dict[str, tuple[Tensor, Tensor]]


class Objective(nn.Module, Generic[CarryT]):
    """Loss of a model; calling it computes one segment.

    `segments_per_step` is the number of segments of a weight update. Settings decide it, never data, so that every rank
    runs the same number of passes.
    """

    segments_per_step: int
    model: ActV1 | Transformer

    @property
    def passes_per_step(self) -> int:
        """Calls per micro-batch and weight update, each with its own backward pass."""
        return self.segments_per_step

    def initial_carry(self, batch: Batch) -> CarryT:
        """The carry before the first segment."""
        raise NotImplementedError

    def weights(self, batch: Batch, carry: CarryT) -> dict[str, Tensor]:
        """This micro-batch's part of each denominator, for all segments of the step; called before any forward.

        `rows` is always present and counts the active rows; an epoch ends when it is 0 on every rank.
        """
        raise NotImplementedError

    def split_carries(self, carries: list[CarryT], rows: int) -> list[CarryT]:
        """Carries that outlive a step, split into micro-batches of `rows` rows, in the same order."""
        raise NotImplementedError

    def restarted(self, carry: CarryT) -> CarryT:
        """The carry after a skipped update, with non-finite states restarted."""
        return carry

    def forward(self, batch: Batch, carry: CarryT) -> SegmentOutput[CarryT]:
        """One segment."""
        raise NotImplementedError


AnyObjective = Objective[Any]
"""An objective whatever its carry."""


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
