"""Batches of text: the stream of an epoch, cut into effective batches, and of each the rows of one rank.

A BatchSource gives them: LocalBatches reads in this process; ServedBatches (batch_server.py) gets them from a process
that reads for all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hrm_ray.data.chunk_source import ChunkSource
from hrm_ray.data.packing import RowForm, RowTokens
from hrm_ray.data.stream import ConsumedRange, SequenceStream, Shuffle, StreamState, TrainedRanges, rows_of

OnFill = Callable[[int, int], None]
"""Called after each chunk that does not fill the shuffle buffer yet: with its rows, and how many it can hold."""


@dataclass(frozen=True)
class BatchRequest:
    """Which batches are wanted, the same on every rank: those of `rows` sequences each of an epoch, from a position on.

    `shuffle_rows` samples are shuffled together (0: none). `within_block`: a batch ends at the end of a block, and an
    empty one follows it. `trained`: see SequenceStream.
    """

    epoch: int
    state: StreamState
    form: RowForm
    seed: int
    shuffle_rows: int
    rows: int
    within_block: bool
    trained: TrainedRanges | None = None


@dataclass(frozen=True)
class TextBatch:
    """A batch, or a rank's rows of it, and what holds for all ranks: the position behind it, what it took from which
    chunks, warnings about these, how many rows of the epoch were bad or left out so far, whether the last chunk of the
    epoch was read, and whether the epoch has `ended`: no rank has a row, and none will follow."""

    rows: RowTokens
    state: StreamState
    consumed: tuple[ConsumedRange, ...] = ()
    notes: tuple[str, ...] = ()
    bad_rows: int = 0
    left_out_rows: int = 0
    data_ended: bool = False
    ended: bool = False


class Batches(Protocol):
    """A rank's rows of one batch after the other. `close` stops reading ahead."""

    def next(self) -> TextBatch:
        """The next batch; one without rows at the end of the epoch.

        If reading fails, or `on_fill` raises, the error is raised and nothing is taken.
        """

    def close(self) -> None: ...


class BatchSource(Protocol):
    """Batches of any epoch from any position on. `shared`: all ranks get the same, errors included."""

    shared: bool

    def batches(self, request: BatchRequest, slots: range, on_fill: OnFill) -> Batches:
        """The rows in `slots` of each batch. Nothing is read before the first is asked for."""


class BatchReader:
    """Batches that are read in this process."""

    def __init__(self, chunks: ChunkSource, request: BatchRequest, slots: range, on_fill: OnFill) -> None:
        shuffle = Shuffle(request.seed, request.epoch, request.shuffle_rows) if request.shuffle_rows else None
        self._request, self._slots = request, slots
        self._stream = SequenceStream(
            chunks, request.form, request.epoch, request.state, shuffle, on_fill, request.trained
        )

    def next(self) -> TextBatch:
        """See Batches."""
        stream, slots = self._stream, self._slots
        row_slices = stream.take(self._request.rows, within_block=self._request.within_block)
        rows = rows_of(row_slices, slots.start, slots.stop)
        consumed, notes = tuple(stream.take_consumed()), tuple(stream.take_notes())
        ended = stream.data_ended and not row_slices
        return TextBatch(
            rows, stream.state, consumed, notes, **stream.left_out, data_ended=stream.data_ended, ended=ended
        )

    def close(self) -> None:
        """See Batches."""
        self._stream.close()


class LocalBatches:
    """A BatchSource over the chunks that this process reads."""

    shared = False

    def __init__(self, chunks: ChunkSource) -> None:
        self._chunks = chunks

    def batches(self, request: BatchRequest, slots: range, on_fill: OnFill) -> Batches:
        """See BatchSource."""
        return BatchReader(self._chunks, request, slots, on_fill)
