"""The samples of claimed ranges: where a block trainer's rows come from, for text and for puzzles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hrm_ray.data.chunk_source import Chunk
from hrm_ray.data.order import epoch_order
from hrm_ray.data.packing import RowForm
from hrm_ray.data.stream import RowSlice, Shuffle, Window, rows_of
from hrm_ray.errors import DataError, Fault
from hrm_ray.ledger import Lease
from hrm_ray.types import Columns, SampleSet

PUZZLES_PER_CHUNK = 4096
"""Puzzles have no chunks of their own: to the ledger as many places of the epoch's order are one."""


@dataclass(frozen=True)
class TakenRange:
    """Samples [start, end) of a lease's chunk, in the order in which its epoch takes them. `skipped`: the update with
    them was skipped."""

    lease: Lease
    start: int
    end: int
    skipped: bool = False


class ChunkReader(Protocol):
    """Reads chunks of text, by one thread at a time: a ChunkPipeline, or one on another machine."""

    def get(self, number: int) -> Chunk | None:
        """Chunk `number`, None after the last one. Raises DataError."""

    def unwanted(self) -> AbstractContextManager[None]:
        """Inside, what is being read is wanted no more."""

    def close(self) -> None:
        """Release the data."""


class ClaimedRows(Protocol):
    """Gives the samples of claimed ranges."""

    def read_ahead(self, lease: Lease) -> None:
        """Begin to read the chunk of a lease; returns at once."""

    def is_read(self, lease: Lease) -> bool:
        """Whether `sequences` would return at once."""

    def sequences(self, lease: Lease) -> int:
        """How many samples the chunk of a lease has. Raises DataError where it cannot be read."""

    def columns(self, taken: Sequence[TakenRange], places: npt.NDArray[np.int64], rows: int) -> Columns:
        """`rows` rows, those at `places` (rising) filled with the samples of `taken` one after the other."""

    def keep(self, leases: Iterable[Lease]) -> None:
        """Forget all chunks but those of `leases`."""

    def take_notes(self) -> list[str]:
        """Warnings about the chunks that were read since the last call."""

    def close(self) -> None:
        """Stop reading."""


class ClaimedText:
    """ClaimedRows of text: chunks, read and tokenised by a thread of their own. A shuffle window is one chunk."""

    def __init__(self, pipeline: ChunkReader, form: RowForm, pad_id: int, *, seed: int, shuffle_rows: int) -> None:
        """`shuffle_rows`: see TextStream."""
        self._pipeline, self._form, self._pad_id = pipeline, form, pad_id
        self._seed, self._shuffle_rows = seed, shuffle_rows
        self._chunks: dict[int, Future[Chunk | None]] = {}
        self._windows: dict[tuple[int, int], Window] = {}
        self._notes: list[str] = []
        # One thread: a pipeline is used by one at a time.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="chunks")

    def read_ahead(self, lease: Lease) -> None:
        """See ClaimedRows."""
        if lease.chunk not in self._chunks:
            self._chunks[lease.chunk] = self._reader.submit(self._pipeline.get, lease.chunk)

    def is_read(self, lease: Lease) -> bool:
        """See ClaimedRows."""
        return lease.chunk in self._chunks and self._chunks[lease.chunk].done()

    def sequences(self, lease: Lease) -> int:
        """See ClaimedRows."""
        return len(self._window(lease))

    def columns(self, taken: Sequence[TakenRange], places: npt.NDArray[np.int64], rows: int) -> Columns:
        """See ClaimedRows."""
        slices = [RowSlice(self._window(one.lease), one.start, one.end - one.start) for one in taken]
        tokens = rows_of(slices, 0, len(places))
        return tokens.columns(self._form.seq_len, self._pad_id, places, rows)

    def keep(self, leases: Iterable[Lease]) -> None:
        """See ClaimedRows."""
        kept = {(lease.epoch, lease.chunk) for lease in leases}
        self._windows = {key: window for key, window in self._windows.items() if key in kept}
        chunks = {chunk for _, chunk in kept}
        for chunk in [chunk for chunk in self._chunks if chunk not in chunks]:
            self._chunks.pop(chunk).cancel()

    def take_notes(self) -> list[str]:
        """See ClaimedRows."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """See ClaimedRows."""
        with self._pipeline.unwanted():
            self._reader.shutdown(cancel_futures=True)
        self._pipeline.close()

    def _window(self, lease: Lease) -> Window:
        key = lease.epoch, lease.chunk
        if key not in self._windows:
            self.read_ahead(lease)
            chunk = self._chunks[lease.chunk].result()
            if chunk is None:
                reason = f"the data ends before chunk {lease.chunk}, which the ledger knows"
                raise DataError(Fault("the training data", reason, "Restore the data of the run, or train again"))
            shuffle = Shuffle(self._seed, lease.epoch, self._shuffle_rows) if self._shuffle_rows else None
            window = Window([replace(chunk, position=lease.position)], self._form, shuffle)
            self._notes += chunk.notes
            if window.cut_pairs:
                cut = f"longer than a row of {self._form.seq_len} tokens and were cut"
                self._notes.append(f"{chunk.entry.name}: {window.cut_pairs} pairs are {cut}.")
            self._windows[key] = window
        return self._windows[key]


class ClaimedPuzzles:
    """ClaimedRows of puzzles: chunk c holds the places from c * PUZZLES_PER_CHUNK on of each epoch's order."""

    def __init__(self, samples: SampleSet, *, seed: int, linear: bool) -> None:
        self._samples, self._seed, self._linear = samples, seed, linear

    def read_ahead(self, lease: Lease) -> None:
        """See ClaimedRows."""

    def is_read(self, lease: Lease) -> bool:
        """See ClaimedRows."""
        return True

    def sequences(self, lease: Lease) -> int:
        """See ClaimedRows."""
        return puzzles_of_chunk(len(self._samples), lease.chunk)

    def columns(self, taken: Sequence[TakenRange], places: npt.NDArray[np.int64], rows: int) -> Columns:
        """See ClaimedRows."""
        wanted = np.full(rows, -1, dtype=np.int64)
        filled = 0
        for one in taken:
            positions = np.arange(one.start, one.end, dtype=np.int64) + one.lease.chunk * PUZZLES_PER_CHUNK
            order = epoch_order(self._seed, one.lease.epoch, len(self._samples), self._linear)
            wanted[places[filled : filled + len(positions)]] = order.at(positions)
            filled += len(positions)
        return self._samples.rows(wanted)

    def keep(self, leases: Iterable[Lease]) -> None:
        """See ClaimedRows."""

    def take_notes(self) -> list[str]:
        """See ClaimedRows."""
        return []

    def close(self) -> None:
        """See ClaimedRows."""


def puzzle_chunks(puzzles: int) -> int:
    """How many chunks so many puzzles have, to the ledger."""
    return -(-puzzles // PUZZLES_PER_CHUNK)


def puzzles_of_chunk(puzzles: int, chunk: int) -> int:
    """How many of `puzzles` are in a chunk."""
    return max(0, min(PUZZLES_PER_CHUNK, puzzles - chunk * PUZZLES_PER_CHUNK))
