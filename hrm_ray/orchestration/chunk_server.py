"""An actor that reads and tokenises text once for all ranks, by Ray Data, and sends each rank the rows that it trains.

Only this actor writes the catalog and the cache.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import chain
from typing import Any

import ray
import ray.exceptions

from hrm_ray.data.batch_server import BatchServer, Item
from hrm_ray.data.batches import BatchRequest
from hrm_ray.data.chunk_source import Chunk, ChunkSlot
from hrm_ray.errors import HrmRayError, unreadable_if_away
from hrm_ray.orchestration.datasets import ChunkResult, ChunkTaskContext, chunks_from, chunks_of
from hrm_ray.orchestration.failures import actor_lost, shortage


class ChunkServer(BatchServer):
    """The actor."""

    def __init__(self, context: ChunkTaskContext, world_size: int) -> None:
        super().__init__(ClusterChunks(context), world_size)

    def as_reported(self, error: Exception) -> Exception:
        """See BatchServer."""
        if isinstance(error, HrmRayError):
            return unreadable_if_away(error)
        return shortage(error) or super().as_reported(error)


class ClusterChunks:
    """A ChunkSource: chunks that tasks of the cluster make, those of one stream at a time."""

    def __init__(self, context: ChunkTaskContext) -> None:
        self._context = context
        self._pipeline = context.pipeline(writes=True)

    def chunks(self, epoch: int, position: int) -> Generator[Chunk, None, None]:
        """See ChunkSource: from the cache where it has all chunks, else from Ray Data."""
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


class ActorCalls:
    """ServerCalls of a ChunkServer."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def get(self, rank: int, request: BatchRequest, slots: range, number: int) -> Any:
        """See ServerCalls."""
        return self._server.get.remote(rank, request, slots, number)

    def result(self, call: Any) -> list[Item]:
        """See ServerCalls. Raises ResourceError where Ray ran out of memory or disk, WorkerCrash where the actor is
        lost."""
        try:
            items: list[Item] = ray.get(call)
        except ray.exceptions.RayActorError as error:
            raise actor_lost("the actor that makes chunks of text", "") from error
        except ray.exceptions.RayError as error:
            raise shortage(error) or error from error
        return items

    def close(self, rank: int, request: BatchRequest) -> None:
        """See ServerCalls."""
        self._server.close.remote(rank, request)
