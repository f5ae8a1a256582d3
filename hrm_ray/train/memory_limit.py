"""A limit on the memory of this process or of its accelerator, under which an allocation beyond it fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

_STACKS_BYTES = 64 * 2**20
"""Stacks of threads that are started later: eight of the usual size, which count whole and are hardly used."""


def can_limit(device: str) -> bool:
    """Whether memory can be limited on this kind of device here: the CPU on Linux, and CUDA."""
    return device == "cuda" or (device == "cpu" and sys.platform == "linux")


def limit_memory(budget_bytes: int | None, device: str) -> Callable[[], None]:
    """Let allocations fail as out of memory beyond the budget, where that `can_limit`; returns what undoes it.

    On a CPU the resident memory of this process may grow up to the budget, counted from what it is now. The system
    counts what is allocated, so what is allocated and never used counts too; what was freed before and is kept by the C
    library may be taken besides. On CUDA it is what PyTorch's allocator takes of the current device.
    """
    if budget_bytes is None or not can_limit(device):
        return lambda: None
    if device == "cuda":
        import torch  # the command asks for the limit too, and starts without torch

        number = torch.cuda.current_device()
        total_bytes = torch.cuda.get_device_properties(number).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total_bytes), number)
        return partial(torch.cuda.set_per_process_memory_fraction, 1.0, number)
    import resource  # not on Windows

    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _status_bytes("VmData") + _STACKS_BYTES + max(0, budget_bytes - _status_bytes("VmRSS"))
    if before != resource.RLIM_INFINITY:
        limit = min(limit, before)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    return partial(resource.setrlimit, resource.RLIMIT_DATA, (before, most))


def memory_left_bytes() -> int | None:
    """What this process may still allocate in host memory; None where that is not limited."""
    if sys.platform != "linux":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if limit == resource.RLIM_INFINITY else max(0, limit - _status_bytes("VmData"))


def _status_bytes(name: str) -> int:
    """A size of this process as Linux counts it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status says nothing of {name}")
