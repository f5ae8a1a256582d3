"""Host memory: what is available, and whether the C library keeps or returns what CPU tensors free."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import psutil

from hrm_ray.metrics.meters import peak_resident_bytes
from hrm_ray.train.memory_limit import memory_left_bytes

# glibc's numbers of these parameters (malloc.h), and the largest value that mallopt takes.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1
_OWN_MAPPING_BYTES = 2**20
"""From this size on a tensor gets pages of its own, which go back to the system with it. Smaller tensors hold little
memory, and are half of a step's allocations."""
_SPARE = 1.25
"""What must be available for a copy, in sizes of it: other processes need memory too."""


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping; the container's limit (cgroup v2) where that is less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))


def room_for_copy(size_bytes: int, workers: int) -> bool:
    """Whether this machine, and --memory-budget, have room for a copy of `size_bytes` between two steps, when each of
    its `workers` (training processes like this one) takes again what it has given back since its peak."""
    given_back_bytes = max(0, peak_resident_bytes() - int(psutil.Process().memory_info().rss))
    left_bytes = memory_left_bytes()
    if left_bytes is not None and left_bytes - given_back_bytes < _SPARE * size_bytes:
        return False
    return available_memory_bytes() - workers * given_back_bytes >= _SPARE * size_bytes


def keep_freed_memory(keep: bool) -> bool:
    """Make glibc keep freed memory for the next tensors, or return it to the system; False where it cannot be set.

    Keeping makes a CPU step 5 to 40 % faster, the more the smaller the model: a page that is returned and taken again
    costs a page fault. The price is fragmentation: the process then takes 1.2 to 2.7 times what its tensors need.
    """
    if not malloc_is_tunable():
        return False
    library = ctypes.CDLL(None)
    value = _LARGEST if keep else _OWN_MAPPING_BYTES
    return all([library.mallopt(name, value) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)])


def malloc_is_tunable() -> bool:
    """Whether this process runs on glibc, the one C library whose thresholds are set here."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
