"""One process reads the stream of text for all ranks, and sends each the rows that it trains.

BatchServer makes batches a few ahead of the slowest rank; ServedBatches is a rank's end. Calls between them go through
ServerCalls, which hides what carries them (Ray, or threads of a test).
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

from hrm_ray.data.batches import Batches, BatchReader, BatchRequest, OnFill, TextBatch
from hrm_ray.data.chunk_source import ChunkSource
from hrm_ray.errors import HrmRayError

AHEAD_BATCHES = 16
"""Batches that are made before the slowest rank asks for them."""
AHEAD_BYTES = 16 << 20
"""Of large batches fewer: no other is made while so many bytes wait."""


@dataclass(frozen=True)
class Filling:
    """The shuffle buffer holds `rows` samples of `wanted`."""

    rows: int
    wanted: int


Item: TypeAlias = TextBatch | Filling | Exception
"""What a stream consists of; after an error, or the batch that says that the epoch has ended, nothing comes."""


@dataclass
class _Stream:
    """The batches of one request."""

    requested: dict[int, int]
    """The number of the item that each rank has asked for last; without the ranks that have closed the stream."""
    items: dict[int, Item] = field(default_factory=dict)
    produced: int = 0

    def has_room(self) -> bool:
        """Whether another batch may be made."""
        waiting = [item.rows.memory_bytes for item in self.items.values() if isinstance(item, TextBatch)]
        return len(waiting) < AHEAD_BATCHES and sum(waiting) < AHEAD_BYTES

    def drop_consumed(self) -> None:
        """Drop the items that no rank will ask for again."""
        oldest = min(self.requested.values(), default=self.produced)
        for number in [number for number in self.items if number < oldest]:
            del self.items[number]


class _Closed(Exception):
    """Ends the making of batches that no rank waits for."""


class BatchServer:
    """Serves batches to all ranks of a group. Calls of ranks wait in threads of their own; so does each stream."""

    def __init__(self, chunks: ChunkSource, world_size: int) -> None:
        self._chunks, self._world_size = chunks, world_size
        self._streams: dict[BatchRequest, _Stream] = {}
        self._changed = threading.Condition()
        self._producing = threading.Lock()

    def get(self, rank: int, request: BatchRequest, slots: range, number: int) -> list[Item]:
        """The items of a stream from `number` (from 0) on that are there, batches as the rows in `slots`; waits for the
        first. Says also that the rank has all items before. Empty for a rank that has closed the stream."""
        with self._changed:
            stream = self._streams.get(request)
            if stream is None:
                stream = self._streams[request] = _Stream(dict.fromkeys(range(self._world_size), 0))
                # A call for the stream that was closed last may still arrive; older ones are not asked for again.
                closed = [request for request, stream in self._streams.items() if not stream.requested]
                for old in closed[:-1]:
                    del self._streams[old]
                threading.Thread(target=self._produce, args=(request, stream), name="batches", daemon=True).start()
            if rank in stream.requested:
                stream.requested[rank] = number
                stream.drop_consumed()
                self._changed.notify_all()
            self._changed.wait_for(lambda: number < stream.produced or rank not in stream.requested)
            if rank not in stream.requested:
                return []
            items = [stream.items[each] for each in range(number, stream.produced)]
        return [
            replace(item, rows=item.rows.slice(slots.start, slots.stop)) if isinstance(item, TextBatch) else item
            for item in items
        ]

    def close(self, rank: int, request: BatchRequest) -> None:
        """The rank takes no more of a stream."""
        with self._changed:
            stream = self._streams.get(request)
            if stream is not None:
                stream.requested.pop(rank, None)
                stream.drop_consumed()
                self._changed.notify_all()

    def as_reported(self, error: Exception) -> Exception:
        """The error that ranks raise where batches could not be made because of `error`."""
        if isinstance(error, HrmRayError):
            return error
        return RuntimeError(f"batches could not be made:\n{''.join(traceback.format_exception(error))}")

    def _produce(self, request: BatchRequest, stream: _Stream) -> None:
        def filling(rows: int, wanted: int) -> None:
            # No back-pressure: the buffer's size is the bound.
            self._publish(stream, Filling(rows, wanted))

        try:
            # One stream at a time: the next epoch may be asked for while the last batches of this one are in use.
            with self._producing:
                reader = BatchReader(self._chunks, request, range(request.rows), filling)
                try:
                    while True:
                        self._wait_for_room(stream)
                        batch = reader.next()
                        self._publish(stream, batch)
                        if batch.ended:
                            return
                finally:
                    reader.close()
        except _Closed:
            return
        except Exception as error:  # noqa: BLE001 - the thread's edge: the ranks raise it
            with suppress(_Closed):
                self._publish(stream, self.as_reported(error))

    def _wait_for_room(self, stream: _Stream) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not stream.requested or stream.has_room())
            if not stream.requested:
                raise _Closed

    def _publish(self, stream: _Stream, item: Item) -> None:
        with self._changed:
            if not stream.requested:
                raise _Closed
            stream.items[stream.produced] = item
            stream.produced += 1
            self._changed.notify_all()


class ServerCalls(Protocol):
    """Calls of a BatchServer's methods in another process."""

    def get(self, rank: int, request: BatchRequest, slots: range, number: int) -> Any:
        """Send the call; returns at once what `result` takes."""

    def result(self, call: Any) -> list[Item]:
        """Wait for the answer of `get`."""

    def close(self, rank: int, request: BatchRequest) -> None:
        """Send the call; there is no answer."""


class ServedBatches:
    """A rank's BatchSource: its rows come from a BatchServer. The next ones are asked for while these are in use."""

    shared = True

    def __init__(self, calls: ServerCalls, rank: int) -> None:
        self._calls, self._rank = calls, rank

    def batches(self, request: BatchRequest, slots: range, on_fill: OnFill) -> Batches:
        """See BatchSource."""
        return _Received(self._calls, self._rank, request, slots, on_fill)


class _Received:
    """Batches of one request, as they come."""

    def __init__(self, calls: ServerCalls, rank: int, request: BatchRequest, slots: range, on_fill: OnFill) -> None:
        self._calls, self._rank, self._request, self._slots, self._on_fill = calls, rank, request, slots, on_fill
        self._items: deque[Item] = deque()
        self._received = 0
        self._asked: Any = None
        self._last: Item | None = None
        """What is given after the end of the stream, once that has come."""

    def next(self) -> TextBatch:
        """See Batches."""
        while True:
            item = self._next_item()
            if isinstance(item, Filling):
                self._on_fill(item.rows, item.wanted)
            elif isinstance(item, Exception):
                raise item
            else:
                return item

    def close(self) -> None:
        """See Batches."""
        if self._asked is not None:
            self._calls.close(self._rank, self._request)

    def _next_item(self) -> Item:
        if self._items:
            return self._items.popleft()
        if self._last is not None:
            return self._last
        if self._asked is None:
            self._ask()
        self._items.extend(self._calls.result(self._asked))
        if not self._items:
            raise RuntimeError("batches were asked for after the stream was closed")
        self._received += len(self._items)
        newest = self._items[-1]
        if isinstance(newest, Exception):
            self._last = newest
        elif isinstance(newest, TextBatch) and newest.ended:
            self._last = replace(newest, consumed=(), notes=())
        else:
            self._ask()
        return self._items.popleft()

    def _ask(self) -> None:
        self._asked = self._calls.get(self._rank, self._request, self._slots, self._received)
