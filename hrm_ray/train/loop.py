"""The training loop's one step: micro-batches, segments, gradients, weight update.

One job: make the gradient of the whole effective batch, exactly, and apply it. Loss is sums and weights until the end:
all denominators of a step are added over micro-batches, segments and ranks before the first forward pass, so the
gradient is that of one large batch however it is split. Where memory runs out, all ranks cut their micro-batches
smaller and do the step again, with the same rows. Logging, evaluation and saving are the runner's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrm_ray.bundle.progress import Progress
from hrm_ray.errors import DivergedError, Fault
from hrm_ray.model.objective import AnyObjective, Batch, SegmentOutput
from hrm_ray.model.transforms.peft import Adapters
from hrm_ray.train.adaptive_lr import Action, AdaptiveLr
from hrm_ray.train.loaders import BatchLoader, BatchSize
from hrm_ray.train.microbatch import to_batch
from hrm_ray.train.optimizers import SparseSignSGD
from hrm_ray.train.out_of_memory import halved, is_out_of_memory, release, split_microbatches, too_large
from hrm_ray.train.precision import LossScaler
from hrm_ray.train.randomness import seed_step
from hrm_ray.train.schedules import Schedule
from hrm_ray.train.strategies.base import Strategy
from hrm_ray.types import Columns, StopReason

STOP_REASONS = tuple(StopReason)


@dataclass(frozen=True)
class StepReport:
    """One step as it went: whether the weights moved, the gradient norm before clipping, the denominators' totals."""

    applied: bool
    norm: float
    lr: float
    totals: dict[str, float]
    stop: StopReason | None
    new_batch_size: BatchSize | None
    """How rows are cut from this step on, where memory ran out."""
    adapted: Action | None
    """What the control of the learning rate decided, where a window of it ended with this step."""


@dataclass(frozen=True)
class LrSchedule:
    """Learning rates of the weights and of the puzzle table, and what both follow: the schedule, and the control."""

    schedule: Schedule
    lr: float
    puzzle_emb_lr: float
    adaptive: AdaptiveLr | None = None

    def factor(self, step: int) -> float:
        """Multiplier of both rates for update number `step` (from 1)."""
        factor = self.schedule.factor(step)
        return factor if self.adaptive is None else factor * self.adaptive.factor


@dataclass
class TrainState:
    """Everything the loop works with; put together in assemble.py."""

    strategy: Strategy
    objective: AnyObjective
    loader: BatchLoader
    shape: BatchSize
    lr_schedule: LrSchedule
    wanted: frozenset[str]
    carried: bool
    grad_clip: float
    max_bad_steps: int
    sparse: SparseSignSGD | None = None
    scaler: LossScaler | None = None
    adapters: Adapters | None = None
    seed: int = 0


@dataclass
class MetricTotals:
    """(total, weight) pairs by name since the last flush, as tensors on the device; a total may be a vector."""

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

    def __init__(self, parts: TrainState, stop_poll: Callable[[], StopReason | None] = lambda: None) -> None:
        self.parts = parts
        self.asked_batch_size = parts.shape.batch_size
        self.stop_poll = stop_poll
        self.progress = Progress()
        self.carries: list[Any] | None = None
        self.metrics = MetricTotals()
        self.trained = False
        """Whether rows were trained on since this loop was made."""
        self.world = parts.strategy.world
        # What is summed over steps and ranks. MPS has no float64; counts are exact in float32 up to 16 million.
        self.count_type = torch.float32 if self.world.device.type == "mps" else torch.float64

    def step(self) -> StepReport | None:
        """One weight update, or a skipped one; None when all epochs are over."""
        try:
            return self._step()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # Some weights may have moved already: there is no step to do again, and a smaller batch would not help.
            where = f"step {self.progress.step + 1}"
            raise too_large(where, "beside the passes, where no smaller batch saves any") from error

    def _step(self) -> StepReport | None:
        parts = self.parts
        number = self.progress.step + 1
        while True:
            columns = self._offered(number)
            totals, stop = self._totals(columns)
            if totals["rows"] > 0:
                break
            if not parts.loader.start_epoch(self.trained):
                return None
        self.trained = True
        self.progress.batch_idx += 1
        factor = parts.lr_schedule.factor(number)
        parts.strategy.set_learning_rate(parts.lr_schedule.lr * factor)
        metrics, new_batch_size = self._passes_that_fit(columns, totals, number)
        parts.strategy.reduce()
        rows = parts.sparse.gradients(self.world) if parts.sparse is not None else None
        if rows is None or bool(rows[1].isfinite().all()):
            norm = parts.strategy.step(parts.grad_clip, parts.scaler.scale if parts.scaler is not None else 1.0)
        else:
            norm = math.nan
            parts.strategy.discard()
        adapted: Action | None = None
        if math.isfinite(norm):
            self._check_range(number)
            self._applied(rows, parts.lr_schedule.puzzle_emb_lr * factor)
            adapted = self._observed(number, metrics)
            self.metrics.add(metrics.pairs)
        else:
            self._skipped(number, norm)
        return StepReport(
            math.isfinite(norm), norm, parts.lr_schedule.lr * factor, totals, stop, new_batch_size, adapted
        )

    def _offered(self, step: int) -> list[Columns]:
        shape = self.parts.shape
        if self.parts.carried and self.carries is not None:
            halted = [carry.halted.cpu().numpy() for carry in self.carries]
        else:
            halted = [np.ones(shape.batch_size, dtype=np.bool_)] * shape.accumulation
        return self.parts.loader.next_batch(halted, step)

    def _on_device(self, columns: list[Columns]) -> list[Batch]:
        return [to_batch(micro, self.parts.wanted, self.world.device) for micro in columns]

    def _carry_for(self, number: int, batch: Batch) -> Any:
        """The carry that a micro-batch begins the step with."""
        if self.carries is None or not self.parts.carried:
            return self.parts.objective.initial_carry(batch)
        return self.carries[number]

    def _totals(self, columns: list[Columns]) -> tuple[dict[str, float], StopReason | None]:
        """All denominators of this step over micro-batches and ranks, and the stop that any rank knows of."""
        batches = self._on_device(columns)
        shares = [
            self.parts.objective.weights(batch, self._carry_for(number, batch)) for number, batch in enumerate(batches)
        ]
        names = sorted(shares[0])
        wish = self.stop_poll()
        flags = [float(wish is reason) for reason in STOP_REASONS]
        vector = torch.stack([torch.stack([share[n] for share in shares]).to(self.count_type).sum() for n in names])
        vector = torch.cat((vector, torch.tensor(flags, dtype=self.count_type, device=vector.device)))
        summed = self.parts.strategy.sum_over_ranks(vector).tolist()
        raised = [reason for reason, flag in zip(STOP_REASONS, summed[len(names) :], strict=True) if flag > 0]
        return dict(zip(names, summed, strict=False)), (raised[0] if raised else None)

    def _passes_that_fit(
        self, columns: list[Columns], totals: dict[str, float], number: int
    ) -> tuple[MetricTotals, BatchSize | None]:
        """All passes of a step, its rows cut as small as memory demands; the new cut, if there is one.

        The denominators are sums over rows, so they hold for every cut.
        """
        parts = self.parts
        cut: BatchSize | None = None
        while True:
            done = self._tried(columns, totals)
            if not parts.strategy.any_rank(done is None):
                assert done is not None
                metrics, carries = done
                if parts.carried:
                    self.carries = carries
                return metrics, cut
            rows = halved(parts.shape.batch_size)
            if rows is None:
                raise too_large(f"step {number}", "with a micro-batch of 1")
            parts.strategy.discard()
            if parts.sparse is not None:
                parts.sparse.forget()
            columns, cut = split_microbatches(columns, rows), self.set_microbatch(rows)

    def set_microbatch(self, rows: int) -> BatchSize:
        """Cut this rank's rows into micro-batches of `rows` from now on; the effective batch stays as it is."""
        parts = self.parts
        parts.shape = parts.shape.with_batch(rows)
        parts.loader.set_microbatch(parts.shape)
        if parts.carried and self.carries is not None:
            self.carries = parts.objective.split_carries(self.carries, rows)
        return parts.shape

    def _tried(self, columns: list[Columns], totals: dict[str, float]) -> tuple[MetricTotals, list[Any]] | None:
        """`passes`, or None where memory ran out in one of them."""
        try:
            return self.passes(self._on_device(columns), totals)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        release(self.world.device)
        return None

    def passes(self, batches: list[Batch], totals: dict[str, float]) -> tuple[MetricTotals, list[Any]]:
        """Forward and backward over every micro-batch and pass; each pass's graph ends with its backward.

        Gives the metrics and the new carries; nothing but gradients has changed if it raises.
        """
        parts, metrics = self.parts, MetricTotals()
        seed_step(parts.seed, self.progress.batch_idx, self.world.rank)
        carries: list[Any] = []
        scale = self.world.size * (parts.scaler.scale if parts.scaler is not None else 1.0)
        share = torch.tensor(1.0 / self.world.size, dtype=self.count_type)
        passes = parts.objective.passes_per_step
        for number, batch in enumerate(batches):
            carry = self._carry_for(number, batch)
            for index in range(passes):
                last = number == len(batches) - 1 and index == passes - 1
                with parts.strategy.accumulate(last):
                    carry = self._pass(batch, carry, totals, scale, metrics)
            if parts.carried:
                carries.append(carry)
        # Every rank adds its part of the step's loss; the ranks' weights add up to one step.
        metrics.add({"loss": (torch.zeros(()), share)})
        return metrics, carries

    def _pass(self, batch: Batch, carry: Any, totals: dict[str, float], scale: float, metrics: MetricTotals) -> Any:
        """One forward and backward; gives the new carry.

        A function of its own, so that nothing of the pass outlives it: its graph, though spent, holds on to what the
        layers were told, such as the keys and values of a whole row in chunks.
        """
        output = self.parts.strategy.segment(batch, carry)
        loss = weighed(output, totals)
        self.parts.strategy.backward(loss * scale)
        metrics.add(output.metrics)
        metrics.add({"loss": (loss.detach(), torch.zeros(()))})
        return output.carry

    def _applied(self, rows: tuple[Tensor, Tensor] | None, puzzle_emb_lr: float) -> None:
        parts = self.parts
        if parts.sparse is not None and rows is not None:
            parts.sparse.apply(*rows, puzzle_emb_lr)
        if parts.scaler is not None:
            parts.scaler.stepped()
        self.progress.step += 1
        self.progress.bad_steps = 0

    def _check_range(self, number: int) -> None:
        """Weights that the update has made infinite are beyond repair, on every rank: the run ends before any use of
        them. Raises DivergedError."""
        names = self.parts.strategy.overflowed_parameters()
        if names:
            reason = f"the update took them beyond 65504, the largest float16 number, in {_first_of(names)}"
            hint = "Resume from the last checkpoint with a lower --lr, or start anew with --model-dtype bf16"
            raise DivergedError(Fault(f"float16 weights at step {number}", reason, hint))

    def _observed(self, number: int, metrics: MetricTotals) -> Action | None:
        """Let the control of the learning rate see this step's loss."""
        if self.parts.lr_schedule.adaptive is None:
            return None
        loss = metrics.pairs["loss"][0].to(self.world.device, self.count_type)
        return self.parts.lr_schedule.adaptive.observe(number, loss, self.parts.strategy.sum_over_ranks)

    def _skipped(self, number: int, norm: float) -> None:
        """Count a step whose gradient was not finite; too many in a row end the run."""
        if self.parts.carried and self.carries is not None:
            self.carries = [self.parts.objective.restarted(carry) for carry in self.carries]
        self.progress.skipped_steps += 1
        if self.parts.scaler is not None and self.parts.scaler.overflowed():
            # A scale that was too large is no sign of divergence; the next one is half of it.
            return
        self.progress.bad_steps += 1
        if self.progress.bad_steps >= self.parts.max_bad_steps:
            names = self.parts.strategy.non_finite_parameters() or ["the puzzle embedding"]
            raise DivergedError(
                Fault(
                    f"gradient norm {norm} at step {number}",
                    f"{self.progress.bad_steps} updates in a row had non-finite gradients, in {_first_of(names)}",
                    "Lower --lr, lengthen --warmup-steps or set --grad-clip, and resume from the last checkpoint",
                )
            )

    def flush_metrics(self) -> dict[str, float]:
        """Means since the last flush over all ranks; a name whose weight is 0 is left out. A collective.

        The values of a vector are told one by one, as name_0, name_1 and so on.
        """
        pairs, self.metrics = self.metrics.pairs, MetricTotals()
        if not pairs:
            return {}
        names = sorted(pairs)
        flat = [part.to(self.world.device, self.count_type).view(-1) for name in names for part in pairs[name]]
        summed = iter(self.parts.strategy.sum_over_ranks(torch.cat(flat)).tolist())
        means: dict[str, float] = {}
        for name in names:
            total = pairs[name][0]
            values, weight = [next(summed) for _ in range(total.numel())], next(summed)
            if weight > 0:
                of = [name] if total.dim() == 0 else [f"{name}_{number}" for number in range(len(values))]
                means |= {one: value / weight for one, value in zip(of, values, strict=True)}
        return means


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
