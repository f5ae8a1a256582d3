"""Rows of text for each step of each rank, out of the stream of an epoch.

One job: cut the stream into effective batches and give this rank its slots of them. All ranks take the same steps
through the same stream, so the rows of a step depend on the effective batch and never on how it is split. It reads
nothing itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from hrm_ray.data.chunk_source import ChunkSource
from hrm_ray.data.packing import RowForm, padding_rows
from hrm_ray.data.stream import SequenceStream, Shuffle, StreamPlace, Stretch, Trained
from hrm_ray.errors import DataFault, Fault
from hrm_ray.train.feed import BatchShape, Ends, HaltedSlots
from hrm_ray.values import Columns


@dataclass(frozen=True)
class TextStream:
    """What a feed of text is made of: where chunks come from, the form of rows, what fills them up, and how many
    samples a shuffle buffer holds (0: none)."""

    source: ChunkSource
    form: RowForm
    pad_id: int
    shuffle_rows: int = 0


class StreamFeed:
    """Feed over a TextStream: every step takes the next `effective` sequences; the last of an epoch may be smaller."""

    def __init__(self, text: TextStream, shape: BatchShape, *, seed: int, ends: Ends) -> None:
        self.text, self.shape, self.seed, self.ends = text, shape, seed, ends
        self._notes: list[str] = []
        self._trained: list[Trained] = []
        self.epoch = 0
        self.stream = self._stream(StreamPlace())

    def offer(self, halted: HaltedSlots, step: int) -> list[Columns]:
        """See Feed; every slot of text is free at every step."""
        stretches = self.stream.take(self.shape.effective, within_block=self.ends.after_block)
        rows = self._own(stretches)
        size = self.shape.batch_size
        return [
            {name: values[first : first + size] for name, values in rows.items()}
            for first in range(0, self.shape.per_rank, size)
        ]

    def roll(self, trained: bool) -> bool:
        """See Feed. Raises DataFault for an epoch without a single sequence, which would roll on for ever."""
        if (trained and self.ends.after_block) or self.ends.at_epoch_end(self.epoch, trained):
            return False
        if not self.stream.place.sequences:
            reason = "no row of it was left to train on"
            raise DataFault(Fault("the training data", reason, "Give other data, or leave out --ascii-only"))
        self._enter(self.epoch + 1, StreamPlace())
        return True

    def recut(self, shape: BatchShape) -> None:
        """See Feed."""
        assert (shape.first_slot, shape.effective) == (self.shape.first_slot, self.shape.effective)
        self.shape = shape

    def position(self) -> dict[str, npt.NDArray[np.int64]]:
        """The place in the stream; the same on every rank."""
        place = asdict(self.stream.place)
        return {name: np.array([value], dtype=np.int64) for name, value in place.items()}

    def seek(self, epoch: int, position: dict[str, npt.NDArray[np.int64]]) -> None:
        """See Feed."""
        if position and position.keys() != asdict(StreamPlace()).keys():
            reason = "its place in the data was written by an earlier version, which counted otherwise"
            raise DataFault(Fault("the checkpoint", reason, "Train anew, with --student-init from this bundle"))
        self._enter(epoch, StreamPlace(**{name: int(values[0]) for name, values in position.items()}))

    @property
    def fails_alike(self) -> bool:
        """See Feed."""
        return self.text.source.shared or self.shape.size == 1

    def take_notes(self) -> list[str]:
        """See Feed."""
        notes, self._notes = self._notes + self.stream.take_notes(), []
        return notes

    def take_trained(self) -> list[Trained]:
        """See Feed."""
        trained, self._trained = self._trained + self.stream.take_trained(), []
        return trained

    @property
    def data_ended(self) -> bool:
        """See Feed."""
        return self.epoch > 0 or self.stream.data_ended

    def counts(self) -> dict[str, int]:
        """See Feed: rows that were bad, and rows left out by --ascii-only."""
        return {name: count for name, count in self.stream.left_out.items() if count}

    def one_epoch_more(self) -> None:
        """See Feed."""
        self.ends = self.ends.with_one_more()

    def close(self) -> None:
        """See Feed."""
        self.stream.close()

    def _enter(self, epoch: int, place: StreamPlace) -> None:
        self._notes += self.stream.take_notes()
        self._trained += self.stream.take_trained()
        self.stream.close()
        self.epoch = epoch
        self.stream = self._stream(place)

    def _stream(self, place: StreamPlace) -> SequenceStream:
        rows = self.text.shuffle_rows
        shuffle = Shuffle(self.seed, self.epoch, rows) if rows else None
        return SequenceStream(self.text.source, self.text.form, self.epoch, place, shuffle)

    def _own(self, stretches: list[Stretch]) -> Columns:
        """This rank's rows of the batch that `stretches` make up, filled up with inactive ones."""
        begin, end = self.shape.first_slot, self.shape.first_slot + self.shape.per_rank
        pieces: list[Columns] = []
        slot = 0
        for stretch in stretches:
            first, last = max(begin - slot, 0), min(end - slot, stretch.count)
            if first < last:
                pieces.append(stretch.window.rows(stretch.first + np.arange(first, last, dtype=np.int64)))
            slot += stretch.count
        missing = self.shape.per_rank - sum(len(piece["active"]) for piece in pieces)
        if missing:
            pieces.append(padding_rows(self.text.form.seq_len, missing, self.text.pad_id))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
