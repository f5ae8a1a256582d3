"""What is measured along the way: throughput and memory.

One job: keep the running figures. Nothing here writes them anywhere, and tensors are converted before they come here.
"""

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
    """Memory in use and its peak since the process began, in GB of 1e9 bytes.

    Without `device_memory` it is the resident memory of this process (CPU training), Python and PyTorch themselves in
    it; with it, what that function says of the accelerator (it is passed in, because nothing here imports torch). The
    peak is the whole run's, evaluation and saving too: what a next run must have. It never falls.
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
