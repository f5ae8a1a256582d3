"""Checks within seconds, before a run, that CPUs, GPUs, memory and disk suffice.

Memory is decided by closed-form bounds if possible; between the bounds an update is traced (train/memory_estimate.py).
"""

from __future__ import annotations

import shutil
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

from hrm_ray.errors import Fault, ResourceError, UnavailableError
from hrm_ray.independent.anchor_files import KEPT_ANCHORS
from hrm_ray.launch.cluster_address import check_address
from hrm_ray.launch.devices import Devices
from hrm_ray.launch.node_report import LIBRARIES, Need, installed
from hrm_ray.launch.resources import (
    WORKER_MEMORY_BYTES,
    ResourceRequest,
    check_local_gpus,
    check_machine,
    gigabytes,
    usable_cpus,
)
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.describe import count_parameters
from hrm_ray.rundir import RunDir
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.host_memory import available_memory_bytes
from hrm_ray.train.memory_estimate import DEEPSPEED, DIVIDED, MemoryAccount, memory_estimate

PROCESS_BYTES = 430 * 10**6
"""Resident memory of a process that trains on a CPU, beside the tensors of its model (measured)."""
_ROOM_TO_KEEP = 3
"""Freed memory is kept where this many times the peak is available. A process that keeps it was measured to take up to
2.7 times what its tensors need (train/host_memory.py)."""
_MARGIN = 1.5
"""Factor of the upper bound on what is counted in it."""
_WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_MOMENT_BYTES = {"adamw": 8, "adam-atan2": 8, "sgd": 0}
"""Bytes of one weight by --model-dtype, and of what each optimizer keeps for it."""


@lru_cache(maxsize=4)
def needed_memory(settings: RunSettings, config: ModelConfig, device: str) -> MemoryAccount:
    """Memory of one worker's tensors, from a traced update; takes some seconds."""
    return memory_estimate(settings, config, device)


def check_launch(devices: Devices) -> None:
    """Check that this machine has the CPUs and GPUs, or that a Ray cluster can be at the address. Nothing is started.

    Raises ResourceError, UnavailableError or SettingsError. A running cluster is checked when it is joined.
    """
    if devices.strategy.startswith("zero") and devices.ray_address is None and find_spec("deepspeed") is None:
        hint = "Install it (Linux only), or use --strategy sharded-optimizer"
        raise UnavailableError(Fault(f"--strategy {devices.strategy}", "DeepSpeed is not installed", hint))
    cpus = usable_cpus()
    here = devices.ray_address is None
    if here and (devices.launcher != "ray" or devices.independent) and devices.threads > cpus:
        reason = f"this machine offers {cpus} CPUs"
        raise ResourceError(Fault(f"--threads {devices.threads}", reason, f"Give --threads {cpus} or fewer"))
    if devices.launcher != "ray":
        if devices.request.gpus:
            check_local_gpus(devices.request, torch.cuda.device_count())
        return
    if devices.ray_address is not None:
        check_address(devices.ray_address)
        return
    request = devices.request
    # Trainers that share no step wait for nobody, so more of them than CPUs may take turns.
    check_machine(request, max(cpus, request.cpus if devices.independent else 0), available_memory_bytes())
    if request.gpus:
        check_local_gpus(request, torch.cuda.device_count())


def check_resources(
    settings: RunSettings, config: ModelConfig, devices: Devices, bundle: Path, *, checks_memory: bool = True
) -> bool:
    """Raises ResourceError if memory or disk cannot suffice; returns whether workers keep freed memory.

    Only the host memory of this machine is checked: that of a cluster's nodes is unknown here, and if an accelerator
    runs out of memory the micro-batch is halved.
    """
    faults, keep = [], settings.memory.keep_freed_memory
    if checks_memory and devices.device == "cpu" and not devices.ray_address:
        available = (available_memory_bytes() - merging_bytes(settings, config)) // devices.world_size
        available = _within_budget(available, settings, "cpu")
        if not _fits(settings, config, available):
            faults.append(_memory_fault(settings, config, devices, available))
        elif keep is None:
            keep = _fits(settings, config, available // _ROOM_TO_KEEP)
    disk = disk_bytes(settings, config, bundle)
    there = shutil.disk_usage(_existing(bundle))
    free = there.free
    if there.total == 0:  # such as /proc
        reason = f"the file system at {_existing(bundle)} stores no files"
        faults.append(Fault(f"--bundle-dir {bundle}", reason, "Give a folder on a disk"))
    elif disk > free:
        kept = f"{settings.run.keep} checkpoints and one being written"
        if settings.cluster.parallel_independent:
            kept += f", anchors, and the states of {devices.world_size} trainers"
        beside = " more than those there" if RunDir(bundle).checkpoint_steps() else ""
        reason = f"{kept} take {gigabytes(disk)}{beside}, {gigabytes(free)} are free at {bundle}"
        faults.append(Fault("disk", reason, "Lower --keep, free some space, or give another --bundle-dir"))
    if faults:
        raise ResourceError(faults)
    return keep is not False


def fits_memory(settings: RunSettings, config: ModelConfig, device: str, world_size: int) -> bool:
    """Whether an update fits into half of the free memory of this machine, or of its first GPU."""
    if device == "cuda" and torch.cuda.is_available():
        return _fits(settings, config, _within_budget(torch.cuda.mem_get_info()[0], settings, device) // 2)
    return _fits(settings, config, _within_budget(available_memory_bytes() // world_size, settings, device) // 2)


def _within_budget(available: int, settings: RunSettings, device: str) -> int:
    """What tensors of a worker may take of the available bytes under --memory-budget."""
    budget = settings.memory.budget_bytes
    if budget is None:
        return available
    return max(0, min(available, budget - (PROCESS_BYTES if device == "cpu" else 0)))


def _fits(settings: RunSettings, config: ModelConfig, available: int) -> bool:
    if least_bytes(settings, config) > available:
        return False
    return most_bytes(settings, config) <= available or needed_memory(settings, config, "cpu").peak_bytes <= available


def _memory_fault(settings: RunSettings, config: ModelConfig, devices: Devices, available: int) -> Fault:
    budget = settings.memory.budget_bytes
    if budget is not None and budget <= PROCESS_BYTES:
        reason = f"a process that trains on a CPU takes {gigabytes(PROCESS_BYTES)} without any model"
        return Fault(f"--memory-budget {settings.memory.memory_budget}", reason, "Give more, or leave it out")
    least = least_bytes(settings, config)
    if least > available:
        takes = f"weights, optimizer state and one batch take at least {gigabytes(least)}"
    else:
        takes = f"an update takes {gigabytes(needed_memory(settings, config, 'cpu').peak_bytes)}"
    each = f" for each of {devices.world_size} workers" if devices.world_size > 1 else ""
    hint = "Choose a smaller model, a smaller --batch-size with more --gradient-accumulation-steps, or fewer workers"
    if budget is not None and available == budget - PROCESS_BYTES:
        each += f" under --memory-budget {settings.memory.memory_budget}, beside the process itself"
    return Fault("memory", f"{takes}, {gigabytes(available)} are free{each}", hint)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def state_bytes(settings: RunSettings, config: ModelConfig) -> int:
    """A lower bound of the weights, gradients, optimizer state and average of one worker.

    If nearly everything is frozen, the trained rest is not counted.
    """
    trained = 0 if _mostly_frozen(settings) else 1
    cluster = settings.cluster
    workers = cluster.world_size or 1
    strategy = cluster.strategy_for(workers)
    of_a_weight = {
        "weights": _weight_bytes(settings),
        "gradients": trained * _WEIGHT_BYTES[settings.memory.model_dtype],
        "optimizer": _kept_beside(settings),
    }
    divided = DIVIDED.get(strategy, ())
    each = sum(size / workers if part in divided else size for part, size in of_a_weight.items())
    if strategy in DEEPSPEED:
        each += trained * 4 / workers
    if cluster.parallel_independent:
        each += _shared_bytes(settings)  # the weights that a report counts from
    return int(each * count_parameters(config).total)


def _shared_bytes(settings: RunSettings) -> int:
    """Bytes of one weight, and of its average, as a trainer has them that shares them with others."""
    if _mostly_frozen(settings):
        return 0
    return _WEIGHT_BYTES[settings.memory.model_dtype] + (4 if settings.optimizer.ema is not None else 0)


def merging_bytes(settings: RunSettings, config: ModelConfig) -> int:
    """What the process that merges the weights of independent trainers keeps, at least; 0 without them."""
    if not settings.cluster.parallel_independent:
        return 0
    return int((_weight_bytes(settings) + 2 * _shared_bytes(settings)) * count_parameters(config).total)


def _mostly_frozen(settings: RunSettings) -> bool:
    return settings.adapt.use_peft or settings.run.expert_id is not None


def _weight_bytes(settings: RunSettings) -> float:
    """Bytes of one weight, as if every weight were quantised that can be."""
    if settings.memory.load_in_4bit:
        return 0.5
    return 1 if settings.memory.load_in_8bit else _WEIGHT_BYTES[settings.memory.model_dtype]


def _kept_beside(settings: RunSettings) -> int:
    """Bytes of moments and average for one weight."""
    if _mostly_frozen(settings):
        return 0
    moments = 2 if settings.optimizer.use_8bit_optimizer else _MOMENT_BYTES[settings.optimizer.optimizer]
    return moments + (4 if settings.optimizer.ema is not None else 0)


def least_bytes(settings: RunSettings, config: ModelConfig) -> int:
    """A lower bound of what an update takes: its state, and tokens, labels and two 16-bit states of a micro-batch."""
    positions = settings.optimizer.batch_size * config.total_positions
    return state_bytes(settings, config) + positions * (8 + 2 * 2 * config.hidden_size)


def most_bytes(settings: RunSettings, config: ModelConfig) -> int:
    """An upper bound of what an update takes, options that save memory not considered."""
    width = config.intermediate_size
    if config.num_experts:
        places = config.num_experts_per_tok * max(1.0, config.moe_capacity_factor)
        width = round((width + config.hidden_size) * places) + config.num_experts
    layers = config.bp_steps * max(config.h_layers, config.l_layers)
    if config.arch == "transformer":
        layers = config.h_layers + config.l_layers
    # Each tensor of a layer once for the graph and those of two layers once more, in float32; scores in float64.
    in_layers = 4 * (layers + 2) * (24 * config.hidden_size + 10 * width)
    in_carries = 16 * config.hidden_size * settings.optimizer.gradient_accumulation_steps
    scores = 6 * 8 * config.vocab_size
    positions = settings.optimizer.batch_size * config.total_positions
    # Weights, gradients, two moments, average, and what an update makes of them on its way.
    state = 6 * 4 * count_parameters(config).total
    return round(_MARGIN * (state + positions * (in_layers + in_carries + scores)))


def checkpoint_bytes(settings: RunSettings, config: ModelConfig) -> int:
    """The least that one checkpoint takes, without carries."""
    stored = _weight_bytes(settings)
    if settings.memory.model_dtype == "bf16" and settings.cluster.strategy in DEEPSPEED:
        stored = 4  # the float32 weights, of which the model's are rounded copies
    return int((stored + _kept_beside(settings)) * count_parameters(config).total)


def need_of(
    settings: RunSettings, config: ModelConfig, request: ResourceRequest, strategy: str, device: str, bundle: Path
) -> Need:
    """What a run asks of its nodes, at least."""
    libraries = [*LIBRARIES, *(["deepspeed"] if strategy.startswith("zero") else [])]
    model = least_bytes(settings, config) if device == "cpu" else 0
    # A library that is missing here may be there.
    versions = dict.fromkeys(libraries, "") | installed(libraries)
    return Need(request, WORKER_MEMORY_BYTES + model, disk_bytes(settings, config, bundle), versions)


def disk_bytes(settings: RunSettings, config: ModelConfig, bundle: Path) -> int:
    """What the checkpoints take besides those that the bundle has: all that are kept, and one being written; the oldest
    is deleted once that one is whole."""
    one, run_dir = checkpoint_bytes(settings, config), RunDir(bundle)
    whole = [run_dir.checkpoint(step) for step in run_dir.checkpoint_steps()]
    there = sum(path.stat().st_size for folder in whole for path in folder.rglob("*") if path.is_file())
    return max(one, one * (settings.run.keep + 1) - there) + _independent_disk_bytes(settings, config, run_dir)


def _independent_disk_bytes(settings: RunSettings, config: ModelConfig, run_dir: RunDir) -> int:
    """What independent trainers take besides, without what is there: the anchors that are kept and a new one, each with
    its momentum, and of each trainer a report, its state, and a state being written."""
    cluster = settings.cluster
    if not cluster.parallel_independent:
        return 0
    one = 0 if _mostly_frozen(settings) else 4 * (1 if settings.optimizer.ema is None else 2)
    anchor = one * (1 if cluster.outer_optimizer == "none" else 2)
    each = one * count_parameters(config).total + 2 * checkpoint_bytes(settings, config)
    needed = anchor * (KEPT_ANCHORS + 1) * count_parameters(config).total + each * (cluster.world_size or 1)
    there = sum(path.stat().st_size for path in run_dir.independent.root.rglob("*") if path.is_file())
    return max(0, needed - there)
