"""What a training step takes of resident memory, in a process of its own.

One job: assemble a loop on random rows as the settings ask for it, take some steps, and print how far resident memory
rose above what it was before. `python -m tests.support.measured_memory` takes the case as JSON.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from hrm_ray.metrics.meters import peak_resident_bytes
from hrm_ray.model.config import ModelConfig, model_config
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.world import World
from hrm_ray.types import Columns

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2
"""The second has the optimizer's state beside it."""
DOCUMENT = 300
"""Tokens of a document in a long row: so many that no chunk of a row has one alone, which would spare its masks."""
SMALL: dict[str, str | bool] = {"--hidden-size": "32", "--num-heads": "2", "--num-layers": "2", "--batch-size": "2"}


def case_of(options: dict[str, str | bool], vocab_size: int) -> tuple[RunSettings, ModelConfig]:
    """Settings and architecture of a case: options as on the command line, with --task and --max-seq-len said."""
    task: Any = options["--task"]
    settings = resolve_task(load_settings(options), task, int(options["--max-seq-len"]))
    return settings, model_config(settings, vocab_size)


class RandomRows:
    """Rows of random tokens; text in two documents a row or more where it is packed."""

    def __init__(self, config: ModelConfig, packing: bool) -> None:
        self.config = config
        self.packing = packing

    def __len__(self) -> int:
        return 10_000

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        shape = (len(indices), self.config.seq_len)
        tokens = np.random.default_rng(0).integers(1, self.config.vocab_size, shape).astype(np.int32)
        columns: Columns = {"inputs": tokens, "labels": tokens, "active": np.ones(len(indices), dtype=np.bool_)}
        if self.config.task == "puzzle":
            return columns | {"puzzle_identifiers": np.zeros(len(indices), dtype=np.int32)}
        document = np.arange(shape[1], dtype=np.int32) // min(shape[1] // 2, DOCUMENT) * self.packing
        return columns | {"documents": np.broadcast_to(document, shape)}


def loop_of(options: dict[str, str | bool], vocab_size: int) -> TrainingLoop:
    settings, config = case_of(options, vocab_size)
    # Freed memory goes back to the system, so that what is resident is what is alive.
    world = World.here("cpu", 1, keep_freed=False)
    return assemble(settings, config, RandomRows(config, settings.data.packing), world, 1000)


def measure(options: dict[str, str | bool], vocab_size: int) -> int:
    """Bytes that resident memory rises by, over a process that has all libraries loaded; Linux only."""
    small = loop_of({**options, **SMALL}, 64)
    small.step()
    small.step()
    del small
    gc.collect()
    # Begins the process's high-water mark anew (Linux, proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    base = psutil.Process().memory_info().rss
    loop = loop_of(options, vocab_size)
    for _ in range(STEPS):
        loop.step()
    return peak_resident_bytes() - base


def measured_bytes(options: dict[str, str | bool], vocab_size: int) -> int:
    """`measure` in a fresh process on one thread."""
    words = [sys.executable, "-m", "tests.support.measured_memory", json.dumps([options, vocab_size])]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(measure(*json.loads(sys.argv[1])))
