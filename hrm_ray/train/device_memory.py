"""How much memory tensors take on an accelerator.

One job: where each kind of device says so. The figures are kept in metrics/meters.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hrm_ray.metrics.meters import DeviceMemory


def accelerator_memory(device: torch.device) -> Callable[[], DeviceMemory] | None:
    """How to read the accelerator's memory; None on the CPU, where the process's own memory counts."""
    if device.type not in _READERS:
        return None
    read = _READERS[device.type]
    return lambda: read(device)


def _cuda(device: torch.device) -> DeviceMemory:
    return DeviceMemory(
        torch.cuda.memory_allocated(device),
        torch.cuda.max_memory_allocated(device),
        torch.cuda.memory_reserved(device),
    )


def _xpu(device: torch.device) -> DeviceMemory:
    return DeviceMemory(
        torch.xpu.memory_allocated(device), torch.xpu.max_memory_allocated(device), torch.xpu.memory_reserved(device)
    )


def _mps(device: torch.device) -> DeviceMemory:
    """PyTorch keeps no peak there: it is the most that was seen."""
    allocated_bytes = torch.mps.current_allocated_memory()
    return DeviceMemory(allocated_bytes, allocated_bytes, torch.mps.driver_allocated_memory())


_READERS: dict[str, Callable[[torch.device], DeviceMemory]] = {"cuda": _cuda, "xpu": _xpu, "mps": _mps}
"""By kind of device."""
