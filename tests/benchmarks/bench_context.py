"""Memory and time of a step on long texts, whole rows against chunks.

`python -m tests.benchmarks.bench_context` trains some steps on rows of random tokens of every length, each case in a
process of its own. It prints the peak memory above what was resident when the model stood, seconds per step (by the
clock, and of CPU time, which other load disturbs less) and the loss, as a table and as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from hrm_ray.model.config import model_config
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.world import World
from hrm_ray.types import Columns
from tests.benchmarks.bench_memory import peak_bytes
from tests.benchmarks.timing import Spent, machine, spent, table

VOCABULARY = 8192
LENGTHS = (4096, 16384, 65536)
WINDOW = 1024
MODEL: dict[str, Any] = {
    "task": "lm",
    "use_moe": False,
    "hidden_size": 128,
    "num_heads": 4,
    "h_layers": 1,
    "l_layers": 1,
    "supervision": "rollout",
    "halt_exploration_prob": 0.0,
    "loss": "softmax",
}
TIMEOUT_S = 7200.0


@dataclass(frozen=True)
class Way:
    """One way to train: settings of the sections model and memory."""

    about: str
    model: dict[str, Any]
    memory: dict[str, Any]


_CHUNKS = {"use_chunked_training": True, "chunk_size": 2048}
WAYS: dict[str, Way] = {
    "whole": Way("whole rows", {}, {}),
    "truncated": Way("chunks of 2048, truncated", {}, _CHUNKS),
    "exact": Way("chunks of 2048, exact", {}, _CHUNKS | {"chunk_gradients": "exact"}),
    "whole-window": Way(f"whole rows, window {WINDOW}", {"window_size": WINDOW}, {}),
    "truncated-window": Way(f"chunks, truncated, window {WINDOW}", {"window_size": WINDOW}, _CHUNKS),
    "exact-window": Way(
        f"chunks, exact, window {WINDOW}", {"window_size": WINDOW}, _CHUNKS | {"chunk_gradients": "exact"}
    ),
}


class LongRows:
    """A SampleSet of random tokens; labels are the next token."""

    def __init__(self, length: int) -> None:
        self.tokens = np.random.default_rng(0).integers(1, VOCABULARY, (2, length + 1)).astype(np.int32)

    def __len__(self) -> int:
        return 10**6

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        rows = self.tokens[np.maximum(indices, 0) % len(self.tokens)]
        return {"inputs": rows[:, :-1], "labels": rows[:, 1:], "active": indices >= 0}


def measure(way: str, length: int, steps: int, threads: int, amp: bool) -> None:
    """Train in this (fresh) process and print the measurements as JSON."""
    settings = RunSettings.model_validate(
        {
            "model": {**MODEL, **WAYS[way].model},
            "memory": {"amp": amp, **WAYS[way].memory},
            "optimizer": {"batch_size": 1, "warmup_steps": 0, "lr": 1e-3},
        }
    )
    config = model_config(settings, VOCABULARY, seq_len=length)
    loop = assemble(settings, config, LongRows(length), World.here("cpu", threads), 1000)
    resting = psutil.Process().memory_info().rss
    taken: list[Spent] = []
    losses = []
    for _ in range(steps):
        taken.append(spent(loop.step))
        losses.append(loop.flush_metrics()["loss"])
    found = {"resting_bytes": resting, "peak_bytes": peak_bytes(), "losses": losses}
    found |= {"step_s": [each.wall_s for each in taken], "step_cpu_s": [each.cpu_s for each in taken]}
    print(json.dumps(found))


def measured(way: str, length: int, steps: int, threads: int, amp: bool) -> dict[str, Any]:
    """`measure` in a process of its own; its measurements, or the reason why it failed."""
    words = [sys.executable, "-m", "tests.benchmarks.bench_context", "--measure"]
    words += [way, str(length), str(steps), str(threads), str(int(amp))]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"way": way, "length": length, "failed": f"longer than {TIMEOUT_S:.0f} s"}
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        return {"way": way, "length": length, "failed": f"exit code {done.returncode}: {' '.join(last)}"}
    return {"way": way, "length": length, **json.loads(done.stdout)}


def row(found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    about = f"{found['length'] // 1024}k  {WAYS[found['way']].about}"
    if "failed" in found:
        return [about, found["failed"], "", "", "", ""]
    above = found["peak_bytes"] - found["resting_bytes"]
    losses = found["losses"]
    return [
        about,
        f"{found['peak_bytes'] / 2**20:.0f}",
        f"{above / 2**20:.0f}",
        f"{found['step_s'][-1]:.1f}",
        f"{found['step_cpu_s'][-1]:.1f}",
        f"{losses[0]:.3f} -> {losses[-1]:.3f}",
    ]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens of a row (default %(default)s)")
    parser.add_argument("--ways", default=",".join(WAYS), help="ways to train, of %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="steps per case, the last is timed (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where a run would")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--measure", nargs=5, metavar="WORD", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    unknown = [way for way in chosen.ways.split(",") if way not in WAYS]
    if unknown:
        parser.error(f"--ways: there is no {', '.join(unknown)}; there are {', '.join(WAYS)}")
    return chosen


def main() -> None:
    chosen = options()
    if chosen.measure is not None:
        way, length, steps, threads, amp = chosen.measure
        measure(way, int(length), int(steps), int(threads), bool(int(amp)))
        return
    figures: dict[str, Any] = {
        "machine": machine(chosen.threads),
        "model": MODEL,
        "vocabulary": VOCABULARY,
        "cases": [],
    }
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    for length in map(int, chosen.lengths.split(",")):
        for way in chosen.ways.split(","):
            found = measured(way, length, chosen.steps, chosen.threads, chosen.amp)
            figures["cases"].append(found)
            print("  ".join(row(found)), flush=True)
    print()
    titles = ("row, way", "peak MiB", "above rest MiB", "s a step", "CPU s a step", "loss")
    print(table(titles, [row(found) for found in figures["cases"]]))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"\nall figures: {chosen.json}")


if __name__ == "__main__":
    main()
