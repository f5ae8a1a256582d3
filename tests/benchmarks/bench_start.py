"""What a launcher costs: time per step with and without Ray, seconds to the first record, and of `hrm-ray --help`.

The command line runs in fresh processes; times come from the clock of its records.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from hrm_ray.metrics.jsonl import read_records
from tests.benchmarks.timing import Summary, hrm_ray_command, plain, summary, table

STEPS = 200
FIRST_STEPS = 20
"""Steps left out at the start, while caches, the allocator and Ray's threads settle."""
HELP_RUNS = 7
HELP_LIMIT_S = 0.5
MODEL = (
    *("--hidden-size", "64", "--num-heads", "2", "--h-layers", "1", "--l-layers", "1", "--expansion", "4"),
    "--no-moe",
    *("--halt-max-steps", "8", "--batch-size", "64", "--optimizer", "adam-atan2"),
    *("--steps", str(STEPS), "--save-every", "0"),
)
"""The demonstration's Sudoku model, with records as often as by default."""
LOG_EVERY = 10
"""Steps between two records."""


def compare_launchers(pairs: int, threads: int, *, with_ray: bool) -> dict[str, Any]:
    """Runs of the same training by both launchers in turn: step times, their ratio, and seconds to the first record."""
    launchers = ("local", "ray") if with_ray else ("local",)
    steps: dict[str, list[float]] = {launcher: [] for launcher in launchers}
    starts: dict[str, list[float]] = {launcher: [] for launcher in launchers}
    with tempfile.TemporaryDirectory(prefix="hrm-ray-bench-") as name:
        folder = Path(name)
        print("\nbuilding Sudoku for the launchers ...", flush=True)
        hrm_ray_command(
            ["data", "build", "sudoku", "--size", "4", "--train", "2000", "--test", "50", "--out", folder / "sudoku"]
        )
        for number in range(pairs):
            for launcher in launchers if number % 2 == 0 else launchers[::-1]:
                print(f"run {number + 1} of {pairs}, {launcher} ...", flush=True)
                start, step = _run(launcher, folder / "sudoku", folder / f"{launcher}-{number}", threads)
                starts[launcher].append(start)
                steps[launcher].append(step)
    found: dict[str, Any] = {"threads": threads, "pairs": pairs}
    rows = []
    for launcher in launchers:
        step_ms, start_s = summary([1e3 * s for s in steps[launcher]]), summary(starts[launcher])
        found[launcher] = {"step_wall_ms": plain(step_ms), "start_s": plain(start_s)}
        rows.append([launcher, step_ms.shown(1), start_s.shown(2)])
    print(f"\nLaunchers at {threads} thread(s), {STEPS - FIRST_STEPS} steps a run; median over runs [interval]")
    print(table(("launcher", "step wall ms", f"command to step {LOG_EVERY}, s"), rows))
    if with_ray:
        ratio = summary([ray / local for local, ray in zip(steps["local"], steps["ray"], strict=True)])
        extra = summary([ray - local for local, ray in zip(starts["local"], starts["ray"], strict=True)])
        found["step_ratio"], found["start_difference_s"] = plain(ratio), plain(extra)
        print(f"with Ray / without, pair by pair: {_said(ratio)}; Ray's start takes {extra.shown(2)} s more")
    else:
        print("Ray: skipped")
    return found


def _said(ratio: Summary) -> str:
    return f"{ratio.shown()} ({100 * ratio.coverage:.0f} % interval, {ratio.rounds} pairs)"


def _run(launcher: str, data: Path, bundle: Path, threads: int) -> tuple[float, float]:
    """Seconds from just before the command to the first record, and the median step's seconds between two records."""
    began = time.time()
    hrm_ray_command(
        [
            *("train", "--dataset-file", data, "--bundle-dir", bundle, "--launcher", launcher),
            *("--threads", str(threads), *MODEL),
        ]
    )
    at = {record.step: record.time_s for record in read_records(bundle / "metrics.jsonl") if record.kind == "train"}
    if max(at) != STEPS or LOG_EVERY not in at:
        raise RuntimeError(f"{bundle}: no record of step {LOG_EVERY} or {STEPS}")
    times = [at[step] for step in range(FIRST_STEPS, STEPS + 1, LOG_EVERY)]
    return at[LOG_EVERY] - began, statistics.median((later - at_s) / LOG_EVERY for at_s, later in pairwise(times))


def help_time() -> dict[str, Any]:
    """Seconds of `hrm-ray --help`, the first call (which may compile) left out."""
    hrm_ray_command(["--help"])
    taken = summary([hrm_ray_command(["--help"]) for _ in range(HELP_RUNS)])
    passed = taken.median < HELP_LIMIT_S
    verdict = "PASS" if passed else "FAIL"
    print(f"\nhrm-ray --help: {taken.shown()} s, median of {HELP_RUNS}; below {HELP_LIMIT_S} s: {verdict}")
    return {"wall_s": plain(taken), "limit_s": HELP_LIMIT_S, "passed": passed}
