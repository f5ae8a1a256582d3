"""An actor that serves tokenised chunks to all ranks, so that each chunk is read and tokenised once in the cluster.

All ranks read the same stream of chunks. A chunk is kept until every rank has it, and at most AHEAD chunks are made
before the slowest rank asks for them. Only this actor writes the catalog and the cache.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import ray
import ray.exceptions

from hrm_ray.data.chunk_source import AHEAD, Chunk, ChunkSlot
from hrm_ray.errors import HrmRayError, unreadable_if_away
from hrm_ray.orchestration.datasets import ChunkResult, ChunkTaskContext, chunks_from, chunks_of
from hrm_ray.orchestration.failures import actor_lost, shortage

StreamKey = tuple[int, int]
"""Epoch, and the position in its order at which a stream begins."""


@dataclass
class _Stream:
    """A stream of an epoch. An item is a chunk's object reference in a list, an error, or None at the end."""

    requested: dict[int, int]
    """The number of the item that each rank has asked for last; without the ranks that have closed the stream."""
    items: dict[int, Any] = field(default_factory=dict)
    produced: int = 0

    @property
    def oldest(self) -> int:
        """The first item that some rank may still ask for."""
        return min(self.requested.values(), default=self.produced)


class ChunkServer:
    """The actor. Calls of ranks wait in threads of their own; so does the production of a stream."""

    def __init__(self, context: ChunkTaskContext, world_size: int) -> None:
        self._context, self._world_size = context, world_size
        self._pipeline = context.pipeline(writes=True)
        self._streams: dict[StreamKey, _Stream] = {}
        self._changed = threading.Condition()
        self._producing = threading.Lock()

    def get(self, rank: int, key: StreamKey, number: int) -> Any:
        """Item `number` (from 0) of a stream; waits until it is there. None for a rank that has closed the stream."""
        with self._changed:
            stream = self._streams.get(key)
            if stream is None:
                stream = self._streams[key] = _Stream(dict.fromkeys(range(self._world_size), 0))
                # A call for the stream that was closed last may still arrive; older ones are not asked for again.
                closed = [key for key, stream in self._streams.items() if not stream.requested]
                for old in closed[:-1]:
                    del self._streams[old]
                threading.Thread(target=self._produce, args=(key, stream), name="chunks", daemon=True).start()
            if rank in stream.requested:
                stream.requested[rank] = number
                self._drop_consumed(stream)
            self._changed.wait_for(lambda: number in stream.items or rank not in stream.requested)
            return stream.items.get(number)

    def close(self, rank: int, key: StreamKey) -> None:
        """The rank reads no more of a stream."""
        with self._changed:
            stream = self._streams.get(key)
            if stream is not None:
                stream.requested.pop(rank, None)
                self._drop_consumed(stream)

    def _drop_consumed(self, stream: _Stream) -> None:
        for number in [number for number in stream.items if number < stream.oldest]:
            del stream.items[number]
        self._changed.notify_all()

    def _produce(self, key: StreamKey, stream: _Stream) -> None:
        try:
            # One stream at a time: the next epoch may be asked for while the last chunks of this one are in use.
            with self._producing:
                for chunk in self._chunks(*key):
                    if not self._publish(stream, [ray.put(chunk)]):
                        return
                self._publish(stream, None)
        except HrmRayError as error:
            self._publish(stream, unreadable_if_away(error))
        except Exception as error:  # noqa: BLE001 - the thread's edge: the ranks raise it
            trace = traceback.format_exc()
            self._publish(stream, shortage(error) or RuntimeError(f"chunks could not be made:\n{trace}"))

    def _publish(self, stream: _Stream, item: Any) -> bool:
        """Add an item once there is room; False where all ranks have closed the stream."""
        with self._changed:
            self._changed.wait_for(lambda: not stream.requested or stream.produced - stream.oldest < AHEAD)
            if not stream.requested:
                return False
            stream.items[stream.produced] = item
            stream.produced += 1
            self._changed.notify_all()
            return True

    def _chunks(self, epoch: int, position: int) -> Iterator[Chunk]:
        """The chunks of a stream, from the cache where it has all of them, else from Ray Data."""
        pipeline, text = self._pipeline, self._context.text
        catalog = pipeline.catalog
        slots = text.epoch_order.slots(catalog, epoch, position)
        if pipeline.all_cached:
            for slot in slots:
                chunk = pipeline.get(slot.number)
                if chunk is None:
                    return
                yield slot.assign(chunk)
        elif text.in_order:
            first = next(slots)
            pipeline.scan(first.number)
            yield from self._committed(chain([first], slots), chunks_from(self._context, first.number))
            catalog.end()
        else:
            # All slots are listed before the first chunk is made: which chunks are cached changes meanwhile.
            listed = [(slot, pipeline.is_cached(slot.number)) for slot in slots]
            missing = [slot for slot, cached in listed if not cached]
            entries = [catalog.entries[slot.number] for slot in missing]
            made = self._committed(iter(missing), chunks_of(self._context, entries))
            for slot, cached in listed:
                yield slot.assign(self._known(slot.number)) if cached else next(made)

    def _committed(self, slots: Iterator[ChunkSlot], results: Iterator[tuple[int, ChunkResult]]) -> Iterator[Chunk]:
        """The results of tasks as chunks, committed to catalog and cache."""
        for number, result in results:
            slot = next(slots)
            if slot.number != number:
                raise RuntimeError(f"Ray Data gave chunk {number} in place of {slot.number}")
            if isinstance(result, HrmRayError):
                raise result
            yield slot.assign(self._known(number) if result is None else self._pipeline.commit(result))

    def _known(self, number: int) -> Chunk:
        chunk = self._pipeline.get(number)
        if chunk is None:
            raise RuntimeError(f"chunk {number} is in the catalog, but not in the corpus")
        return chunk


class RemoteChunks:
    """A rank's ChunkSource: chunks from the ChunkServer. The next chunk is requested while this one is in use."""

    shared = True

    def __init__(self, server: Any, rank: int) -> None:
        self._server, self._rank = server, rank

    def chunks(self, epoch: int, position: int) -> Generator[Chunk, None, None]:
        """See ChunkSource. Raises the error that ended the stream."""
        key = (epoch, position)
        number = 0
        item = self._server.get.remote(self._rank, key, number)
        try:
            while (found := _fetch(item)) is not None:
                if isinstance(found, Exception):
                    raise found
                number += 1
                item = self._server.get.remote(self._rank, key, number)
                yield _fetch(found[0])
        finally:
            self._server.close.remote(self._rank, key)


def _fetch(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
        raise actor_lost("the actor that makes chunks of text", "") from error
    except ray.exceptions.RayError as error:
        raise shortage(error) or error from error
