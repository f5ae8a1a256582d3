"""What an objective is: the module that a strategy wraps, and the values it hands to the loop.

One job: the seam between model and loop (DESIGN, sentence 4). Its forward is one segment; it returns loss *sums* with
the names of their denominators, and the loop divides by totals over micro-batches, segments and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.transformer import Transformer

CarryT = TypeVar("CarryT")

Batch = dict[str, Tensor]
"""Columns of values.py as tensors on the worker's device."""


@dataclass(frozen=True)
class Term:
    """One loss term of a segment: coefficient x (sum over the batch) / (total of the named denominator)."""

    name: str
    total: Tensor
    denominator: str
    coefficient: float = 1.0


@dataclass(frozen=True)
class SegmentOutput(Generic[CarryT]):
    """Result of one segment: terms to descend, the detached carry, and metrics as (total, weight) pairs.

    A metric's total may be a vector, its weight then serves all of it.
    """

    terms: tuple[Term, ...]
    carry: CarryT
    metrics: dict[str, tuple[Tensor, Tensor]]


class Objective(nn.Module, Generic[CarryT]):
    """What the loop asks of an objective; calling it computes one segment.

    `segments_per_step` is how many segments a weight update takes: settings decide it, never data, so that every rank
    runs the same number of passes.
    """

    segments_per_step: int
    model: ActV1 | Transformer

    @property
    def passes_per_step(self) -> int:
        """Calls, each with a backward pass of its own, that a weight update takes of one micro-batch."""
        return self.segments_per_step

    def initial_carry(self, batch: Batch) -> CarryT:
        """The carry before the first segment."""
        raise NotImplementedError

    def weights(self, batch: Batch, carry: CarryT) -> dict[str, Tensor]:
        """Each denominator's share of this micro-batch, all segments of the step together, before any forward.

        `rows` is always there and counts the rows in work; an epoch is over when it is 0 everywhere.
        """
        raise NotImplementedError

    def split_carries(self, carries: list[CarryT], rows: int) -> list[CarryT]:
        """Carries that outlive a step, laid out anew for micro-batches of `rows` rows, in the same order."""
        raise NotImplementedError

    def restarted(self, carry: CarryT) -> CarryT:
        """The carry after a skipped update: what is not finite in it must not spoil the steps to come."""
        return carry

    def forward(self, batch: Batch, carry: CarryT) -> SegmentOutput[CarryT]:
        """One segment."""
        raise NotImplementedError


AnyObjective = Objective[Any]
"""An objective whatever its carry."""
