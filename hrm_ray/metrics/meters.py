"""What is measured along the way: throughput, memory, and sums of metrics.

One job: keep the running figures. Nothing here writes them anywhere, and tensors are converted before they come here.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

GIGABYTE = 1e9
"""Bytes in one of the gigabytes that `memory_gb` counts."""


class Throughput:
    """Tokens or samples per second over a sliding window of time spent working.

    `window_s` is the shortest time the figure covers once so much has passed; the interval that reaches back past it
    still counts in full. `clock` is a monotonic time in seconds. Time between `pause` and `resume` (evaluation,
    saving) does not count.
    """

    def __init__(self, window_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._clock = clock
        self._resumed_s = clock()
        self._worked_s = 0.0
        self._paused = False
        self._total = 0
        # (time worked, amount done) at the end of each interval, never summed up piece by piece: no rounding piles up.
        self._marks: deque[tuple[float, int]] = deque([(0.0, 0)])

    def add(self, amount: int) -> None:
        """`amount` more are done now. RuntimeError while paused."""
        if self._paused:
            raise RuntimeError("throughput is paused: resume it before adding")
        self._count_time()
        self._total += amount
        self._marks.append((self._worked_s, self._total))
        while len(self._marks) > 2 and self._worked_s - self._marks[1][0] >= self._window_s:
            self._marks.popleft()

    def pause(self) -> None:
        """Stop the clock."""
        if not self._paused:
            self._count_time()
            self._paused = True

    def resume(self) -> None:
        """Let the clock run on."""
        if self._paused:
            self._resumed_s = self._clock()
            self._paused = False

    def per_s(self) -> float | None:
        """The rate over the window's finished intervals; None until any time has passed."""
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else None

    def _count_time(self) -> None:
        now_s = self._clock()
        self._worked_s += now_s - self._resumed_s
        self._resumed_s = now_s


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on an accelerator: in tensors now, at most so far, and held by the allocator."""

    allocated_bytes: int
    peak_bytes: int
    reserved_bytes: int


class MemoryMeter:
    """Memory in use and its peak, in GB of 1e9 bytes.

    Without `device_memory` it is the resident memory of this process (CPU training); with it, what that function says
    of the accelerator (it is passed in, because nothing here imports torch).
    """

    def __init__(self, device_memory: Callable[[], DeviceMemory] | None = None) -> None:
        self._device_memory = device_memory
        self._process = psutil.Process()
        self._peak_bytes = 0

    def read(self) -> dict[str, float]:
        """`memory_gb` and `peak_gb`; on an accelerator `reserved_gb` too."""
        if self._device_memory is not None:
            memory = self._device_memory()
            return {
                "memory_gb": memory.allocated_bytes / GIGABYTE,
                "peak_gb": memory.peak_bytes / GIGABYTE,
                "reserved_gb": memory.reserved_bytes / GIGABYTE,
            }
        resident_bytes = self._process.memory_info().rss
        # The kernel's peak may lag behind what was read here, and a peak must not fall.
        self._peak_bytes = max(self._peak_bytes, resident_bytes, peak_resident_bytes())
        return {"memory_gb": resident_bytes / GIGABYTE, "peak_gb": self._peak_bytes / GIGABYTE}


def peak_resident_bytes() -> int:
    """The most memory this process ever held resident, by the system's own count.

    On Linux VmHWM is taken before getrusage, whose figure a child inherits through exec from a larger parent.
    """
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


class MetricSums:
    """Metrics as (total, weight) pairs by name, so that adding over micro-batches, segments and ranks is exact in kind:
    the mean of the whole, not a mean of means.

    A metric brings its weight along (`add`), or is declared `per` a count that is kept once under its own name
    (`add_per`, `add_count`) and may come from elsewhere: losses per valid token, say.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, tuple[float, float]] = {}
        self._per: dict[str, tuple[str, float]] = {}
        self._counts: dict[str, float] = {}

    def add(self, name: str, total: float, weight: float) -> None:
        """Add to a metric. ValueError when the weight is negative or the metric is declared per a count."""
        if name in self._per:
            raise ValueError(f"metric {name!r} is declared per {self._per[name][0]!r} and takes no weight of its own")
        _check_weight(name, weight)
        old_total, old_weight = self._pairs.get(name, (0.0, 0.0))
        self._pairs[name] = (old_total + total, old_weight + weight)

    def add_per(self, name: str, total: float, per: str) -> None:
        """Add to a metric whose weight is the count `per`. ValueError when it was declared otherwise before."""
        if name in self._pairs:
            raise ValueError(f"metric {name!r} brings its own weights and cannot be per {per!r} as well")
        declared, old_total = self._per.get(name, (per, 0.0))
        if declared != per:
            raise ValueError(f"metric {name!r} is declared per {declared!r}, not per {per!r}")
        self._per[name] = (per, old_total + total)

    def add_count(self, name: str, amount: float) -> None:
        """Add to a count that metrics are per. ValueError when the amount is negative."""
        _check_weight(name, amount)
        self._counts[name] = self._counts.get(name, 0.0) + amount

    def merge(self, other: MetricSums) -> None:
        """Add all of `other`: another micro-batch, segment or rank."""
        for name, (total, weight) in other._pairs.items():
            self.add(name, total, weight)
        for name, (per, total) in other._per.items():
            self.add_per(name, total, per)
        for name, amount in other._counts.items():
            self.add_count(name, amount)

    def pairs(self) -> dict[str, tuple[float, float]]:
        """Every metric's (total, weight): what a reduction over ranks adds up, name by name.

        A count never added is 0. A rank may lack a name that another has: agree on the names before reducing.
        """
        per = {name: (total, self._counts.get(count, 0.0)) for name, (count, total) in self._per.items()}
        return {**self._pairs, **per}

    @classmethod
    def from_pairs(cls, pairs: Mapping[str, tuple[float, float]]) -> MetricSums:
        """The sums that `pairs` describe, as they come back from a reduction over ranks."""
        sums = cls()
        for name, (total, weight) in pairs.items():
            sums.add(name, total, weight)
        return sums

    def means(self) -> dict[str, float]:
        """total / weight of each metric; one of weight 0 has no mean and is left out."""
        return {name: total / weight for name, (total, weight) in self.pairs().items() if weight != 0}


def _check_weight(name: str, weight: float) -> None:
    if weight < 0:
        raise ValueError(f"{name!r}: weight {weight} is negative")
