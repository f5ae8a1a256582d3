"""A loader of text: the epoch's stream of sequences cut into effective batches, and this rank's slots of each.

All ranks take the same steps through the same stream, so the rows of a step depend on the effective batch and never on
how it is split.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from hrm_ray.data.chunk_source import ChunkSource
from hrm_ray.data.packing import RowForm, padding_rows
from hrm_ray.data.stream import (
    ConsumedRange,
    RowSlice,
    SequenceStream,
    Shuffle,
    StreamState,
    append_ranges,
    ranges_before,
)
from hrm_ray.errors import DataError, Fault
from hrm_ray.train.loaders import BatchLoader, BatchSize, HaltedSlots, StopCondition
from hrm_ray.types import Columns


@dataclass(frozen=True)
class TextStream:
    """What a loader of text reads: chunks, the form of rows, the token that pads them, and the samples that a shuffle
    buffer holds (0: no shuffling)."""

    source: ChunkSource
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
        self.stream = self._stream(StreamState())
        self.on_epoch_end: Callable[[int, int], None] = lambda epoch, sequences: None
        """Called before another epoch begins: with the number of the one that ended, and its sequences."""
        self.on_fill: Callable[[int, int], None] = lambda rows, wanted: None
        """As SequenceStream's."""

    def next_batch(self, halted: HaltedSlots, step: int) -> list[Columns]:
        append_ranges(self._consumed, self.stream.take_consumed())  # of the last batch, which was not skipped
        row_slices = self.stream.take(self.shape.effective, within_block=self.stop_condition.after_block)
        rows = self._own(row_slices)
        size = self.shape.batch_size
        return [
            {name: values[first : first + size] for name, values in rows.items()}
            for first in range(0, self.shape.per_rank, size)
        ]

    def start_epoch(self, trained: bool) -> bool:
        """See BatchLoader. Raises DataError after an epoch without a single sequence: all others would be empty too."""
        if (trained and self.stop_condition.after_block) or self.stop_condition.at_epoch_end(self.epoch, trained):
            return False
        if not self.stream.state.sequences:
            reason = "no row is left to train on"
            raise DataError(Fault("the training data", reason, "Give other data, or leave out --ascii-only"))
        self.on_epoch_end(self.epoch, self.stream.state.sequences)
        self._enter(self.epoch + 1, StreamState())
        return True

    def ranges_before(self, source: ChunkSource) -> Generator[list[ConsumedRange], None, None]:
        """All that was taken before the present position, read again from `source`: as the stream's ranges_before."""
        state, text = self.stream.state, self.text
        return ranges_before(source, text.form, self.epoch, state, seed=self.seed, shuffle_rows=text.shuffle_rows)

    def state_dict(self) -> dict[str, npt.NDArray[np.int64]]:
        """The position in the stream, which is the same on every rank."""
        return {name: np.array([value], dtype=np.int64) for name, value in asdict(self.stream.state).items()}

    def load_state_dict(self, epoch: int, state_dict: dict[str, npt.NDArray[np.int64]]) -> None:
        if state_dict and state_dict.keys() != asdict(StreamState()).keys():
            reason = "its position in the data was saved by an earlier version, which counted differently"
            raise DataError(Fault("the checkpoint", reason, "Start a new run with --student-init from this bundle"))
        self._enter(epoch, StreamState(**{name: int(values[0]) for name, values in state_dict.items()}))

    @property
    def fails_alike(self) -> bool:
        return self.text.source.shared or self.shape.size == 1

    def take_notes(self) -> list[str]:
        notes, self._notes = self._notes + self.stream.take_notes(), []
        return notes

    def take_consumed(self) -> list[ConsumedRange]:
        append_ranges(self._consumed, self.stream.take_consumed())
        consumed, self._consumed = self._consumed, []
        return consumed

    def mark_skipped(self) -> None:
        # A chunk without a sequence has nothing that could be learned.
        last = self.stream.take_consumed()
        append_ranges(self._consumed, [replace(item, skipped=item.start < item.end) for item in last])

    @property
    def data_ended(self) -> bool:
        return self.epoch > 0 or self.stream.data_ended

    def counts(self) -> dict[str, int]:
        """See BatchLoader: bad rows, and rows left out by --ascii-only."""
        return {name: count for name, count in self.stream.left_out.items() if count}

    def close(self) -> None:
        self.stream.close()

    def _enter(self, epoch: int, position: StreamState) -> None:
        self._notes += self.stream.take_notes()
        append_ranges(self._consumed, self.stream.take_consumed())
        self.stream.close()
        self.epoch = epoch
        self.stream = self._stream(position)

    def _stream(self, position: StreamState) -> SequenceStream:
        rows = self.text.shuffle_rows
        shuffle = Shuffle(self.seed, self.epoch, rows) if rows else None
        return SequenceStream(
            self.text.source,
            self.text.form,
            self.epoch,
            position,
            shuffle,
            lambda rows, wanted: self.on_fill(rows, wanted),
        )

    def _own(self, row_slices: list[RowSlice]) -> Columns:
        """This rank's rows of the batch that `row_slices` make up, padded with inactive rows."""
        begin, end = self.shape.first_slot, self.shape.first_slot + self.shape.per_rank
        pieces: list[Columns] = []
        slot = 0
        for row_slice in row_slices:
            first, last = max(begin - slot, 0), min(end - slot, row_slice.count)
            if first < last:
                pieces.append(row_slice.window.rows(row_slice.first + np.arange(first, last, dtype=np.int64)))
            slot += row_slice.count
        missing = self.shape.per_rank - sum(len(piece["active"]) for piece in pieces)
        if missing:
            pieces.append(padding_rows(self.text.form.seq_len, missing, self.text.pad_id))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
