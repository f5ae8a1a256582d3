"""What a run will need, held against what this machine has.

One job: refuse within seconds what cannot end well: too few CPUs or GPUs, too little memory for a weight update, too
little disk for the checkpoints.
"""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

import torch

from hrm_ray.errors import Fault, ResourceError
from hrm_ray.launch.cluster_address import check_address
from hrm_ray.launch.devices import Devices
from hrm_ray.launch.memory_bounds import checkpoint_bytes, gigabytes, least_bytes, most_bytes
from hrm_ray.launch.resources import (
    ResourceRequest,
    available_memory_bytes,
    check_local_gpus,
    check_machine,
    usable_cpus,
)
from hrm_ray.model.config import ModelConfig
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.memory_estimate import MemoryAccount, memory_estimate

_ROOM_TO_KEEP = 3
"""Freed memory is kept where so many times the peak is there: a process that keeps it has been seen to take 2.7 times
what its tensors need (train/host_memory.py)."""


@lru_cache(maxsize=4)
def needed_memory(settings: RunSettings, config: ModelConfig, device: str) -> MemoryAccount:
    """What one worker's tensors take, by a rehearsal of its update: some seconds."""
    return memory_estimate(settings, config, device)


def check_launch(devices: Devices) -> None:
    """Whether the threads are there, and Ray could start the workers here or be at the address; nothing is started.

    Raises ResourceError, UnavailableError or SettingsError. What a running cluster has is asked when it is joined.
    """
    if devices.launcher != "ray":
        cpus = usable_cpus()
        if devices.threads > cpus:
            reason = f"this machine offers {cpus} CPUs"
            raise ResourceError(Fault(f"--threads {devices.threads}", reason, f"Give --threads {cpus} or fewer"))
        return
    if devices.ray_address is not None:
        check_address(devices.ray_address)
        return
    demand = ResourceRequest(devices.world_size, devices.threads, 1 if devices.device == "cuda" else 0)
    check_machine(demand, usable_cpus(), available_memory_bytes())
    if demand.gpus:
        check_local_gpus(demand, torch.cuda.device_count())


def check_resources(settings: RunSettings, config: ModelConfig, devices: Devices, bundle: Path) -> bool:
    """Raises ResourceError where memory or disk cannot suffice; else says whether freed memory is to be kept.

    Memory is that of this machine's CPUs: what a cluster's nodes have is not known here, and where an accelerator runs
    out of it the micro-batch is halved. Bounds in closed form decide where they can, a rehearsal where they cannot.
    """
    faults, keep = [], settings.memory.keep_freed_memory
    if devices.device == "cpu" and not devices.ray_address:
        available = available_memory_bytes() // devices.world_size
        if not _fits(settings, config, available):
            faults.append(_memory_fault(settings, config, devices, available))
        elif keep is None:
            keep = _fits(settings, config, available // _ROOM_TO_KEEP)
    disk = checkpoint_bytes(settings, config) * (settings.run.keep + 1)
    free = shutil.disk_usage(_existing(bundle)).free
    if disk > free:
        kept = f"{settings.run.keep} checkpoints and one in the making"
        reason = f"{kept} take {gigabytes(disk)}, {gigabytes(free)} are free at {bundle}"
        faults.append(Fault("disk", reason, "Lower --keep, free some space, or give another --bundle-dir"))
    if faults:
        raise ResourceError(faults)
    return keep is not False


def _fits(settings: RunSettings, config: ModelConfig, available: int) -> bool:
    if least_bytes(settings, config) > available:
        return False
    return most_bytes(settings, config) <= available or needed_memory(settings, config, "cpu").peak_bytes <= available


def _memory_fault(settings: RunSettings, config: ModelConfig, devices: Devices, available: int) -> Fault:
    least = least_bytes(settings, config)
    if least > available:
        takes = f"weights and what must be kept of an update and of one batch take {gigabytes(least)} at the least"
    else:
        takes = f"an update takes {gigabytes(needed_memory(settings, config, 'cpu').peak_bytes)}"
    each = f" for each of {devices.world_size} workers" if devices.world_size > 1 else ""
    hint = "Choose a smaller model, a smaller --batch-size with more --gradient-accumulation-steps, or fewer workers"
    return Fault("memory", f"{takes}, {gigabytes(available)} are free{each}", hint)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
