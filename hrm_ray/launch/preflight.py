"""What a run will need at the least, held against what this machine has.

One job: refuse within seconds what cannot end well: too few CPUs or GPUs, too little memory for the weights and one
batch, too little disk for the checkpoints. It is a lower bound; what a backward pass keeps is not in it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from hrm_ray.errors import Fault, ResourceFault
from hrm_ray.launch.cluster_address import check_address
from hrm_ray.launch.devices import Devices
from hrm_ray.launch.resources import (
    Demand,
    available_memory_bytes,
    check_local_gpus,
    check_machine,
    usable_cpus,
)
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.describe import count_parameters
from hrm_ray.settings.tree import RunSettings

_MOMENTS = {"adamw": 2, "adam-atan2": 2, "sgd": 0}
"""Tensors of the weights' size that an optimizer keeps."""


def state_bytes(settings: RunSettings, config: ModelConfig) -> int:
    """Bytes of weights, gradients, optimizer state and average of one worker, in float32."""
    copies = 2 + _MOMENTS[settings.optimizer.optimizer] + (settings.optimizer.ema is not None)
    return 4 * copies * count_parameters(config).total


def batch_bytes(settings: RunSettings, config: ModelConfig) -> int:
    """The least that one micro-batch takes: its tokens and labels, the injection and two states, and the logits."""
    row = config.total_positions * (8 + 3 * 4 * config.hidden_size) + 4 * config.seq_len * config.vocab_size
    return settings.optimizer.batch_size * row


def checkpoint_bytes(settings: RunSettings, config: ModelConfig) -> int:
    """Bytes of one checkpoint, without carries."""
    copies = 1 + _MOMENTS[settings.optimizer.optimizer] + (settings.optimizer.ema is not None)
    return 4 * copies * count_parameters(config).total


def check_launch(devices: Devices) -> None:
    """Whether the threads are there, and Ray could start the workers here or be at the address; nothing is started.

    Raises ResourceFault, EnvironmentFault or SettingsError. What a running cluster has is asked when it is joined.
    """
    if devices.launcher != "ray":
        cpus = usable_cpus()
        if devices.threads > cpus:
            reason = f"this machine offers {cpus} CPUs"
            raise ResourceFault(Fault(f"--threads {devices.threads}", reason, f"Give --threads {cpus} or fewer"))
        return
    if devices.ray_address is not None:
        check_address(devices.ray_address)
        return
    demand = Demand(devices.world_size, devices.threads, 1 if devices.device == "cuda" else 0)
    check_machine(demand, usable_cpus(), available_memory_bytes())
    if demand.gpus:
        check_local_gpus(demand, torch.cuda.device_count())


def check_resources(settings: RunSettings, config: ModelConfig, devices: Devices, bundle: Path) -> None:
    """Raises ResourceFault when memory (of a run on this machine's CPUs) or disk cannot suffice."""
    faults = []
    needed = (state_bytes(settings, config) + batch_bytes(settings, config)) * devices.world_size
    available = available_memory_bytes()
    if devices.device == "cpu" and not devices.ray_address and needed > available:
        reason = (
            f"weights, gradients, optimizer state and one batch of {devices.world_size} worker(s) take {_gb(needed)}, "
            f"{_gb(available)} are free"
        )
        faults.append(Fault("memory", reason, "Choose a smaller model or batch, or fewer workers"))
    disk = checkpoint_bytes(settings, config) * (settings.run.keep + 1)
    free = shutil.disk_usage(_existing(bundle)).free
    if disk > free:
        kept = f"{settings.run.keep} checkpoints and one in the making"
        reason = f"{kept} take {_gb(disk)}, {_gb(free)} are free at {bundle}"
        faults.append(Fault("disk", reason, "Lower --keep, free some space, or give another --bundle-dir"))
    if faults:
        raise ResourceFault(faults)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
