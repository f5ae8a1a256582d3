"""Ray Data pipelines that read and tokenise chunks, as tasks on whatever CPUs are free.

One job: numbers of chunks -> tokenised chunks in the same order, with bounded buffers. Where a corpus can be read from
anywhere and its catalog is whole, each chunk is a task of its own; else one task reads on and on, and others tokenise
what it has read. It keeps nothing and serves nobody: see chunk_server.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hrm_ray.data.catalog import ChunkEntry
from hrm_ray.data.chunk_source import Chunk, ChunkPipeline
from hrm_ray.data.chunks import RawChunk, read_chunks
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.text_data import TextDataDir, TextPlan, corpus_of
from hrm_ray.data.text_store import tokenise
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import HrmRayError
from hrm_ray.rundir import RunDir

READ_CPUS, TOKEN_CPUS = 0.4, 0.5
"""What a task that reads on, and one that tokenises, take of a CPU. Ray would make one task of both stages if they were
alike, and nothing would be tokenised while something is read."""
TASK_CPUS = 1.0
"""Both kinds of task must find room, or they would wait for each other."""
CHUNKS_AT_ONCE = 1000
"""Ray Data lists all tasks of a dataset before it begins; a longer epoch is several datasets, one after the other."""
BLOCK_BYTES = 1 << 20
"""A task hands on what it has made once it is so large; most chunks are."""

Batch = dict[str, npt.NDArray[Any]]
Made = Chunk | HrmRayError | None
"""What came of a chunk: its tokens, why it cannot be had, or None where it lies in the cache already."""


@dataclass(frozen=True)
class ChunkTaskContext:
    """Where tasks find what they need: the bundle, and the plan of its text. Compared by value, so that a process opens
    the same things once."""

    bundle: Path
    text: TextPlan

    @property
    def folder(self) -> TextDataDir:
        return TextDataDir(RunDir(self.bundle).data)

    def pipeline(self, *, writes: bool) -> ChunkPipeline:
        """What makes chunks in this process, with the catalog as it is now."""
        text = self.text
        return self.folder.pipeline(
            text.cut, text.source, _tokenizer(self.bundle), pairs=text.form.prefix, writes=writes
        )


@lru_cache(maxsize=2)
def _tokenizer(bundle: Path) -> TextTokenizer:
    return TextTokenizer.load(bundle)


@lru_cache(maxsize=2)
def _corpus(place: ChunkTaskContext) -> Corpus:
    return corpus_of(place.text.cut, place.text.source, place.folder.read_parts())


def read_on(place: ChunkTaskContext, first: int) -> Iterator[tuple[int, Made]]:
    """Chunks from number `first` on to the end of the corpus: one task reads, several tokenise."""

    def read(batch: Batch) -> Iterator[Batch]:
        pipeline = place.pipeline(writes=False)
        for number in count(int(batch["first"][0])):
            try:
                raw = None if pipeline.is_cached(number) else pipeline.read(number)
                if raw is None and not pipeline.is_cached(number):
                    return
            except HrmRayError as error:
                yield _row(number, error)
                return
            yield _row(number, raw)

    def tokens(batch: Batch) -> Batch:
        number, raw = _content(batch)
        return _row(number, _made(place, raw) if isinstance(raw, RawChunk) else raw)

    yield from _run([{"first": first}], (read, READ_CPUS), (tokens, TOKEN_CPUS))


def each_of(place: ChunkTaskContext, entries: Sequence[ChunkEntry]) -> Iterator[tuple[int, Made]]:
    """The chunks of `entries`, each read and tokenised in a task of its own."""

    def made(batch: Batch) -> Batch:
        number, entry = _content(batch)
        try:
            raw = next(read_chunks(_corpus(place), entry.start), None)
        except HrmRayError as error:
            return _row(number, error)
        return _row(number, None if raw is None else _made(place, raw))

    for begin in range(0, len(entries), CHUNKS_AT_ONCE):
        some = entries[begin : begin + CHUNKS_AT_ONCE]
        yield from _run([{"number": entry.number, "content": entry} for entry in some], (made, TOKEN_CPUS))


def _made(place: ChunkTaskContext, raw: RawChunk) -> Chunk:
    # Many tasks run beside each other: one thread each. Read by the tokenizer's library when it first computes.
    os.environ["RAYON_NUM_THREADS"] = "1"
    return Chunk(raw.entry, tokenise(raw.documents, _tokenizer(place.bundle), place.text.form.prefix), notes=raw.notes)


def _row(number: int, content: object) -> Batch:
    """One row of a pipeline; Ray carries objects of Python in it as they are."""
    column = np.empty(1, dtype=object)
    column[0] = content
    return {"number": np.array([number]), "content": column}


def _content(row: Batch) -> tuple[int, Any]:
    return int(row["number"][0]), row["content"][0]


def _run(items: list[dict[str, Any]], *stages: tuple[Any, float]) -> Iterator[tuple[int, Any]]:
    """What the stages, each with what a task of it takes of a CPU, make of the items, in order."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
    dataset: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=len(items))
    for work, cpus in stages:
        dataset = dataset.map_batches(work, batch_size=1, batch_format="numpy", num_cpus=cpus)
    for batch in dataset.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=1):
        yield _content(batch)
