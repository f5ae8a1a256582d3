"""An epoch as one stream of packed sequences, in an order that depends only on seed, epoch and settings.

Chunks come in the epoch's order; as many of one block as hold `shuffle_rows` samples form a window, whose sequences
are shuffled together (in linear order a window is one chunk, and keeps its order). The state is a window and how many
of its sequences were taken, so resuming in the middle of a chunk is exact."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hrm_ray.data.chunk_source import Chunk, ChunkSource
from hrm_ray.data.order import WindowOrder
from hrm_ray.data.packing import RowForm, RowTokens, TextSamples, merged_rows

Ints = npt.NDArray[np.int64]

TrainedRanges = tuple[tuple[int, int, int], ...]
"""Sequences of chunks that independent trainers have trained in an epoch: (chunk, start, end), places in the order of
its window."""

_TAKEN_AT_ONCE = 1024
"""Sequences that are passed over at once where only their ranges are wanted."""


@dataclass(frozen=True)
class StreamState:
    """A position in an epoch: the position of the window's first chunk in the epoch's order, how many sequences were
    `taken` of the window and of the epoch, and how many rows of earlier windows were bad or left out."""

    position: int = 0
    taken: int = 0
    sequences: int = 0
    bad_rows: int = 0
    left_out_rows: int = 0


@dataclass(frozen=True)
class ConsumedRange:
    """Sequences [start, end) of a chunk that were taken, out of so many. In a shuffled epoch they count places of its
    window's order: the first chunk of a window has as many of the first places as it has sequences, and so on.

    `chunk` counts from the start of the corpus, `chunk_in_block` from that of its block. `skipped`: the update with
    them was skipped, so they were read and not learned.
    """

    epoch: int
    block: int
    chunk_in_block: int
    chunk: int
    sequences: int
    start: int
    end: int
    skipped: bool = False


def append_ranges(ranges: list[ConsumedRange], more: Iterable[ConsumedRange]) -> None:
    """Add `more`, each joined with the last range where it continues that range."""
    for item in more:
        last = ranges[-1] if ranges else None
        if last is not None and replace(last, start=last.end, end=item.end) == item:
            ranges[-1] = replace(last, end=item.end)
        else:
            ranges.append(item)


@dataclass(frozen=True)
class Shuffle:
    """A shuffle buffer of `rows` samples."""

    seed: int
    epoch: int
    rows: int

    def order(self, position: int, sequences: int, chunks: Sequence[Chunk]) -> WindowOrder:
        """The order of a window that begins at `position`. A chunk with more samples than the buffer holds is mixed in
        parts."""
        samples = sum(chunk.entry.rows for chunk in chunks)
        parts = -(-samples // self.rows) if len(chunks) == 1 else 1
        return WindowOrder(self.seed, self.epoch, position, sequences, parts)


class Window:
    """Sequences that are taken in one order: those of `chunks`."""

    def __init__(
        self, chunks: list[Chunk], form: RowForm, shuffle: Shuffle | None, trained: TrainedRanges = ()
    ) -> None:
        """A window of one chunk leaves out what is `trained` of it."""
        self.position, self.next = chunks[0].position, chunks[-1].position + 1
        self.ends_block = chunks[-1].ends_block
        self.bad_rows = sum(chunk.entry.bad for chunk in chunks)
        self.left_out_rows = sum(chunk.entry.left_out for chunk in chunks)
        self._samples = [TextSamples(chunk.store, form) for chunk in chunks]
        self._starts = [chunk.entry.start for chunk in chunks]
        self._ends = np.cumsum([len(samples) for samples in self._samples])
        self.cut_pairs = sum(samples.cut_pairs for samples in self._samples)
        sequences = int(self._ends[-1])
        self._order = None if shuffle is None else shuffle.order(self.position, sequences, chunks)
        self._left: Ints | None = None
        """Where a part is trained: the places that are left."""
        own = [(start, end) for chunk, start, end in trained if chunk == self._starts[0].number]
        if own:
            left = np.ones(sequences, dtype=np.bool_)
            for start, end in own:
                left[start:end] = False
            self._left = np.flatnonzero(left)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._left is None else len(self._left)

    def consumed(self, epoch: int, first: int, beyond: int) -> list[ConsumedRange]:
        """The ranges of chunks that the places first..beyond-1 of the window stand for. A chunk without sequences is
        consumed once all before it are; `first` is -1 if nothing of the window was reported yet."""
        if self._left is not None:
            places = self._left[max(first, 0) : beyond]
            runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
            own_start, count = self._starts[0], len(self._samples[0])
            place = own_start.block, own_start.chunk, own_start.number, count
            return [ConsumedRange(epoch, *place, int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
        found = []
        for start, samples, end in zip(self._starts, self._samples, self._ends.tolist(), strict=True):
            begin = end - len(samples)
            own = max(first, begin) - begin, max(min(beyond, end) - begin, 0)
            if own[0] < own[1] or (begin == end and first < begin <= beyond):
                found.append(ConsumedRange(epoch, start.block, start.chunk, start.number, len(samples), *own))
        return found

    def where(self, positions: Ints) -> tuple[Ints, Ints]:
        """For positions in the window's order: which of its chunks, and which sequence of that chunk."""
        if self._left is not None:
            positions = self._left[positions]
        sequences = positions if self._order is None else self._order.at(positions)
        chunk = np.searchsorted(self._ends, sequences, side="right")
        return chunk, sequences - np.where(chunk > 0, self._ends[chunk - 1], 0)

    def rows(self, positions: Ints) -> RowTokens:
        """The sequences at `positions` (int64 [B], each in the window)."""
        chunk, sequence = self.where(positions)
        parts = []
        for number in np.unique(chunk).tolist():
            at = np.flatnonzero(chunk == number)
            parts.append((self._samples[number].tokens(sequence[at]), at))
        return merged_rows(parts)


@dataclass(frozen=True)
class RowSlice:
    """Sequences first..first+count-1 of a window's order."""

    window: Window
    first: int
    count: int


def rows_of(row_slices: Sequence[RowSlice], first: int, beyond: int) -> RowTokens:
    """Of the rows that `row_slices` make up one after the other those from `first` to `beyond`-1; past the end there
    are none."""
    parts: list[tuple[RowTokens, Ints]] = []
    number = taken = 0
    for row_slice in row_slices:
        begin, end = max(first - number, 0), min(beyond - number, row_slice.count)
        if begin < end:
            rows = row_slice.window.rows(row_slice.first + np.arange(begin, end, dtype=np.int64))
            parts.append((rows, np.arange(taken, taken + end - begin)))
            taken += end - begin
        number += row_slice.count
    return merged_rows(parts)


def ranges_before(
    source: ChunkSource, form: RowForm, epoch: int, state: StreamState, *, seed: int, shuffle_rows: int
) -> Generator[list[ConsumedRange], None, None]:
    """All that was taken before `state` of `epoch`, found by reading the data again from the start, bit by bit: to be
    put together by `append_ranges`. Close the iterator if it is not exhausted."""
    for number in range(epoch + 1):
        shuffle = Shuffle(seed, number, shuffle_rows) if shuffle_rows else None
        stream = SequenceStream(source, form, number, StreamState(), shuffle)
        try:
            while number < epoch or stream.state.sequences < state.sequences:
                left = _TAKEN_AT_ONCE if number < epoch else state.sequences - stream.state.sequences
                if not stream.take(min(left, _TAKEN_AT_ONCE)):
                    break
                yield stream.take_consumed()
            yield stream.take_consumed()
        finally:
            stream.close()


class SequenceStream:
    """The sequences of one epoch, taken in order."""

    def __init__(
        self,
        source: ChunkSource,
        form: RowForm,
        epoch: int,
        state: StreamState,
        shuffle: Shuffle | None,
        on_fill: Callable[[int, int], None] = lambda rows, wanted: None,
        trained: TrainedRanges | None = None,
    ) -> None:
        """Without `shuffle` the order is that of the chunks. `on_fill` is called after each chunk that does not
        fill the shuffle buffer yet, with its rows and how many it can hold; what it raises ends the filling.

        `trained`: of an epoch in which independent trainers took part, what they trained from `state` on. It is left
        out, and a window is one chunk, as theirs are."""
        self._form, self._shuffle, self._on_fill, self._trained = form, shuffle, on_fill, trained
        self._chunks = source.chunks(epoch, state.position)
        self._window: Window | None = None
        self._begin = state
        self._taken, self._sequences = state.taken, state.sequences
        self._bad, self._left_out = state.bad_rows, state.left_out_rows
        self._in_block = False
        self._epoch, self._shown = epoch, state.taken or -1
        self._consumed: list[ConsumedRange] = []
        self.data_ended = False
        """Whether the last chunk of the epoch was read."""
        self._notes: list[str] = []

    def take(self, count: int, *, within_block: bool = False) -> list[RowSlice]:
        """The next `count` sequences; fewer at the end of the epoch, or `within_block` at the end of the current block.
        If reading fails, the error is raised and nothing is taken."""
        before = (self._window, self._taken, self._sequences, self._bad, self._left_out, self._shown, self._in_block)
        reported = len(self._consumed)
        try:
            return self._row_slices(count, within_block)
        except BaseException:
            self._window, self._taken, self._sequences, self._bad, self._left_out, self._shown, self._in_block = before
            del self._consumed[reported:]
            raise

    def _row_slices(self, count: int, within_block: bool) -> list[RowSlice]:
        row_slices: list[RowSlice] = []
        while count:
            window = self._current(within_block)
            if window is None:
                # An empty result means that the block is done: the next sequences are of another one.
                self._in_block = bool(row_slices)
                break
            taken = min(count, len(window) - self._taken)
            row_slices.append(RowSlice(window, self._taken, taken))
            self._in_block = True
            self._taken += taken
            self._sequences += taken
            count -= taken
        return row_slices

    @property
    def state(self) -> StreamState:
        """The position of the next sequence."""
        window = self._window
        if window is None:
            return self._begin
        if self._taken == len(window):
            left_out = self._bad + window.bad_rows, self._left_out + window.left_out_rows
            return StreamState(window.next, 0, self._sequences, *left_out)
        return StreamState(window.position, self._taken, self._sequences, self._bad, self._left_out)

    @property
    def left_out(self) -> dict[str, int]:
        """Rows of the epoch so far that could not be trained on: bad ones, and those with other than ASCII."""
        bad, left_out = (self._window.bad_rows, self._window.left_out_rows) if self._window else (0, 0)
        return {"bad_rows": self._bad + bad, "left_out_rows": self._left_out + left_out}

    def take_consumed(self) -> list[ConsumedRange]:
        """What was taken since the last call, chunk by chunk in the epoch's order."""
        self._report()
        consumed, self._consumed = self._consumed, []
        return consumed

    def _report(self) -> None:
        """Record what was taken of the current window."""
        if self._window is not None:
            self._consumed += self._window.consumed(self._epoch, self._shown, self._taken)
            self._shown = self._taken

    def take_notes(self) -> list[str]:
        """Warnings about the chunks that came since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Stop reading ahead."""
        self._chunks.close()

    def _current(self, within_block: bool) -> Window | None:
        """The window that has sequences left; the next one where this one has none."""
        while self._window is None or self._taken == len(self._window):
            if self._window is not None and self._window.ends_block:
                if within_block and self._in_block:
                    return None
                self._in_block = False
            opened = self._opened()
            if opened is None:
                self.data_ended = True
                return None
            if self._window is not None:
                self._report()
                self._taken, self._shown = 0, -1
                self._bad += self._window.bad_rows
                self._left_out += self._window.left_out_rows
            self._window = opened
        return self._window

    def _opened(self) -> Window | None:
        """The next window: chunks of one block until the buffer is full."""
        chunks: list[Chunk] = []
        rows, wanted = 0, self._shuffle.rows if self._shuffle is not None else 0
        for chunk in self._chunks:
            chunks.append(chunk)
            self._notes += chunk.notes
            rows += chunk.entry.rows
            # In a chunk without the end of a row a text goes on that is longer than a chunk: memory stays bounded.
            if chunk.ends_block or rows >= wanted or not chunk.entry.rows or self._trained is not None:
                break
            self._on_fill(rows, wanted)
        if not chunks:
            return None
        window = Window(chunks, self._form, self._shuffle, self._trained or ())
        if window.cut_pairs:
            cut = f"longer than a row of {self._form.seq_len} tokens and were cut"
            self._notes.append(f"{chunks[0].entry.name}: {window.cut_pairs} pairs are {cut}.")
        return window
