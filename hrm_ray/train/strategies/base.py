"""The interface of a training strategy, which owns the parameters and turns gradients into weight updates.

A strategy holds the objective, the optimizer and the moving average, whole or as shards, and while a run trains it
alone reads or writes parameters, with these exceptions: the loop updates the rows of a puzzle table (`SparseSignSGD`),
AdaLoRA masks ranks after an update, and adapters are merged inside `evaluating`. `assemble` fills in the first weights
before it calls `prepare`. The loop owns accumulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from hrm_ray.model.objective import AnyObjective, Batch, SegmentOutput
from hrm_ray.train.optimizers import BuildOptimizer
from hrm_ray.train.precision import Precision
from hrm_ray.train.world import World


class Strategy(Protocol):
    """One way to train on one or several devices."""

    world: World
    precision: Precision
    retries_passes: bool
    """Whether a step's passes may be repeated after one of them ran out of memory: not where a pass contains
    collectives, which would leave other ranks waiting."""
    updates_float32_weights: bool
    """Whether the optimizer updates float32 weights where those of the model have 16 bits."""

    def prepare(self, objective: AnyObjective, build_optimizer: BuildOptimizer, ema_decay: float | None = None) -> None:
        """Move the objective to the device, wrap it, build the optimizer over its parameters and, with `ema_decay`,
        their moving average. Called once, when the objective has its first weights."""

    def segment(self, batch: Batch, carry: Any) -> SegmentOutput[Any]:
        """One forward pass of the wrapped objective."""

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """The context of each forward and backward pass; `last`: the last pass of the step on this worker."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, which the loop has multiplied by world size, because ranks are averaged."""

    def reduce(self, failed: bool) -> bool:
        """Average the gradients over ranks; called after every rank's last pass, also where a pass ran out of memory on
        this rank (`failed`). Returns whether it did on any rank: then the gradients are of no use. A collective."""

    def step(self, max_norm: float, scale: float) -> float:
        """Divide the gradients by `scale`, clip them to `max_norm` (0: no clipping), update weights and moving average
        if their norm is finite, clear the gradients.

        Returns the norm before clipping. The norm is the same on every rank, so all ranks update or none does.
        """

    def discard(self) -> None:
        """Clear the gradients without an update; called on all ranks alike."""

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next update."""

    def non_finite_parameters(self) -> list[str]:
        """Names of the parameters whose gradient was not finite at the last skipped step."""

    def overflowed_parameters(self) -> list[str]:
        """Names of the parameters that the last update made infinite in their type."""

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over ranks, in place; a collective."""

    def evaluating(self) -> AbstractContextManager[AnyObjective]:
        """The objective to evaluate, with the moving average as its weights where one is kept; a collective.

        Inside the context `full_weights` gives those weights, and on the leading rank the objective's model holds them
        whole, for code that reads it, such as merging adapters. After it the weights are the trained ones, to the bit.
        """

    def full_weights(self) -> dict[str, Tensor]:
        """All weights and buffers by name, on the leading rank (elsewhere possibly empty); a collective."""

    def state_files(self) -> dict[str, Mapping[str, Tensor]]:
        """The weights, optimizer state and moving average of a checkpoint: tensors by name in files by name, on the
        leading rank (elsewhere possibly none); a collective.

        Tensors may be those that are trained: the next update changes them.
        """

    def load(self, folder: Path) -> None:
        """Restore the files of `state_files` from a checkpoint's folder; called on all ranks."""
