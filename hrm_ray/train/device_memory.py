"""Memory of tensors on an accelerator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hrm_ray.metrics.meters import DeviceMemory


def accelerator_memory(device: torch.device) -> Callable[[], DeviceMemory] | None:
    """A function that reads the accelerator's memory; None on the CPU, where the process's own memory counts."""

    def cuda_or_xpu() -> DeviceMemory:
        backend = torch.cuda if device.type == "cuda" else torch.xpu
        return DeviceMemory(
            backend.memory_allocated(device), backend.max_memory_allocated(device), backend.memory_reserved(device)
        )

    def mps() -> DeviceMemory:
        # PyTorch keeps no peak for this device: the meter takes the largest value it has seen.
        allocated_bytes = torch.mps.current_allocated_memory()
        return DeviceMemory(allocated_bytes, allocated_bytes, torch.mps.driver_allocated_memory())

    return {"cuda": cuda_or_xpu, "xpu": cuda_or_xpu, "mps": mps}.get(device.type)
