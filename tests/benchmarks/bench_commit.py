"""A step and the help page, now and at another commit: ratios of CPU time in interleaved pairs.

`python -m tests.benchmarks.bench_commit COMMIT` unpacks that commit beside this tree. The CPU time of a step is that of
a run of many steps less that of a run of few, divided by the steps between; the help page is a whole process.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.timing import table

ROOT = Path(__file__).resolve().parents[2]
FEW_STEPS, MANY_STEPS = 10, 60
MODEL = (
    *("--no-moe", "--hidden-size", "128", "--num-heads", "4", "--num-layers", "2", "--no-amp", "--threads", "1"),
    *("--no-gradient-checkpointing", "--launcher", "local", "--save-every", "0", "--log-every", "10"),
)
TEXT = (*MODEL, "--vocab-size", "1000", "--max-seq-len", "128", "--batch-size", "8")
PUZZLE = (*MODEL, "--batch-size", "32", "--halt-max-steps", "8", "--halt-exploration-prob", "0.1")


def cpu_s(tree: Path, words: Sequence[object]) -> float:
    """CPU seconds of `hrm-ray` on the words, run from the source tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "hrm_ray", *map(str, words)]
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def step_ms(tree: Path, data: Path, options: Sequence[str]) -> float:
    """CPU milliseconds of one step."""
    times_s = []
    for steps in (FEW_STEPS, MANY_STEPS):
        with tempfile.TemporaryDirectory() as folder:
            words = ("train", "--dataset-file", data, "--bundle-dir", Path(folder) / "bundle", "--steps", steps)
            times_s.append(cpu_s(tree, (*words, *options)))
    return 1e3 * (times_s[1] - times_s[0]) / (MANY_STEPS - FEW_STEPS)


def main() -> None:
    """Print a row for each measure: medians of both, and the ratio's median and range."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved pairs (default %(default)s)")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        then = Path(folder) / "then"
        packed = subprocess.run(["git", "archive", chosen.commit], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(then, filter="data")
        sudoku, corpus = Path(folder) / "sudoku", Path(folder) / "corpus"
        cpu_s(ROOT, ("data", "build", "sudoku", "--size", 4, "--train", 2000, "--test", 10, "--out", sudoku))
        cpu_s(ROOT, ("data", "build", "text", "--out", corpus))
        measures = {
            "a step of text, hidden 128, 8 x 128": lambda tree: step_ms(tree, corpus, TEXT),
            "a step of puzzles, hidden 128, 32 x 16": lambda tree: step_ms(tree, sudoku, PUZZLE),
            "hrm-ray --help": lambda tree: 1e3 * cpu_s(tree, ("--help",)),
            "hrm-ray train --help": lambda tree: 1e3 * cpu_s(tree, ("train", "--help")),
        }
        for name, measure in measures.items():
            measure(ROOT), measure(then)  # fills the caches of bytecode
            pairs = [(measure(then), measure(ROOT)) for _ in range(chosen.rounds)]
            ratios = sorted(now / before for before, now in pairs)
            medians = [statistics.median(values) for values in zip(*pairs, strict=True)]
            ratio = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
            rows.append([name, f"{medians[0]:.0f}", f"{medians[1]:.0f}", ratio])
    print(table(("CPU time, ms", chosen.commit, "now", "now / then"), rows))


if __name__ == "__main__":
    main()
