"""The samples of claimed ranges on a machine that does not have the data: they come from the process that has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from hrm_ray.data.chunk_source import Chunk, ChunkPipeline
from hrm_ray.data.prepare import PuzzlePlan, open_puzzle_sets
from hrm_ray.data.text_data import TextDataDir
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataError, Fault
from hrm_ray.independent.bundle_files import Call
from hrm_ray.rundir import RunDir
from hrm_ray.train.claimed_rows import ClaimedPuzzles, ClaimedText
from hrm_ray.train.plan import RunPlan
from hrm_ray.types import Columns, SampleSet

CLOSE_S = 5.0
"""How long the end of a run waits for a chunk that is being read."""


class RowServer:
    """Chunks and puzzles of a run for trainers that do not see its data."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self._pipeline: ChunkPipeline | None = None
        self._puzzles: SampleSet | None = None
        self._closed = False

    @property
    def methods(self) -> Mapping[str, Callable[..., Any]]:
        """The calls by their names."""
        return {"chunk": self.chunk, "puzzle_count": self.puzzle_count, "puzzle_rows": self.puzzle_rows}

    def chunk(self, number: int) -> Chunk | None:
        """See ChunkReader."""
        with self._lock:  # a pipeline is used by one thread at a time
            if self._closed:
                raise DataError(Fault(f"chunk {number}", "is not read any more: the run ends", ""))
            if self._pipeline is None:
                if isinstance(self._plan.data, PuzzlePlan):
                    raise TypeError("puzzles have no chunks of text")
                text, run_dir = self._plan.data.text, RunDir(self._plan.bundle)
                tokenizer = TextTokenizer.of_bundle(run_dir.root)
                self._pipeline = TextDataDir(run_dir.data).pipeline(
                    text.chunking_config, text.source, tokenizer, pairs=text.form.prefix, writes=False
                )
            return self._pipeline.get(number)

    def puzzle_count(self) -> int:
        """How many training puzzles there are."""
        return len(self._opened())

    def puzzle_rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        """See SampleSet."""
        return self._opened().rows(indices)

    def close(self) -> None:
        """Release the data; what is being read ends at its next row."""
        self._closed = True
        pipeline = self._pipeline
        if pipeline is None:
            return
        with pipeline.unwanted():
            # Where the source does not answer, its thread ends with the process.
            if self._lock.acquire(timeout=CLOSE_S):
                pipeline.close()
                self._lock.release()

    def _opened(self) -> SampleSet:
        with self._lock:
            if self._puzzles is None:
                if not isinstance(self._plan.data, PuzzlePlan):
                    raise TypeError("text has no puzzles")
                self._puzzles = open_puzzle_sets(self._plan.data)[0]
            return self._puzzles


def sent_rows(plan: RunPlan, call: Call) -> ClaimedText | ClaimedPuzzles:
    """The samples of a run's claimed ranges, from a process that answers as `RowServer` does. Close it."""
    seed = plan.settings.run.seed
    if isinstance(plan.data, PuzzlePlan):
        return ClaimedPuzzles(_SentPuzzles(call), seed=seed, linear=plan.settings.data.linear_dataset)
    text = plan.data.text
    return ClaimedText(_SentChunks(call), text.form, plan.data.pad_id, seed=seed, shuffle_rows=text.shuffle_rows)


class _SentChunks:
    """A ChunkReader whose chunks come from a RowServer."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def get(self, number: int) -> Chunk | None:
        chunk: Chunk | None = self._call("chunk", number)
        return chunk

    @contextmanager
    def unwanted(self) -> Iterator[None]:
        yield  # a chunk that is on its way arrives, or the call ends with the other process

    def close(self) -> None:
        pass


class _SentPuzzles:
    """A SampleSet whose puzzles come from a RowServer."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._count: int = call("puzzle_count")

    def __len__(self) -> int:
        return self._count

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        columns: Columns = self._call("puzzle_rows", indices)
        # What comes from another process may be read-only, in memory that is shared.
        return {name: values.copy() for name, values in columns.items()}
