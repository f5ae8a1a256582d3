"""Meters of a training run: throughput and memory."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

GIGABYTE = 1e9
"""Bytes in one of the gigabytes that `memory_gb` counts."""


class Throughput:
    """Tokens or samples per second over a sliding window of time spent working.

    The rate covers at least `window_s`, once that much time has passed. Time between `pause` and `resume` (evaluation,
    saving) does not count. `clock` gives a monotonic time in seconds.
    """

    def __init__(self, window_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._clock = clock
        self._resumed_s = clock()
        self._worked_s = 0.0
        self._paused = False
        self._total = 0
        # (time worked, amount done) at the end of each interval: totals, so that rounding does not add up.
        self._marks: deque[tuple[float, int]] = deque([(0.0, 0)])

    def add(self, amount: int) -> None:
        """Add `amount` processed tokens or samples. RuntimeError while paused."""
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
        """Start the clock again."""
        if self._paused:
            self._resumed_s = self._clock()
            self._paused = False

    def per_s(self) -> float | None:
        """The rate over the window; None until time has passed."""
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
    """Memory in use and its peak since the process began, in GB of 1e9 bytes.

    Without `device_memory`: the resident memory of this process, Python and PyTorch included (CPU training). With it:
    the accelerator's memory, as that function reads it. The peak includes evaluation and saving: a run of this kind
    needs that much.
    """

    def __init__(self, device_memory: Callable[[], DeviceMemory] | None = None) -> None:
        self._device_memory = device_memory
        self._process = psutil.Process()
        self._peak_bytes = 0

    def read(self) -> dict[str, float]:
        """`memory_gb` and `peak_gb`; on an accelerator `reserved_gb` too."""
        if self._device_memory is not None:
            memory = self._device_memory()
            self._peak_bytes = max(self._peak_bytes, memory.peak_bytes)
            return {
                "memory_gb": memory.allocated_bytes / GIGABYTE,
                "peak_gb": self._peak_bytes / GIGABYTE,
                "reserved_gb": memory.reserved_bytes / GIGABYTE,
            }
        resident_bytes = self._process.memory_info().rss
        # The kernel's peak may lag behind what was read here, and a peak must not fall.
        self._peak_bytes = max(self._peak_bytes, resident_bytes, peak_resident_bytes())
        return {"memory_gb": resident_bytes / GIGABYTE, "peak_gb": self._peak_bytes / GIGABYTE}


def peak_resident_bytes() -> int:
    """Peak resident memory of this process, as the operating system counts it."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    # On Linux not getrusage: a child inherits its figure through exec from a larger parent.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
