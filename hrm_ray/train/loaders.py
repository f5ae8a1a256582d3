"""Loaders: which samples each micro-batch of each rank gets, step by step.

The choice depends on the effective batch, the seed and the epoch, never on how the effective batch is split over ranks
and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hrm_ray.data.order import epoch_order
from hrm_ray.data.stream import ConsumedRange, TrainedRanges
from hrm_ray.types import Columns, SampleSet

HaltedSlots = Sequence["npt.NDArray[np.bool_]"]
"""Per micro-batch of this rank: which slots take a new row now."""


@dataclass(frozen=True)
class BatchSize:
    """How an effective batch is split: `size` ranks, each with `accumulation` micro-batches of `batch_size` rows."""

    batch_size: int
    accumulation: int
    rank: int
    size: int

    @property
    def effective(self) -> int:
        return self.batch_size * self.accumulation * self.size

    @property
    def per_rank(self) -> int:
        return self.batch_size * self.accumulation

    @property
    def first_slot(self) -> int:
        """Number, in the effective batch, of this rank's first row."""
        return self.rank * self.per_rank

    def with_batch(self, batch_size: int) -> BatchSize:
        """The same rows of each rank in micro-batches of `batch_size`, which must divide them."""
        if self.per_rank % batch_size:
            raise ValueError(f"{self.per_rank} rows per rank cannot be split into micro-batches of {batch_size}")
        return replace(self, batch_size=batch_size, accumulation=self.per_rank // batch_size)

    def slots(self) -> npt.NDArray[np.int64]:
        """This rank's slots of the effective batch, micro-batch by micro-batch [accumulation, batch_size]."""
        own = np.arange(self.per_rank, dtype=np.int64) + self.first_slot
        return own.reshape(self.accumulation, self.batch_size)


@dataclass(frozen=True)
class StopCondition:
    """When a loader ends: after `epochs` (None: never), or after the first epoch or block that this run trained on."""

    epochs: int | None = None
    after_epoch: bool = False
    after_block: bool = False

    def at_epoch_end(self, epoch: int, trained: bool) -> bool:
        """Whether there is no epoch after `epoch`; `trained` as in BatchLoader.start_epoch."""
        return (trained and self.after_epoch) or (self.epochs is not None and epoch + 1 >= self.epochs)


class BatchLoader:
    """Gives the rows of one step at a time; this base has what a loader without chunks needs."""

    def __init__(self, shape: BatchSize, stop_condition: StopCondition) -> None:
        self.shape = shape
        self.stop_condition = stop_condition
        self.epoch = 0
        self.trained: TrainedRanges | None = None
        """Of an epoch in which independent trainers took part: the ranges that they trained, which are left out. The
        chunk of a puzzle is 0, and the range counts places of the epoch's order. To be set before `load_state_dict`."""

    def next_batch(self, halted: HaltedSlots, step: int) -> list[Columns]:
        """This rank's micro-batches for update number `step`; rows without a sample are inactive."""
        raise NotImplementedError

    def start_epoch(self, trained: bool) -> bool:
        """Begin the next epoch; False when there is none. Called when no rank has a row left.

        `trained`: the run has trained on rows since it was started or resumed; the same on all ranks.
        """
        raise NotImplementedError

    def set_microbatch(self, shape: BatchSize) -> None:
        """Split this rank's rows into other micro-batches from now on."""
        if (shape.first_slot, shape.effective) != (self.shape.first_slot, self.shape.effective):
            raise ValueError(f"{shape} does not have the slots of {self.shape}")
        self.shape = shape

    def state_dict(self) -> dict[str, npt.NDArray[np.int64]]:
        """This rank's position in the data, for a checkpoint."""
        raise NotImplementedError

    def load_state_dict(self, epoch: int, state_dict: dict[str, npt.NDArray[np.int64]]) -> None:
        """Restore a position; `state_dict` is that of this rank's slots."""
        raise NotImplementedError

    @property
    def fails_alike(self) -> bool:
        """Whether data that cannot be read fails on every rank at the same step."""
        return False

    @property
    def data_ended(self) -> bool:
        """Whether the end of the data has been read."""
        return True

    def take_notes(self) -> list[str]:
        """Warnings about the data read since the last call."""
        return []

    def take_consumed(self) -> list[ConsumedRange]:
        """The ranges read since the last call, chunk by chunk in order; none where the data has no chunks."""
        return []

    def mark_skipped(self) -> None:
        """The update on the last batch was skipped: mark its ranges as skipped."""

    def counts(self) -> dict[str, int]:
        """Rows left out of this epoch so far, by name, without zeros."""
        return {}

    def one_epoch_more(self) -> None:
        """Allow one more epoch than before."""
        if self.stop_condition.epochs is not None:
            self.stop_condition = replace(self.stop_condition, epochs=self.stop_condition.epochs + 1)

    def close(self) -> None:
        """Stop reading ahead."""


class RolloutLoader(BatchLoader):
    """Whole batches: every step takes the next `effective` samples; the last of an epoch may be smaller."""

    def __init__(
        self, samples: SampleSet, shape: BatchSize, *, seed: int, linear: bool, stop_condition: StopCondition
    ) -> None:
        super().__init__(shape, stop_condition)
        self.samples = samples
        self.seed = seed
        self.linear = linear
        self.taken: npt.NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        self._enter(0)

    def next_batch(self, halted: HaltedSlots, step: int) -> list[Columns]:
        positions = self.taken + self.shape.slots()
        self.taken = np.minimum(self.taken + self.shape.effective, self._count)
        return [self._rows(micro) for micro in positions]

    def start_epoch(self, trained: bool) -> bool:
        # Past the last epoch the position stays: a checkpoint of the end must not begin that epoch again.
        if self.stop_condition.at_epoch_end(self.epoch, trained):
            return False
        self.trained = None
        self._enter(self.epoch + 1)
        self.taken[:] = 0
        return True

    def state_dict(self) -> dict[str, npt.NDArray[np.int64]]:
        return {"taken": self.taken.reshape(-1).copy()}

    def load_state_dict(self, epoch: int, state_dict: dict[str, npt.NDArray[np.int64]]) -> None:
        self._enter(epoch)
        self.taken = state_dict["taken"].astype(np.int64).reshape(self.taken.shape)

    def _enter(self, epoch: int) -> None:
        self.epoch = epoch
        self.order = epoch_order(self.seed, epoch, len(self.samples), self.linear)
        self._left = None if self.trained is None else places_left(len(self.samples), self.trained)
        self._count = len(self.samples) if self._left is None else len(self._left)

    def _rows(self, positions: npt.NDArray[np.int64]) -> Columns:
        """The samples at `positions` of what the epoch's order has left; inactive rows past its end and for -1."""
        inside = (positions >= 0) & (positions < self._count)
        if self._left is not None:
            # A place that is not inside is masked below; an epoch with nothing left has none to look up.
            positions = np.append(self._left, 0)[np.where(inside, positions, self._count)]
        return self.samples.rows(np.where(inside, self.order.at(np.where(inside, positions, 0)), -1))


class SlotLoader(RolloutLoader):
    """Carried supervision: slot g of the effective batch B owns samples g, g + B, g + 2B, ... of the epoch's order.

    A slot takes its next sample when its row has halted; a slot without samples left idles until the next epoch
    (ACTV1_SPEC, section 16). `min_steps` carries the exploration draw, keyed by (seed, step, slot).
    """

    def __init__(
        self,
        samples: SampleSet,
        shape: BatchSize,
        *,
        seed: int,
        linear: bool,
        stop_condition: StopCondition,
        explore: Callable[[int, npt.NDArray[np.int64]], npt.NDArray[np.int32]],
    ) -> None:
        super().__init__(samples, shape, seed=seed, linear=linear, stop_condition=stop_condition)
        self.explore = explore
        self.taken = np.zeros((shape.accumulation, shape.batch_size), dtype=np.int64)

    def next_batch(self, halted: HaltedSlots, step: int) -> list[Columns]:
        micro_batches = []
        for number, slots in enumerate(self.shape.slots()):
            positions = slots + self.taken[number] * self.shape.effective
            wanted = np.where(halted[number], positions, -1)
            self.taken[number] += (wanted >= 0) & (wanted < self._count)
            micro_batches.append(self._rows(wanted) | {"min_steps": self.explore(step, slots)})
        return micro_batches

    def set_microbatch(self, shape: BatchSize) -> None:
        super().set_microbatch(shape)
        self.taken = self.taken.reshape(shape.accumulation, shape.batch_size)


def places_left(places: int, trained: TrainedRanges) -> npt.NDArray[np.int64]:
    """The places 0..places-1 of an epoch's order that no trained range has, int64 [L]."""
    left = np.ones(places, dtype=np.bool_)
    for _, start, end in trained:
        left[start:end] = False
    return np.flatnonzero(left)


def exploration(
    seed: int, probability: float, halt_max_steps: int
) -> Callable[[int, npt.NDArray[np.int64]], npt.NDArray[np.int32]]:
    """The draw of ACTV1_SPEC section 6.4 for (step, slots): 0, or with `probability` uniform in 2..halt_max_steps.

    A counter-based hash of (seed, step, slot), so that it needs no state and no rank sees another's numbers.
    """

    def draw(step: int, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        if probability <= 0 or halt_max_steps < 2:
            return np.zeros(len(slots), dtype=np.int32)
        chance = _uniform(seed, step, slots, stream=0)
        length = 2 + np.floor(_uniform(seed, step, slots, stream=1) * (halt_max_steps - 1))
        return np.where(chance < probability, length, 0).astype(np.int32)

    return draw


def _uniform(seed: int, step: int, slots: npt.NDArray[np.int64], stream: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) by chained SplitMix64 finalisers (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(stream + 1))
        state = _mix(state ^ np.uint64(step))
        mixed = _mix(state + slots.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: np.uint64 | npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = np.asarray(value, dtype=np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
