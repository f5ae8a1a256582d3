"""The seam between the loop and how gradients become weight updates on one or many devices.

One job: say what a strategy is. The loop owns accumulation and never counts on a strategy to do it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from hrm_ray.model.objective import AnyObjective, Batch, SegmentOutput
from hrm_ray.train.optimizers import BuildOptimizer
from hrm_ray.train.precision import Precision
from hrm_ray.train.world import World


class Strategy(Protocol):
    """What the loop needs of one way to train."""

    world: World
    precision: Precision

    def prepare(self, objective: AnyObjective, build_optimizer: BuildOptimizer) -> None:
        """Move the objective to the device, wrap it, build the optimizer over its parameters. Called once."""

    def segment(self, batch: Batch, carry: Any) -> SegmentOutput[Any]:
        """One forward pass of the wrapped objective."""

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Round each forward and backward pass; `last` is the step's last of this worker."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`; the loop has scaled it by world size, because ranks are averaged."""

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank; a collective."""

    def reduce(self) -> None:
        """Make the gradients common to all ranks, averaged; called once per step, after every rank's last pass."""

    def step(self, max_norm: float, scale: float) -> float:
        """Take `scale` off the gradients, clip them to `max_norm` (0: not), update if their norm is finite, clear them.

        Returns the norm before clipping. It is the same on every rank, so all update or none does.
        """

    def discard(self) -> None:
        """Clear the gradients without an update; called on all ranks alike."""

    def set_learning_rate(self, lr: float) -> None:
        """For the next update."""

    def non_finite_parameters(self) -> list[str]:
        """Names of the parameters whose gradient was not finite at the last skipped step."""

    def overflowed_parameters(self) -> list[str]:
        """Names of the parameters that the last update took beyond the range of their type."""

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Added over ranks, in place; a collective."""

    def full_weights(self) -> dict[str, Tensor]:
        """All weights and buffers by name, on the leading rank (elsewhere possibly empty); a collective."""

    def save(self, folder: Path) -> None:
        """Write the optimizer's state into a checkpoint folder; called on all ranks."""

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote; called on all ranks."""
