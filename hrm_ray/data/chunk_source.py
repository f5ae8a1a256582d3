"""Tokenised chunks in the order of an epoch, made on demand.

A text loader reads from a ChunkSource. LocalChunks reads and tokenises in this process, in a thread that stays a chunk
or two ahead of training (the tokenizer releases the GIL).
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

from hrm_ray.data.catalog import Catalog, ChunkEntry, changed
from hrm_ray.data.chunks import FIRST, CorpusHead, RawChunk, read_chunks
from hrm_ray.data.corpus import Corpus, CorpusReading
from hrm_ray.data.order import ChunkOrder
from hrm_ray.data.text_store import ChunkCache, TextStore, tokenise
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.types import StopPoll, StopReason, StopRequested

AHEAD = 2
"""Chunks that are read and tokenised before they are asked for."""
_AHEAD_BYTES = 16 << 20
"""Of large chunks fewer: no other is made while so many bytes of tokens wait."""
STOP_CHECK_INTERVAL_S = 0.2
"""How often a stop is looked for while a chunk is awaited."""


@dataclass(frozen=True)
class Chunk:
    """A tokenised chunk: its catalog entry, its tokens, its position in the epoch's order, whether it is the last of
    its block in this order, and warnings about its rows."""

    entry: ChunkEntry
    store: TextStore
    position: int = 0
    ends_block: bool = False
    notes: tuple[str, ...] = ()


class ChunkSource(Protocol):
    """Chunks of any epoch, from any position of its order on."""

    def chunks(self, epoch: int, position: int) -> Generator[Chunk, None, None]:
        """The chunks from `position` to the end of the epoch. Close the iterator if it is not exhausted."""


class _Unwanted(Exception):
    """Ends the reading of a chunk for which nothing waits any more."""


class ChunkPipeline:
    """Reads and tokenises chunks, through the catalog and the cache; used by one thread at a time."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: TextTokenizer,
        catalog: Catalog,
        cache: ChunkCache,
        *,
        pairs: bool,
        head: CorpusHead | None = None,
    ) -> None:
        """`head`: the first chunks, where they were read already; later ones are read with its `on_read`."""
        self.corpus, self.tokenizer, self.catalog, self.cache, self.pairs = corpus, tokenizer, catalog, cache, pairs
        self._on_read = None if head is None else head.on_read
        self._reading = None if head is None else iter(head)
        self._next = 0
        self._unwanted = False
        self._cache_reported = False
        self.warnings: list[str] = []
        """Warnings about the chunks that were committed here."""

    def get(self, number: int) -> Chunk | None:
        """Chunk `number`, None after the last one. Earlier chunks that the catalog does not know are read first.

        Raises DataError for a bad row, or a corpus that has changed.
        """
        entry = self.catalog.get(number)
        if entry is not None:
            cached = self.cache.load(self._key(entry))
            if cached is not None:
                return Chunk(entry, cached)
        raw = self.read(number)
        if raw is None:
            return None
        return self.commit(Chunk(raw.entry, tokenise(raw.documents, self.tokenizer, self.pairs), notes=raw.notes))

    def commit(self, chunk: Chunk) -> Chunk:
        """Enter a chunk, tokenised here or elsewhere, into the catalog, and into the cache if there is room."""
        self.catalog.add(chunk.entry)
        self.cache.add(self._key(chunk.entry), chunk.store)
        notes = (*chunk.notes, *self._about_cache())
        self.warnings += notes
        return replace(chunk, notes=notes)

    def is_cached(self, number: int) -> bool:
        """Whether the cache holds a chunk of the catalog."""
        entry = self.catalog.get(number)
        return entry is not None and self.cache.contains(self._key(entry))

    @property
    def all_cached(self) -> bool:
        """Whether the cache holds all chunks of the corpus."""
        return self.catalog.ended and all(self.is_cached(number) for number in range(len(self.catalog)))

    def scan(self, before: int | None = None) -> None:
        """Read what the catalog does not know yet, without tokenising: up to chunk `before`, or to the end of the
        corpus."""
        while not self.catalog.ended and (before is None or len(self.catalog) < before):
            self.read(len(self.catalog))

    def find(self, block: int, chunk: int) -> ChunkEntry | None:
        """The entry of a chunk by block and number in the block, reading as far as needed; None if there is no such
        chunk."""
        number = 0
        while True:
            if self.catalog.get(number) is None and (self.catalog.ended or self.read(number) is None):
                return None
            entry = self.catalog.entries[number]
            if (entry.start.block, entry.start.chunk) == (block, chunk):
                return entry
            if entry.start.block > block:
                return None
            number += 1

    def read(self, number: int) -> RawChunk | None:
        """Chunk `number` as documents, None after the last one.

        If it follows the chunk read last, reading continues from there. Raises as `get`.
        """
        self.scan(before=number)
        if self.catalog.ended and number >= len(self.catalog):
            return None
        if self._reading is None or self._next != number:
            self._reading = self._read_from(number)
        try:
            raw = next(self._reading, None)
        except BaseException:
            self._reading = None  # it has ended, though not the corpus
            raise
        self._next = number + 1
        if raw is None:
            self._reading = None
            known = self.catalog.get(number)
            if known is not None:
                raise changed(known.name, "its rows are gone")
            self.catalog.end()
            return None
        self.catalog.add(raw.entry)
        if raw.entry.after is not None and raw.entry.after.part == len(self.corpus.parts):
            self.catalog.end()
        return raw

    def _read_from(self, number: int) -> Iterator[RawChunk]:
        """The chunks from `number` on, which is at most the first one that the catalog does not know."""
        entry = self.catalog.get(number)
        last = self.catalog.entries[-1] if len(self.catalog) else None
        start = entry.start if entry is not None else FIRST if last is None else last.next or last.start
        chunks = read_chunks(self.corpus, start, CorpusReading(self.corpus, start.place, self._check_wanted))
        if start.number < number:
            # A catalog of an earlier version does not say where its last chunk ends: read that chunk again.
            again = next(chunks, None)
            if again is not None:
                self.catalog.add(again.entry)
        return chunks

    @contextmanager
    def unwanted(self) -> Iterator[None]:
        """While the block waits for the thread that reads, reading ends at the next row, in the middle of a chunk."""
        self._unwanted = True
        try:
            yield
        finally:
            self._unwanted = False

    def close(self) -> None:
        """Release the catalog's file."""
        self.catalog.close()

    def _check_wanted(self, reading: CorpusReading) -> None:
        if self._unwanted:
            raise _Unwanted
        if self._on_read is not None:
            self._on_read(reading)

    def _key(self, entry: ChunkEntry) -> str:
        """The cache key: everything that determines a chunk's tokens."""
        plain = f"{entry.fingerprint} {self.tokenizer.fingerprint} {self.pairs} {self.corpus.ascii_only}"
        return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()

    def _about_cache(self) -> tuple[str, ...]:
        if self.cache.refusal is None or self._cache_reported:
            return ()
        self._cache_reported = True
        return (f"{self.cache.refusal}.",)


@dataclass(frozen=True)
class ChunkSlot:
    """The number of the chunk at a position of an epoch, and whether a block ends with it (None: see its entry)."""

    position: int
    number: int
    ends_block: bool | None

    def assign(self, chunk: Chunk) -> Chunk:
        """The chunk, with this slot's position."""
        ends_block = chunk.entry.ends_block if self.ends_block is None else self.ends_block
        return replace(chunk, position=self.position, ends_block=ends_block)


@dataclass(frozen=True)
class EpochOrder:
    """In which order epochs take the chunks of a corpus: that of the corpus, or `shuffled` by (seed, epoch).

    The first epoch leaves out the chunks before number `start`.
    """

    seed: int
    shuffled: bool
    start: int = 0

    def slots(self, catalog: Catalog, epoch: int, position: int) -> Iterator[ChunkSlot]:
        """The slots from a position of the epoch. In corpus order the iterator is endless; a shuffled epoch needs a
        complete catalog."""
        first = self.start if epoch == 0 else 0
        if not self.shuffled:
            for number in count(max(position, first)):
                yield ChunkSlot(number, number, None)
            return
        order = ChunkOrder(self.seed, epoch, catalog.block_sizes())
        last: ChunkSlot | None = None
        for place in range(position, len(order)):
            number, ends_block = order.at(place)
            if number >= first:
                if last is not None:
                    yield last
                last = ChunkSlot(place, number, False)
            # A block ends with the last of its chunks that is taken, which need not be the last of all.
            if ends_block and last is not None:
                yield replace(last, ends_block=True)
                last = None


class LocalChunks:
    """Chunks that are read and tokenised in this process, by a thread that stays at most AHEAD chunks ahead."""

    def __init__(self, pipeline: ChunkPipeline, order: EpochOrder, stop: StopPoll = lambda: None) -> None:
        """`stop` is polled while a chunk is awaited. Ranks that must agree on a stop leave it out."""
        self._pipeline, self._order, self._stop = pipeline, order, stop

    def chunks(self, epoch: int, position: int) -> Generator[Chunk, None, None]:
        """See ChunkSource. An error of a chunk is raised when that chunk is asked for; StopRequested ends the
        chunks."""
        ahead = _Prefetcher(self._chunks(epoch, position), self._stop)
        try:
            yield from ahead
        finally:
            with self._pipeline.unwanted():
                ahead.close()

    def _chunks(self, epoch: int, position: int) -> Iterator[Chunk]:
        for slot in self._order.slots(self._pipeline.catalog, epoch, position):
            chunk = self._pipeline.get(slot.number)
            if chunk is None:
                return
            yield slot.assign(chunk)
            # Not kept while the next one is made.
            del chunk


class InMemoryChunks:
    """All chunks of the corpus in memory, read before the first is asked for."""

    def __init__(self, pipeline: ChunkPipeline, order: EpochOrder) -> None:
        self._order, self._catalog = order, pipeline.catalog
        self._chunks: list[Chunk] = []
        while (chunk := pipeline.get(len(self._chunks))) is not None:
            self._chunks.append(chunk)

    def chunks(self, epoch: int, position: int) -> Generator[Chunk, None, None]:
        """See ChunkSource."""
        for slot in self._order.slots(self._catalog, epoch, position):
            if slot.number >= len(self._chunks):
                return
            yield slot.assign(self._chunks[slot.number])


class _Prefetcher:
    """Reads an iterator in a thread, up to AHEAD items or _AHEAD_BYTES ahead."""

    def __init__(self, items: Iterator[Chunk], stop: StopPoll) -> None:
        self._items, self._stop = items, stop
        self._ready: deque[Chunk | BaseException | None] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="chunks", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            with self._changed:
                while not self._ready:
                    reason = self._stop()
                    # A resize waits for the next checkpoint.
                    if reason not in (None, StopReason.RESIZE):
                        raise StopRequested(reason)
                    self._changed.wait(STOP_CHECK_INTERVAL_S)
                item = self._ready.popleft()
                self._changed.notify_all()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            # Not kept while the next one is awaited.
            del item

    def close(self) -> None:
        """Stop the thread after its current item."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._has_room() and self._make_one():
                pass
        except BaseException as error:  # noqa: BLE001 - raised again where the item is asked for
            self._put(error)

    def _has_room(self) -> bool:
        """Waits until another item may be made; False where none is wanted any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._wants_more)
            return not self._closed

    @property
    def _wants_more(self) -> bool:
        waiting_bytes = sum(item.store.memory_bytes for item in self._ready if isinstance(item, Chunk))
        return len(self._ready) < AHEAD and waiting_bytes < _AHEAD_BYTES

    def _make_one(self) -> bool:
        """Whether there was another item."""
        item = next(self._items, None)
        self._put(item)
        return item is not None

    def _put(self, item: Chunk | BaseException | None) -> None:
        with self._changed:
            self._ready.append(item)
            self._changed.notify_all()
