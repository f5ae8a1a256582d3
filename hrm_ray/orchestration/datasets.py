"""Ray Data pipelines that read and tokenise chunks in tasks, in order and with bounded buffers.

Where the catalog is whole and a corpus can be read from any chunk on, each chunk is a task of its own. Otherwise one
task reads the corpus and others tokenise what it has read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hrm_ray.data.catalog import ChunkEntry
from hrm_ray.data.chunk_source import Chunk, ChunkPipeline
from hrm_ray.data.chunks import RawChunk, read_chunks
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.text_data import TextDataDir, TextPlan, corpus_of
from hrm_ray.data.text_store import tokenise
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import HrmRayError, unreadable_if_away
from hrm_ray.rundir import RunDir

READ_CPUS, TOKEN_CPUS = 0.4, 0.5
"""CPUs of a task that reads and of one that tokenises. They differ, because Ray fuses stages of equal resources into
one task, which would read and tokenise in turn."""
TASK_CPUS = 1.0
"""CPUs that both kinds of task need at the same time, since each waits for the other."""
CHUNKS_PER_DATASET = 1000
"""Ray Data lists all tasks of a dataset before it begins, so a longer epoch is several datasets."""
BLOCK_BYTES = 1 << 20
"""A task passes its results on at this size; most chunks are larger."""

TaskBatch = dict[str, npt.NDArray[Any]]
ChunkResult = Chunk | HrmRayError | None
"""What a task returns for a chunk; None where it is in the cache already."""


@dataclass(frozen=True)
class ChunkTaskContext:
    """What a task opens: the bundle, and the plan of its text. Hashable, so that a process opens each once in a run."""

    bundle: Path
    text: TextPlan
    run: str
    """A token of the run. Ray uses the processes of tasks again, and another run may have replaced the bundle."""
    cpus: PlacementGroup | None = field(default=None, compare=False)
    """The CPUs that are reserved for the tasks; None where they take what is free."""

    @property
    def folder(self) -> TextDataDir:
        return TextDataDir(RunDir(self.bundle).data)

    def pipeline(self, *, writes: bool) -> ChunkPipeline:
        """A pipeline for this process, with the catalog as it is now."""
        text = self.text
        return self.folder.pipeline(
            text.chunking_config, text.source, _tokenizer(self), pairs=text.form.prefix, writes=writes
        )


@lru_cache(maxsize=2)
def _tokenizer(context: ChunkTaskContext) -> TextTokenizer:
    return TextTokenizer.load(context.bundle)


@lru_cache(maxsize=2)
def _corpus(context: ChunkTaskContext) -> Corpus:
    return corpus_of(context.text.chunking_config, context.text.source, context.folder.read_parts())


def chunks_from(context: ChunkTaskContext, first: int) -> Iterator[tuple[int, ChunkResult]]:
    """Chunks from number `first` to the end of the corpus: one task reads, several tokenise."""

    def read(batch: TaskBatch) -> Iterator[TaskBatch]:
        pipeline = context.pipeline(writes=False)
        for number in count(int(batch["first"][0])):
            try:
                raw = None if pipeline.is_cached(number) else pipeline.read(number)
                if raw is None and not pipeline.is_cached(number):
                    return
            except HrmRayError as error:
                yield _row(number, unreadable_if_away(error))
                return
            yield _row(number, raw)

    def tokenise_chunk(batch: TaskBatch) -> TaskBatch:
        number, raw = _content(batch)
        return _row(number, _tokenised(context, raw) if isinstance(raw, RawChunk) else raw)

    yield from _run(context.cpus, [{"first": first}], (read, READ_CPUS), (tokenise_chunk, TOKEN_CPUS))


def chunks_of(context: ChunkTaskContext, entries: Sequence[ChunkEntry]) -> Iterator[tuple[int, ChunkResult]]:
    """The chunks of `entries`, each read and tokenised in a task of its own."""

    def make(batch: TaskBatch) -> TaskBatch:
        number, entry = _content(batch)
        try:
            raw = next(read_chunks(_corpus(context), entry.start), None)
        except HrmRayError as error:
            return _row(number, unreadable_if_away(error))
        return _row(number, None if raw is None else _tokenised(context, raw))

    for begin in range(0, len(entries), CHUNKS_PER_DATASET):
        some = entries[begin : begin + CHUNKS_PER_DATASET]
        yield from _run(
            context.cpus, [{"number": entry.number, "content": entry} for entry in some], (make, TOKEN_CPUS)
        )


def _tokenised(context: ChunkTaskContext, raw: RawChunk) -> Chunk:
    # One thread per task, because many tasks run at once. The library reads the variable when it is first used.
    os.environ["RAYON_NUM_THREADS"] = "1"
    store = tokenise(raw.documents, _tokenizer(context), context.text.form.prefix)
    return Chunk(raw.entry, store, notes=raw.notes)


def _row(number: int, content: object) -> TaskBatch:
    """A batch of one row; in an object column Ray keeps Python objects as they are."""
    column = np.empty(1, dtype=object)
    column[0] = content
    return {"number": np.array([number]), "content": column}


def _content(row: TaskBatch) -> tuple[int, Any]:
    column = row["content"]
    # Ray makes a column of numbers (NaN) of one that holds None.
    return int(row["number"][0]), column[0] if column.dtype == object else None


def _run(
    reserved: PlacementGroup | None, items: list[dict[str, Any]], *stages: tuple[Any, float]
) -> Iterator[tuple[int, Any]]:
    """The results of the stages (a function, and the CPUs of a task) for the items, in order."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
    dataset: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=len(items))
    # Deprecated: Ray 2.64 will take no such argument. In 2.60 it is the only way to use reserved CPUs.
    placed: dict[str, Any] = (
        {} if reserved is None else {"scheduling_strategy": PlacementGroupSchedulingStrategy(reserved)}
    )
    for work, cpus in stages:
        dataset = dataset.map_batches(work, batch_size=1, batch_format="numpy", num_cpus=cpus, **placed)
    for batch in dataset.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=1):
        yield _content(batch)
