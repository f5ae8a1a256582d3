"""What the benchmarks share: clocks, a median with its interval, commands, tables."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hrm_ray.types import Record

COMMAND_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Spent:
    """Seconds of this process's CPU time (all threads), and by the wall clock."""

    cpu_s: float
    wall_s: float


def spent(work: Callable[[], object]) -> Spent:
    """Run `work` once and time it."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.process_time() - cpu, time.perf_counter() - wall)


def in_turn(number: int, works: Sequence[Callable[[], object]]) -> list[Spent]:
    """Each work once, in an order that rotates with the round's number; results in the order of `works`."""
    order = list(range(len(works)))
    if number % 2:
        order.reverse()
    taken = {place: spent(works[place]) for place in order}
    return [taken[place] for place in range(len(works))]


@dataclass(frozen=True)
class Summary:
    """A median and an interval that holds the true one with probability `coverage` (order statistics)."""

    median: float
    low: float
    high: float
    coverage: float
    rounds: int

    def shown(self, digits: int = 3) -> str:
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def summary(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """The median of `values` with the narrowest symmetric interval of order statistics that covers `confidence`.

    The interval x_(k) .. x_(n+1-k) misses the median with probability 2 P(Binomial(n, 1/2) < k), whatever the values'
    distribution. Fewer than 6 values do not reach 95 %: then it is their whole range, and `coverage` says so.
    """
    ordered = sorted(values)
    count = len(ordered)
    outside = 0.0
    cut = 0
    while cut < (count - 1) // 2:
        more = outside + 2 * math.comb(count, cut + 1) * 0.5**count
        if more + 2 * 0.5**count > 1 - confidence:
            break
        outside, cut = more, cut + 1
    coverage = 1 - outside - 2 * 0.5**count if count > 1 else 0.0
    return Summary(statistics.median(ordered), ordered[cut], ordered[count - 1 - cut], coverage, count)


def machine(threads: int) -> dict[str, Any]:
    """The machine and the library versions."""
    load = list(os.getloadavg()) if sys.platform != "win32" else None
    return {
        "processor": _processor(),
        "logical_cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
        "load_average": load,
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def hrm_ray_command(words: Sequence[str | Path]) -> float:
    """Run `hrm-ray` with these words, quietly; seconds on the wall. RuntimeError with its last lines if it fails."""
    return run_quietly([sys.executable, "-m", "hrm_ray", *map(str, words)])[0]


def run_quietly(words: Sequence[str]) -> tuple[float, str]:
    """Run a command; seconds on the wall, and what it wrote to standard output. RuntimeError if it fails."""
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    taken = time.perf_counter() - began
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"exit code {done.returncode} of: {' '.join(words)}\n{said}")
    return taken, done.stdout


def number(record: Record, name: str) -> float:
    """A figure of a record. RuntimeError where it has none of that name."""
    value = record.values.get(name)
    if not isinstance(value, int | float):
        raise RuntimeError(f"the record of step {record.step} has no {name}")
    return float(value)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry; the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [titles, *rows]) for column in range(len(titles))]
    lines = [titles, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def plain(value: Any) -> Any:
    """Summaries inside dicts and lists as JSON can hold them."""
    if isinstance(value, Summary):
        return asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
