"""Peak memory of a text step by its number of segments, each in a process of its own.

It must not grow with the segments. tests/unit/test_memory_flat.py proves the same to the byte.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import psutil

from tests.benchmarks.bench_cases import CASES, build_loop
from tests.benchmarks.timing import run_quietly, table

SEGMENTS = (2, 4, 8, 16)
STEPS = 3
CONTROL = 2
"""Batch size of the control row, in batches: it must take more memory, which shows that growth is detected."""
FLAT_WITHIN = 0.05
"""Tolerance, as a share of the growth that keeping every segment's graph would show; resident memory is not exact."""


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def measure(segments: int, batches: int, threads: int) -> None:
    """Print the resident bytes of this (fresh) process with the model built, and the peak after a few steps."""
    case = CASES["text_m2"]
    case = replace(case, batch_size=batches * case.batch_size)
    loop = build_loop(case, threads, halt_max_steps=segments)
    resting = psutil.Process().memory_info().rss
    for _ in range(STEPS):
        loop.step()
    print(resting, peak_bytes())


def memory_by_segments(threads: int) -> dict[str, Any]:
    """The table, and whether the peak is flat."""
    settings = [(segments, 1) for segments in SEGMENTS] + [(SEGMENTS[0], CONTROL)]
    measured = []
    for segments, batches in settings:
        words = [sys.executable, "-m", "tests.benchmarks.bench_memory", str(segments), str(batches), str(threads)]
        resting, peak = map(int, run_quietly(words)[1].split())
        measured.append({"segments": segments, "batches": batches, "resting_bytes": resting, "peak_bytes": peak})
    rows = [
        [
            f"{one['segments']} segments" + (f", {one['batches']} x the batch (control)" if one["batches"] > 1 else ""),
            f"{one['resting_bytes'] / 1e6:.0f}",
            f"{one['peak_bytes'] / 1e6:.0f}",
            f"{(one['peak_bytes'] - one['resting_bytes']) / 1e6:.0f}",
        ]
        for one in measured
    ]
    print(f"\nMemory of a text step ({CASES['text_m2'].about.partition(',')[0]}), {STEPS} steps in a fresh process")
    print(table(("setting", "resting MB", "peak MB", "difference MB"), rows))
    *by_segments, control = measured
    grown = by_segments[-1]["peak_bytes"] - by_segments[0]["peak_bytes"]
    # The control adds one more batch of activations; a graph kept over segments would add one such per segment.
    kept = (control["peak_bytes"] - by_segments[0]["peak_bytes"]) * (SEGMENTS[-1] - SEGMENTS[0])
    flat = grown <= FLAT_WITHIN * kept
    print(
        f"from {SEGMENTS[0]} to {SEGMENTS[-1]} segments the peak grows by {grown / 1e6:.0f} MB; "
        f"keeping the graph would add about {kept / 1e6:.0f} MB: {'flat, PASS' if flat else 'FAIL'}"
    )
    return {"measured": measured, "grown_bytes": grown, "kept_graph_bytes": kept, "flat": flat}


if __name__ == "__main__":
    measure(*map(int, sys.argv[1:]))
