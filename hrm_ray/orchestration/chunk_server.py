"""One actor that hands tokenised chunks to all ranks: each chunk is read and tokenised once in the cluster.

One job: the streams of epochs. All ranks walk through the same chunks in the same order; a chunk waits until each of
them has taken it, and only a few are made ahead. Catalog and cache are written here and nowhere else. How chunks are
made is datasets.py's matter; which sequences a rank takes of a chunk, its loader's.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import ray

from hrm_ray.data.chunk_source import AHEAD, Chunk, ChunkPipeline, ChunkSlot, EpochOrder
from hrm_ray.errors import HrmRayError
from hrm_ray.orchestration.datasets import ChunkTaskContext, each_of, read_on

Key = tuple[int, int]
"""Epoch, and position in its order that a stream begins at."""


@dataclass(frozen=True)
class Unforeseen:
    """An error of the making of chunks that nobody foresaw, as its traceback."""

    trace: str


@dataclass
class _Stream:
    """An epoch being served: answers by their number, and how many each rank has asked for."""

    asked: dict[int, int]
    left: set[int] = field(default_factory=set)
    answers: dict[int, Any] = field(default_factory=dict)
    made: int = 0

    @property
    def oldest(self) -> int:
        """The first answer that some rank may still ask for."""
        return min(self.asked.values(), default=self.made)


class ChunkServer:
    """Runs as an actor with a thread for each rank's call; a stream is made in a thread of its own."""

    def __init__(self, place: ChunkTaskContext, world_size: int) -> None:
        self._place, self._world_size = place, world_size
        self._pipeline: ChunkPipeline = place.pipeline(writes=True)
        self._order: EpochOrder = place.text.epoch_order
        self._in_order = place.text.in_order
        self._streams: dict[Key, _Stream] = {}
        self._changed = threading.Condition()
        self._making = threading.Lock()

    def get(self, rank: int, key: Key, number: int) -> Any:
        """Answer `number` (from 0) of a stream; waits until it is made."""
        with self._changed:
            stream = self._streams.get(key)
            if stream is None:
                stream = self._streams[key] = _Stream(dict.fromkeys(range(self._world_size), 0))
                self._trim()
                threading.Thread(target=self._make, args=(key, stream), name="chunks", daemon=True).start()
            if rank not in stream.left:
                stream.asked[rank] = number
            self._forget(stream)
            self._changed.notify_all()
            self._changed.wait_for(lambda: number in stream.answers or rank in stream.left)
            return stream.answers.get(number)

    def leave(self, rank: int, key: Key) -> None:
        """The rank wants no more of a stream."""
        with self._changed:
            stream = self._streams.get(key)
            if stream is None:
                return
            stream.left.add(rank)
            stream.asked.pop(rank, None)
            self._forget(stream)
            self._changed.notify_all()

    def _trim(self) -> None:
        """Drop streams that all ranks have left, except the newest: a call of theirs may still be on its way."""
        over = [key for key, stream in self._streams.items() if not stream.asked]
        for key in over[:-1]:
            del self._streams[key]

    def _forget(self, stream: _Stream) -> None:
        for number in [number for number in stream.answers if number < stream.oldest]:
            del stream.answers[number]

    def _make(self, key: Key, stream: _Stream) -> None:
        try:
            # One stream at a time: the next epoch may be asked for while the last chunks of this one are on their way.
            with self._making:
                for chunk in self._chunks(key):
                    if not self._answer(stream, [ray.put(chunk)]):
                        return
                self._answer(stream, None)
        except HrmRayError as error:
            self._answer(stream, error)
        except Exception:  # noqa: BLE001 - the thread's edge: whatever it is, the ranks tell it
            self._answer(stream, Unforeseen(traceback.format_exc()))

    def _answer(self, stream: _Stream, answer: Any) -> bool:
        """Put an answer where the ranks find it, once there is room; False where nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(lambda: not stream.asked or stream.made - stream.oldest < AHEAD)
            if not stream.asked:
                return False
            stream.answers[stream.made] = answer
            stream.made += 1
            self._changed.notify_all()
            return True

    def _chunks(self, key: Key) -> Iterator[Chunk]:
        """The chunks of a stream: out of the cache where all of them are there, else made by Ray Data."""
        pipeline, slots = self._pipeline, self._order.slots(self._pipeline.catalog, *key)
        if pipeline.catalog.ended and all(pipeline.is_cached(number) for number in range(len(pipeline.catalog))):
            for slot in slots:
                chunk = pipeline.get(slot.number)
                if chunk is None:
                    return
                yield slot.assign(chunk)
            return
        if self._in_order:
            first = next(slots)
            pipeline.scan(first.number)
            yield from self._taken(chain([first], slots), read_on(self._place, first.number))
            pipeline.catalog.end()
            return
        wanted = list(slots)
        missing = [slot for slot in wanted if not pipeline.is_cached(slot.number)]
        entries = [pipeline.catalog.entries[slot.number] for slot in missing]
        made = self._taken(iter(missing), each_of(self._place, entries))
        of_missing = {slot.number for slot in missing}
        for slot in wanted:
            if slot.number in of_missing:
                yield next(made)
            else:
                kept = pipeline.get(slot.number)
                assert kept is not None, "it is known"
                yield slot.assign(kept)

    def _taken(self, slots: Iterator[ChunkSlot], made: Iterator[tuple[int, Any]]) -> Iterator[Chunk]:
        """What the tasks have made, entered into catalog and cache."""
        for number, content in made:
            slot = next(slots)
            assert slot.number == number, "Ray Data keeps the order"
            if isinstance(content, HrmRayError):
                raise content
            chunk = self._pipeline.get(number) if content is None else self._pipeline.commit(content)
            assert chunk is not None, "it is known"
            yield slot.assign(chunk)


class RemoteChunks:
    """Chunks as a rank gets them from the ChunkServer; the next one is asked for while this one is trained on."""

    shared = True

    def __init__(self, server: Any, rank: int) -> None:
        self._server, self._rank = server, rank

    def chunks(self, epoch: int, position: int) -> Generator[Chunk, None, None]:
        """See ChunkSource. Raises what the making of a chunk raised."""
        key = (epoch, position)
        number = 0
        promise = self._server.get.remote(self._rank, key, number)
        try:
            while True:
                answer = ray.get(promise)
                if isinstance(answer, HrmRayError):
                    raise answer
                if isinstance(answer, Unforeseen):
                    raise RuntimeError(f"chunks could not be made:\n{answer.trace}")
                if answer is None:
                    return
                number += 1
                promise = self._server.get.remote(self._rank, key, number)
                yield ray.get(answer[0])
        finally:
            self._server.leave.remote(self._rank, key)
