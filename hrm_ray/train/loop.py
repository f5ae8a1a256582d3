"""The training loop's one step: micro-batches, segments, gradients, weight update.

One job: make the gradient of the whole effective batch, exactly, and apply it. Loss is sums and weights until the end:
all denominators of a step are added over micro-batches, segments and ranks before the first forward pass, so the
gradient is that of one large batch however it is split. Logging, evaluation and saving are the runner's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrm_ray.errors import DivergedError, Fault
from hrm_ray.model.objective import AnyObjective, Batch, SegmentOutput
from hrm_ray.train.ema import Ema
from hrm_ray.train.feed import BatchShape, Feed
from hrm_ray.train.microbatch import to_batch
from hrm_ray.train.optimizers import SparseSignSGD
from hrm_ray.train.schedules import Schedule
from hrm_ray.train.strategies.base import Strategy
from hrm_ray.values import StopReason

STOP_REASONS = tuple(StopReason)


@dataclass
class Progress:
    """What has been done: weight updates, batches offered (skipped ones too), updates skipped, in a row and in all."""

    step: int = 0
    batch_idx: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0


@dataclass(frozen=True)
class StepReport:
    """One step as it went: whether the weights moved, the gradient norm before clipping, the denominators' totals."""

    applied: bool
    norm: float
    lr: float
    totals: dict[str, float]
    stop: StopReason | None


@dataclass(frozen=True)
class Rates:
    """Learning rates of the weights and of the puzzle table, and the schedule both follow."""

    schedule: Schedule
    lr: float
    puzzle_emb_lr: float


@dataclass
class LoopParts:
    """Everything the loop works with; put together in assemble.py."""

    strategy: Strategy
    objective: AnyObjective
    feed: Feed
    shape: BatchShape
    rates: Rates
    wanted: frozenset[str]
    carried: bool
    grad_clip: float
    max_bad_steps: int
    sparse: SparseSignSGD | None = None
    ema: Ema | None = None


@dataclass
class MetricTotals:
    """(total, weight) pairs by name since the last flush, as tensors on the device."""

    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, more: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (total, weight) in more.items():
            if name in self.pairs:
                old_total, old_weight = self.pairs[name]
                self.pairs[name] = (old_total + total, old_weight + weight)
            else:
                self.pairs[name] = (total, weight)


class TrainingLoop:
    """Runs steps; owns the carries (one per micro-batch in carried supervision) and the progress."""

    def __init__(self, parts: LoopParts, stop_poll: Callable[[], StopReason | None] = lambda: None) -> None:
        self.parts = parts
        self.stop_poll = stop_poll
        self.progress = Progress()
        self.carries: list[Any] | None = None
        self.metrics = MetricTotals()
        self.world = parts.strategy.world
        # MPS has no float64; token counts of one step are exact in float32 up to 16 million.
        self._count_type = torch.float32 if self.world.device.type == "mps" else torch.float64

    def step(self) -> StepReport | None:
        """One weight update, or a skipped one; None when all epochs are over."""
        parts = self.parts
        number = self.progress.step + 1
        while True:
            batches = self._offered(number)
            carries = self._carries_for(batches)
            totals, stop = self._totals(batches, carries)
            if totals["rows"] > 0:
                break
            if not parts.feed.roll():
                return None
        self.progress.batch_idx += 1
        factor = parts.rates.schedule.factor(number)
        parts.strategy.set_learning_rate(parts.rates.lr * factor)
        metrics = self._passes(batches, carries, totals)
        rows = parts.sparse.gradients(self.world) if parts.sparse is not None else None
        if rows is None or bool(rows[1].isfinite().all()):
            norm = parts.strategy.step(parts.grad_clip)
        else:
            norm = math.nan
            parts.strategy.discard()
        if math.isfinite(norm):
            self._applied(rows, parts.rates.puzzle_emb_lr * factor)
            self.metrics.add(metrics.pairs)
        else:
            self._skipped(number, norm)
        return StepReport(math.isfinite(norm), norm, parts.rates.lr * factor, totals, stop)

    def _offered(self, step: int) -> list[Batch]:
        shape = self.parts.shape
        if self.parts.carried and self.carries is not None:
            halted = [carry.halted.cpu().numpy() for carry in self.carries]
        else:
            halted = [np.ones(shape.batch_size, dtype=np.bool_)] * shape.accumulation
        columns = self.parts.feed.offer(halted, step)
        return [to_batch(micro, self.parts.wanted, self.world.device) for micro in columns]

    def _carries_for(self, batches: list[Batch]) -> list[Any]:
        if self.carries is None or not self.parts.carried:
            carries = [self.parts.objective.initial_carry(batch) for batch in batches]
            if self.parts.carried:
                self.carries = carries
            return carries
        return self.carries

    def _totals(self, batches: list[Batch], carries: list[Any]) -> tuple[dict[str, float], StopReason | None]:
        """All denominators of this step over micro-batches and ranks, and the stop that any rank knows of."""
        shares = [self.parts.objective.weights(batch, carry) for batch, carry in zip(batches, carries, strict=True)]
        names = sorted(shares[0])
        wish = self.stop_poll()
        flags = [float(wish is reason) for reason in STOP_REASONS]
        vector = torch.stack([torch.stack([share[n] for share in shares]).to(self._count_type).sum() for n in names])
        vector = torch.cat((vector, torch.tensor(flags, dtype=self._count_type, device=vector.device)))
        summed = self.parts.strategy.sum_over_ranks(vector).tolist()
        raised = [reason for reason, flag in zip(STOP_REASONS, summed[len(names) :], strict=True) if flag > 0]
        return dict(zip(names, summed, strict=False)), (raised[0] if raised else None)

    def _passes(self, batches: list[Batch], carries: list[Any], totals: dict[str, float]) -> MetricTotals:
        """Forward and backward over every micro-batch and segment; each segment's graph ends with its backward."""
        parts, metrics = self.parts, MetricTotals()
        share = torch.tensor(1.0 / self.world.size, dtype=self._count_type)
        passes = parts.objective.passes_per_step
        for number, batch in enumerate(batches):
            carry = carries[number]
            for index in range(passes):
                last = number == len(batches) - 1 and index == passes - 1
                with parts.strategy.accumulate(last):
                    output = parts.strategy.segment(batch, carry)
                    loss = weighed(output, totals)
                    parts.strategy.backward(loss * self.world.size)
                carry = output.carry
                metrics.add(output.metrics)
                metrics.add({"loss": (loss.detach(), torch.zeros(()))})
            if parts.carried:
                carries[number] = carry
        # Every rank adds its part of the step's loss; the ranks' weights add up to one step.
        metrics.add({"loss": (torch.zeros(()), share)})
        return metrics

    def _applied(self, rows: tuple[Tensor, Tensor] | None, puzzle_emb_lr: float) -> None:
        parts = self.parts
        if parts.sparse is not None and rows is not None:
            parts.sparse.apply(*rows, puzzle_emb_lr)
        if parts.ema is not None:
            parts.ema.update()
        self.progress.step += 1
        self.progress.bad_steps = 0

    def _skipped(self, number: int, norm: float) -> None:
        """Count a step whose gradient was not finite; too many in a row end the run."""
        if self.parts.carried and self.carries is not None:
            self.carries = [self.parts.objective.restarted(carry) for carry in self.carries]
        self.progress.bad_steps += 1
        self.progress.skipped_steps += 1
        if self.progress.bad_steps >= self.parts.max_bad_steps:
            names = self.parts.strategy.non_finite_parameters() or ["the puzzle embedding"]
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise DivergedError(
                Fault(
                    f"gradient norm {norm} at step {number}",
                    f"{self.progress.bad_steps} updates in a row had non-finite gradients, in {shown}",
                    "Lower --lr, lengthen --warmup-steps or set --grad-clip, and resume from the last checkpoint",
                )
            )

    def flush_metrics(self) -> dict[str, float]:
        """Means since the last flush over all ranks; a name whose weight is 0 is left out. A collective."""
        pairs, self.metrics = self.metrics.pairs, MetricTotals()
        if not pairs:
            return {}
        names = sorted(pairs)
        flat = torch.stack([part.to(self.world.device, self._count_type) for name in names for part in pairs[name]])
        summed = self.parts.strategy.sum_over_ranks(flat).view(len(names), 2).tolist()
        return {name: total / weight for name, (total, weight) in zip(names, summed, strict=True) if weight > 0}


def weighed(output: SegmentOutput[Any], totals: dict[str, float]) -> Tensor:
    """The segment's share of the step's loss: each term's sum over its denominator's total."""
    loss: Tensor | None = None
    for term in output.terms:
        total = totals[term.denominator]
        scale = term.coefficient / total if total > 0 else 0.0
        part = term.total * scale
        loss = part if loss is None else loss + part
    assert loss is not None
    return loss
