"""A loader of text: the epoch's stream of sequences cut into effective batches, and this rank's slots of each.

All ranks take the same steps through the same stream, so the rows of a step depend on the effective batch and never on
how it is split.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from hrm_ray.data.batches import Batches, BatchRequest, BatchSource, OnFill
from hrm_ray.data.chunk_source import ChunkSource
from hrm_ray.data.packing import RowForm
from hrm_ray.data.stream import ConsumedRange, StreamState, append_ranges, ranges_before
from hrm_ray.errors import DataError, Fault
from hrm_ray.train.loaders import BatchLoader, BatchSize, HaltedSlots, StopCondition
from hrm_ray.types import Columns


@dataclass(frozen=True)
class TextStream:
    """What a loader of text reads: batches, the form of rows, the token that pads them, and the samples that a shuffle
    buffer holds (0: no shuffling)."""

    source: BatchSource
    form: RowForm
    pad_id: int
    shuffle_rows: int = 0


class StreamLoader(BatchLoader):
    """BatchLoader of text: every step takes the next `effective` sequences, the last of an epoch maybe fewer."""

    def __init__(self, text: TextStream, shape: BatchSize, *, seed: int, stop_condition: StopCondition) -> None:
        super().__init__(shape, stop_condition)
        self.text = text
        self.seed = seed
        self._notes: list[str] = []
        self._consumed: list[ConsumedRange] = []
        self._last_consumed: tuple[ConsumedRange, ...] = ()
        """What the last batch took; its update may still be skipped."""
        self._batches = self._enter(0, StreamState())
        self.on_epoch_end: Callable[[int, int], None] = lambda epoch, sequences: None
        """Called before another epoch begins: with the number of the one that ended, and its sequences."""
        self.on_fill: OnFill = lambda rows, wanted: None
        """What it raises ends the filling."""

    def next_batch(self, halted: HaltedSlots, step: int) -> list[Columns]:
        self._keep_last_consumed()  # the last batch was not skipped
        batch = self._batches.next()
        self.position, self._last_consumed = batch.state, batch.consumed
        self._notes += batch.notes
        self._left_out = {"bad_rows": batch.bad_rows, "left_out_rows": batch.left_out_rows}
        self._chunks_ended = batch.data_ended
        shape = self.shape
        places = np.arange(batch.rows.count)
        rows = batch.rows.columns(self.text.form.seq_len, self.text.pad_id, places, shape.per_rank)
        return [
            {name: values[first : first + shape.batch_size] for name, values in rows.items()}
            for first in range(0, shape.per_rank, shape.batch_size)
        ]

    def start_epoch(self, trained: bool) -> bool:
        """See BatchLoader. Raises DataError after an epoch without a single sequence: all others would be empty too."""
        if (trained and self.stop_condition.after_block) or self.stop_condition.at_epoch_end(self.epoch, trained):
            return False
        if not self.position.sequences:
            reason = "no row is left to train on"
            raise DataError(Fault("the training data", reason, "Give other data, or leave out --ascii-only"))
        self.on_epoch_end(self.epoch, self.position.sequences)
        self._batches.close()
        self.trained = None
        self._batches = self._enter(self.epoch + 1, StreamState())
        return True

    def ranges_before(self, source: ChunkSource) -> Generator[list[ConsumedRange], None, None]:
        """All that was taken before the present position, read again from `source`: as the stream's ranges_before."""
        if self.trained is not None:
            reason = "it alone says what independent trainers have trained in this epoch"
            hint = "Restore it from a copy, or resume from a checkpoint of an earlier epoch"
            raise DataError(Fault("the lost ledger", reason, hint))
        position, text = self.position, self.text
        return ranges_before(source, text.form, self.epoch, position, seed=self.seed, shuffle_rows=text.shuffle_rows)

    def state_dict(self) -> dict[str, npt.NDArray[np.int64]]:
        """The position in the stream, which is the same on every rank."""
        return {name: np.array([value], dtype=np.int64) for name, value in asdict(self.position).items()}

    def load_state_dict(self, epoch: int, state_dict: dict[str, npt.NDArray[np.int64]]) -> None:
        if state_dict and state_dict.keys() != asdict(StreamState()).keys():
            reason = "its position in the data was saved by an earlier version, which counted differently"
            raise DataError(Fault("the checkpoint", reason, "Start a new run with --student-init from this bundle"))
        self._batches.close()
        self._batches = self._enter(epoch, StreamState(**{name: int(values[0]) for name, values in state_dict.items()}))

    @property
    def fails_alike(self) -> bool:
        return self.text.source.shared or self.shape.size == 1

    def take_notes(self) -> list[str]:
        notes, self._notes = self._notes, []
        return notes

    def take_consumed(self) -> list[ConsumedRange]:
        self._keep_last_consumed()
        consumed, self._consumed = self._consumed, []
        return consumed

    def mark_skipped(self) -> None:
        # A chunk without a sequence has nothing that could be learned.
        self._last_consumed = tuple(replace(item, skipped=item.start < item.end) for item in self._last_consumed)
        self._keep_last_consumed()

    @property
    def data_ended(self) -> bool:
        return self.epoch > 0 or self._chunks_ended

    def counts(self) -> dict[str, int]:
        """See BatchLoader: bad rows, and rows left out by --ascii-only."""
        return {name: count for name, count in self._left_out.items() if count}

    def close(self) -> None:
        self._batches.close()

    def _keep_last_consumed(self) -> None:
        append_ranges(self._consumed, self._last_consumed)
        self._last_consumed = ()

    def _enter(self, epoch: int, position: StreamState) -> Batches:
        """The batches from a position of an epoch on."""
        self._keep_last_consumed()
        self.epoch, self.position = epoch, position
        self._left_out = {"bad_rows": position.bad_rows, "left_out_rows": position.left_out_rows}
        self._chunks_ended = False
        text, shape = self.text, self.shape
        within_block = self.stop_condition.after_block
        rows, trained = shape.effective, self.trained
        request = BatchRequest(
            epoch, position, text.form, self.seed, text.shuffle_rows, rows, within_block, trained=trained
        )
        slots = range(shape.first_slot, shape.first_slot + shape.per_rank)
        return text.source.batches(request, slots, lambda rows, wanted: self.on_fill(rows, wanted))
