"""One training step: micro-batches, segments, gradients, weight update.

The gradient is exactly that of the whole effective batch. Loss is sums and weights until the end: all denominators of a
step are summed over micro-batches, segments and ranks before the first forward pass. Where memory runs out, all ranks
split their rows into smaller micro-batches and repeat the passes. Logging, evaluation and saving are the Trainer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrm_ray.bundle.progress import Progress
from hrm_ray.errors import DivergedError, Fault
from hrm_ray.model.dropout import COLUMN, key_of, row_keys
from hrm_ray.model.objective import AnyObjective, Batch, SegmentOutput
from hrm_ray.model.transforms.compile import CompiledCalls
from hrm_ray.model.transforms.peft import Adapters
from hrm_ray.train.activity import Activity
from hrm_ray.train.adaptive_lr import Action
from hrm_ray.train.loaders import BatchLoader, BatchSize
from hrm_ray.train.microbatch import to_batch
from hrm_ray.train.optimizers import SparseSignSGD
from hrm_ray.train.out_of_memory import (
    is_out_of_memory,
    needs_restart,
    reading_data,
    split_microbatches,
    too_large,
    unless_out_of_memory,
)
from hrm_ray.train.plan import halved
from hrm_ray.train.precision import LossScaler
from hrm_ray.train.schedules import LrSchedule, ScheduleClock
from hrm_ray.train.strategies.base import Strategy
from hrm_ray.types import Columns, StopReason, StopRequested

STOP_REASONS = tuple(StopReason)
"""A resize comes last: any other stop goes before it."""
SAMPLES = "samples"
"""Beside the denominators of a step: samples that its batch took from the data."""
WRITTEN = "checkpoints written"
"""Beside them too: checkpoints that were written in the background, and wait to be put in their place."""


@dataclass(frozen=True)
class StepReport:
    """The result of one step.

    `applied` is False for a skipped update (non-finite gradients); `norm` is the gradient norm before clipping;
    `totals` are the denominators over all micro-batches and ranks, with SAMPLES and WRITTEN.
    """

    applied: bool
    norm: float
    lr: float
    totals: dict[str, float]
    stop: StopReason | None
    """A stop requested before the passes of the step; with one rank, also during them."""
    new_batch_size: BatchSize | None
    """The smaller micro-batches used from this step on, where memory ran out."""
    adapted: Action | None
    """The adaptive learning rate's decision, where one of its windows ended with this step."""


@dataclass
class StepTotals:
    """The step's denominators (and SAMPLES) over micro-batches and ranks, and a stop that any rank requests.

    A CPU adds them over ranks while the step's first forward pass runs, which needs none: ranks that enter the step one
    after the other do not wait for each other twice in it. `own_rows` are this rank's; 0 on a GPU, where the sum is
    waited for at once.
    """

    names: list[str]
    own_rows: float
    summed: Callable[[], Tensor]

    @cached_property
    def _values(self) -> list[float]:
        values: list[float] = self.summed().tolist()
        return values

    @cached_property
    def sums(self) -> dict[str, float]:
        """The total of each name."""
        return dict(zip(self.names, self._values, strict=False))

    @property
    def stop(self) -> StopReason | None:
        """The stop that a rank requested when it entered the step."""
        return raised_stop(self._values[len(self.names) :])


@dataclass
class TrainState:
    """Everything the loop works with; built in assemble.py."""

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
    compiled: CompiledCalls | None = None
    seed: int = 0
    draws: bool = False
    """Whether the passes draw random numbers (dropout of blocks or of adapters)."""


@dataclass
class MetricTotals:
    """(total, weight) pairs by name since the last flush, as device tensors; a total may be a vector."""

    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, more: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (total, weight) in more.items():
            if name in self.pairs:
                old_total, old_weight = self.pairs[name]
                self.pairs[name] = (old_total + total, old_weight + weight)
            else:
                self.pairs[name] = (total, weight)


class TrainingLoop:
    """Runs steps. Owns the carries (in carried supervision one per micro-batch), the progress and the schedule's
    clock."""

    def __init__(self, parts: TrainState, stop_poll: Callable[[], StopReason | None] = lambda: None) -> None:
        self.parts = parts
        self.asked_batch_size = parts.shape.batch_size
        self.stop_poll = stop_poll
        self.written_poll: Callable[[], bool] = lambda: False
        """Whether this rank has written a checkpoint in the background: all ranks learn of it with the next totals."""
        self.activity = Activity()
        self.progress = Progress()
        self.clock = ScheduleClock()
        self.epoch_rows: tuple[int, int] | None = None
        """Rows of the first epoch and of a later one, counted at an epoch's end; None while they are estimates."""
        self.carries: list[Any] | None = None
        self.metrics = MetricTotals()
        self.trained = False
        """Whether this loop has taken any rows."""
        self.world = parts.strategy.world
        # For sums over steps and ranks. MPS has no float64; counts are exact in float32 up to 16 million.
        self.count_type = torch.float32 if self.world.device.type == "mps" else torch.float64

    def step(self) -> StepReport | None:
        """One weight update, applied or skipped; None when all epochs are over.

        Raises StopRequested, with nothing of the step taken, where a stop comes before the step has its batch.
        """
        parts = self.parts
        number = self.progress.step + 1
        if not self.trained:
            # Later steps learn of a stop from the totals of the step before; the first batch can take long to read.
            self.leave_if_stopped()
        while True:
            columns = self._next_batch(number)
            with self._outside_passes(number):
                step_totals = self._totals(columns)
                if step_totals.own_rows > 0 or step_totals.sums["rows"] > 0:
                    break
            if not parts.loader.start_epoch(self.trained):
                return None
        self.trained = True
        self.progress.batch_idx += 1
        factor = parts.lr_schedule.factor(self.clock.position + 1)
        parts.strategy.set_learning_rate(parts.lr_schedule.lr * factor)
        metrics, new_batch_size = self._passes_that_fit(columns, step_totals, number)
        totals, stop = step_totals.sums, step_totals.stop
        adapted: Action | None = None
        with self._outside_passes(number):
            rows = parts.sparse.gradients(self.world) if parts.sparse is not None else None
            if rows is None or bool(rows[1].isfinite().all()):
                norm = parts.strategy.step(parts.grad_clip, parts.scaler.scale if parts.scaler is not None else 1.0)
            else:
                norm = math.nan
                parts.strategy.discard()
            applied = math.isfinite(norm)
            if applied:
                self._check_range(number)
                self._update_applied(rows, parts.lr_schedule.puzzle_emb_lr * factor, totals[SAMPLES])
                adapted = self._observed(metrics)
                self.metrics.add(metrics.pairs)
            else:
                self._update_skipped(number, norm, totals[SAMPLES])
        if self.world.size == 1:
            stop = stop or self.stop_poll()  # not a collective: other ranks would not know of it
        return StepReport(applied, norm, parts.lr_schedule.lr * factor, totals, stop, new_batch_size, adapted)

    def _next_batch(self, step: int) -> list[Columns]:
        shape = self.parts.shape
        if self.parts.carried and self.carries is not None:
            halted = [carry.halted.cpu().numpy() for carry in self.carries]
        else:
            halted = [np.ones(shape.batch_size, dtype=np.bool_)] * shape.accumulation
        # The first batch, for which a shuffle buffer is filled, belongs to the first step.
        with self.activity.doing("data" if self.trained else "first step"), reading_data("the training data"):
            return self.parts.loader.next_batch(halted, step)

    @contextmanager
    def _outside_passes(self, number: int) -> Iterator[None]:
        """Out of memory inside ends the run: weights may have moved, so there is no step to repeat."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            where = "outside forward/backward (for example in the optimizer step); a smaller micro-batch will not help"
            raise too_large(f"step {number}", where) from error

    def _on_device(self, columns: list[Columns]) -> list[Batch]:
        return [to_batch(micro, self.parts.wanted, self.world.device) for micro in columns]

    def _carry_for(self, number: int, batch: Batch) -> Any:
        """The carry with which a micro-batch begins the step."""
        if self.carries is None or not self.parts.carried:
            return self.parts.objective.initial_carry(batch)
        return self.carries[number]

    def _totals(self, columns: list[Columns]) -> StepTotals:
        """The step's totals, whose sum over ranks is begun."""
        batches = self._on_device(columns)
        shares = [
            self.parts.objective.weights(batch, self._carry_for(number, batch)) | {SAMPLES: batch["active"].sum()}
            for number, batch in enumerate(batches)
        ]
        names = sorted(shares[0])
        vector = torch.stack([torch.stack([share[n] for share in shares]).to(self.count_type).sum() for n in names])
        own_rows = float(vector[names.index("rows")]) if self.world.device.type == "cpu" else 0.0
        written = vector.new_tensor([float(self.written_poll())])
        summed = self.world.begin_sum(torch.cat((vector, written, self._stop_flags().to(vector))))
        return StepTotals([*names, WRITTEN], own_rows, summed)

    def leave_if_stopped(self) -> None:
        """Raise StopRequested on every rank where any rank requests a stop. A collective."""
        reason = raised_stop(self.parts.strategy.sum_over_ranks(self._stop_flags()).tolist())
        if reason is not None and reason is not StopReason.RESIZE:
            raise StopRequested(reason)

    def _stop_flags(self) -> Tensor:
        """Which stop this rank requests: a number for each of STOP_REASONS, to be summed over ranks."""
        requested = self.stop_poll()
        flags = [float(requested is reason) for reason in STOP_REASONS]
        return torch.tensor(flags, dtype=self.count_type, device=self.world.device)

    def _passes_that_fit(
        self, columns: list[Columns], totals: StepTotals, number: int
    ) -> tuple[MetricTotals, BatchSize | None]:
        """All passes of a step, repeated with smaller micro-batches while memory runs out on any rank; then their
        gradients are reduced.

        Gives the metrics, and the new batch size if it changed. `totals` are sums over rows, so they hold however the
        rows are split.
        """
        parts = self.parts
        new_size: BatchSize | None = None
        while True:
            done = self._try_passes(columns, totals, number)
            with self._outside_passes(number):
                failed = parts.strategy.reduce(failed=done is None)
            if done is not None and not failed:
                metrics, carries = done
                if parts.carried:
                    self.carries = carries
                return metrics, new_size
            rows = halved(parts.shape.batch_size)
            if rows is None:
                raise too_large(f"step {number}", "with a micro-batch of 1")
            parts.strategy.discard()
            if parts.sparse is not None:
                parts.sparse.forget()
            columns, new_size = split_microbatches(columns, rows), self.set_microbatch(rows)

    def set_microbatch(self, rows: int) -> BatchSize:
        """Split this rank's rows into micro-batches of `rows` from now on; the effective batch stays the same."""
        parts = self.parts
        parts.shape = parts.shape.with_batch(rows)
        parts.loader.set_microbatch(parts.shape)
        if parts.carried and self.carries is not None:
            self.carries = parts.objective.split_carries(self.carries, rows)
        return parts.shape

    def _try_passes(
        self, columns: list[Columns], totals: StepTotals, number: int
    ) -> tuple[MetricTotals, list[Any]] | None:
        """`passes`, or None where memory ran out in one of them and they may be repeated."""
        done = unless_out_of_memory(
            lambda: self.passes(self._on_device(columns), lambda: totals.sums), self.world.device
        )
        if done is None and not self.parts.strategy.retries_passes:
            # Before any further collective: the other ranks are in one of this pass, and end as this process does.
            raise needs_restart(f"step {number}", self.parts.shape.batch_size)
        return done

    def passes(self, batches: list[Batch], totals: Callable[[], dict[str, float]]) -> tuple[MetricTotals, list[Any]]:
        """Forward and backward over every micro-batch and pass; a pass's graph is freed by its backward. `totals` gives
        the denominators of the loss, and is called when the first forward pass is done.

        Gives the metrics and the new carries; if it raises, only gradients have changed.
        """
        parts, metrics = self.parts, MetricTotals()
        carries: list[Any] = []
        scale = self.world.size * (parts.scaler.scale if parts.scaler is not None else 1.0)
        share = torch.tensor(1.0 / self.world.size, dtype=self.count_type)
        passes = parts.objective.passes_per_step
        of_segment = passes // parts.objective.segments_per_step
        for number, batch in enumerate(batches):
            carry = self._carry_for(number, batch)
            for index in range(passes):
                last = number == len(batches) - 1 and index == passes - 1
                if parts.draws and index % of_segment == 0:
                    batch = batch | {COLUMN: self._draw(number, index // of_segment)}
                with parts.strategy.accumulate(last):
                    carry = self._pass(batch, carry, totals, scale, metrics)
            if parts.carried:
                carries.append(carry)
        # Each rank's loss is its part of the step's loss, so the ranks' weights add up to one step.
        metrics.add({"objective": (torch.zeros(()), share)})
        return metrics, carries

    def _draw(self, micro_batch: int, segment: int) -> Tensor:
        """What each row of a micro-batch draws from in a segment [B], and the adapters too.

        A resumed run and a step repeated after out of memory draw the same numbers, with no state to save.
        """
        parts, place = self.parts, (self.parts.seed, self.progress.batch_idx, segment)
        if parts.adapters is not None:
            parts.adapters.draw_from(key_of(*place))
        slots = torch.from_numpy(parts.shape.slots()[micro_batch])
        return row_keys(*place, slots).to(self.world.device, non_blocking=True)

    def _pass(
        self, batch: Batch, carry: Any, totals: Callable[[], dict[str, float]], scale: float, metrics: MetricTotals
    ) -> Any:
        """One forward and backward; returns the new carry."""
        # A function of its own, so that `output` dies here: its graph, though freed, still refers to what the layers
        # were given, such as the keys and values of a whole row in chunks.
        output = self.parts.strategy.segment(batch, carry)
        loss = weighted_loss(output, totals())
        self.parts.strategy.backward(loss * scale)
        metrics.add(output.metrics)
        metrics.add({"objective": (loss.detach(), torch.zeros(()))})
        return output.carry

    def _update_applied(self, rows: tuple[Tensor, Tensor] | None, puzzle_emb_lr: float, samples: float) -> None:
        parts = self.parts
        if parts.sparse is not None and rows is not None:
            parts.sparse.apply(*rows, puzzle_emb_lr)
        if parts.scaler is not None:
            parts.scaler.stepped()
        self.progress.step += 1
        self.progress.bad_steps = 0
        self.progress.count_samples(round(samples), skipped=False)
        self.clock.advance(samples)

    def _check_range(self, number: int) -> None:
        """Raises DivergedError, on every rank, where the update made weights infinite: nothing can repair them."""
        names = self.parts.strategy.overflowed_parameters()
        if names:
            reason = f"weights overflowed float16 (> 65504) first in {_first_of(names)}"
            hint = "Lower --lr and --resume from the last checkpoint, or start a new run with --model-dtype bf16"
            raise DivergedError(Fault(f"float16 weights at step {number}", reason, hint))

    def _observed(self, metrics: MetricTotals) -> Action | None:
        """Give the adaptive learning rate this step's loss."""
        if self.parts.lr_schedule.adaptive is None:
            return None
        loss = metrics.pairs["objective"][0].to(self.world.device, self.count_type)
        return self.parts.lr_schedule.adaptive.observe(self.clock.position, loss, self.parts.strategy.sum_over_ranks)

    def _update_skipped(self, number: int, norm: float, samples: float) -> None:
        """Count a step whose gradient was not finite; too many in a row end the run."""
        if self.parts.carried and self.carries is not None:
            self.carries = [self.parts.objective.restarted(carry) for carry in self.carries]
        # In carried supervision the rows stay in their slots and are trained on in the next steps.
        self.progress.count_samples(round(samples), skipped=not self.parts.carried)
        self.parts.loader.mark_skipped()
        self.progress.skipped_steps += 1
        if self.parts.scaler is not None and self.parts.scaler.overflowed():
            # An overflow of the loss scale is no sign of divergence: the scale is halved.
            return
        self.progress.bad_steps += 1
        if self.progress.bad_steps >= self.parts.max_bad_steps:
            names = self.parts.strategy.non_finite_parameters() or ["the puzzle embedding"]
            raise DivergedError(
                Fault(
                    f"gradient norm {norm} at step {number}",
                    f"{self.progress.bad_steps} updates in a row had non-finite gradients, first in {_first_of(names)}",
                    "Lower --lr or set --grad-clip; --resume from the last checkpoint, or start anew if there is none",
                )
            )

    def flush_metrics(self, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Means since the last flush over all ranks, without names whose weight is 0. A collective.

        The values of a vector become name_0, name_1 and so on. Where there is something to flush, the leading rank
        calls `check`, and an error of it is raised on every rank.
        """
        pairs, self.metrics = self.metrics.pairs, MetricTotals()
        if not pairs:
            return {}
        names = sorted(pairs)
        error: Exception | None = None
        if self.world.leads:
            try:
                check()
            except Exception as raised:  # noqa: BLE001 - the other ranks learn of it below, whatever it is
                error = raised
        parts = [*(part for name in names for part in pairs[name]), torch.tensor(float(error is not None))]
        flat = [part.to(self.world.device, self.count_type).view(-1) for part in parts]
        *sums, failed = self.parts.strategy.sum_over_ranks(torch.cat(flat)).tolist()
        if failed:
            self.world.raise_together(error)
        summed = iter(sums)
        means: dict[str, float] = {}
        for name in names:
            total = pairs[name][0]
            values, weight = [next(summed) for _ in range(total.numel())], next(summed)
            if weight > 0:
                of = [name] if total.dim() == 0 else [f"{name}_{number}" for number in range(len(values))]
                means |= {one: value / weight for one, value in zip(of, values, strict=True)}
        return means


def raised_stop(flags: list[float]) -> StopReason | None:
    """The first stop that any rank requests, from the sums of the ranks' flags, one for each of STOP_REASONS."""
    return next((reason for reason, flag in zip(STOP_REASONS, flags, strict=True) if flag > 0), None)


def _first_of(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def weighted_loss(output: SegmentOutput[Any], totals: dict[str, float]) -> Tensor:
    """The segment's share of the step's loss: each term's sum over its denominator's total."""
    parts = []
    for term in output.terms:
        total = totals[term.denominator]
        parts.append(term.total * (term.coefficient / total if total > 0 else 0.0))
    loss = parts[0]
    for part in parts[1:]:
        loss = loss + part
    return loss
