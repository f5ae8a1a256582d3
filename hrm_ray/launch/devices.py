"""Chooses device, launcher, workers and threads of a run from its settings and this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch

from hrm_ray.errors import Fault, SettingsError, UnavailableError
from hrm_ray.launch.resources import usable_cpus
from hrm_ray.settings.cluster import ClusterSettings

VISIBLE = "CUDA_VISIBLE_DEVICES"

LAUNCHERS = {"local": "hrm_ray.launch.local", "ray": "hrm_ray.orchestration.worker_group"}
"""--launcher -> module, imported when it is used. Its function `run(plan, *, sink, stop)` gives a RunResult; that of a
launcher with a cluster has `attached()` too: whether the program has connected this process to a cluster itself."""


@dataclass(frozen=True)
class Devices:
    """The devices of a run. `visible_gpus` is CUDA_VISIBLE_DEVICES for the run, None to leave the variable as it is;
    `notes` are messages about fallbacks."""

    device: str
    world_size: int
    threads: int
    launcher: str
    strategy: str
    ray_address: str | None
    visible_gpus: str | None
    notes: tuple[str, ...]


@contextmanager
def visible_gpus(devices: Devices) -> Iterator[None]:
    """Show only the chosen GPUs to this process and to those it starts, for the length of a block.

    CUDA reads the variable once, when a process first uses a GPU.
    """
    before = os.environ.get(VISIBLE)
    if devices.visible_gpus is not None:
        os.environ[VISIBLE] = devices.visible_gpus
    try:
        yield
    finally:
        if devices.visible_gpus is not None:
            os.environ.pop(VISIBLE)
            if before is not None:
                os.environ[VISIBLE] = before


def _mps() -> int:
    return int(torch.backends.mps.is_available())


def _xpu() -> int:
    return torch.xpu.device_count()


_COUNT: dict[str, Callable[[], int]] = {"cuda": torch.cuda.device_count, "xpu": _xpu, "mps": _mps, "cpu": lambda: 1}
"""How many of a kind there are, best kind first."""


def choose_devices(cluster: ClusterSettings) -> Devices:
    """Resolve device, workers, threads and launcher. Raises UnavailableError or SettingsError.

    A missing device is an error under --strict; otherwise the best available device is used, with a note. The cluster
    that a program is connected to counts as one at an address.
    """
    address = _cluster_address(cluster)
    if address is None:
        # Without --strict: what this machine lacks, the program's cluster may have.
        here = _choose(cluster.model_copy(update={"strict": False}), None)
        if here.launcher != "local" and import_module(LAUNCHERS[here.launcher]).attached():
            cluster, address = cluster.model_copy(update={"world_size": here.world_size}), "auto"
    return _choose(cluster, address)


def _choose(cluster: ClusterSettings, address: str | None) -> Devices:
    notes: list[str] = []
    # The devices of a running cluster are the cluster's: it is asked when the run connects.
    device = cluster.device if address and cluster.device != "auto" else _device(cluster, notes)
    gpus = _chosen_gpus(cluster, address, device, notes) if cluster.cuda_numbers else []
    if gpus:
        device = "cuda"
    found = 1
    if device == "cuda" and not address and cluster.launcher != "local":
        found = len(gpus) or _COUNT["cuda"]()
    world_size = cluster.world_size or (1 if cluster.strategy == "single" else found)
    strategy = cluster.strategy_for(world_size)
    if device in ("xpu", "mps") and world_size > 1:
        raise SettingsError(
            Fault(f"--world-size {world_size}", f"several workers on {device} are not supported", "Give --world-size 1")
        )
    launcher = cluster.launcher or ("ray" if address or strategy != "single" else "local")
    threads = cluster.threads or (1 if address else max(1, usable_cpus() // world_size))
    return Devices(device, world_size, threads, launcher, strategy, address, ",".join(gpus) or None, tuple(notes))


def _cluster_address(cluster: ClusterSettings) -> str | None:
    """The running cluster to use, if any: the option, or what `ray job submit` sets; the local launcher uses none."""
    if cluster.launcher == "local":
        return None
    address = cluster.ray_address or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def choose_device(wanted: str, strict: bool = False) -> tuple[str, list[str]]:
    """The device for a command of one process (generate, solve), and notes about fallbacks."""
    notes: list[str] = []
    return _device(ClusterSettings.model_validate({"device": wanted, "strict": strict}), notes), notes


def _device(cluster: ClusterSettings, notes: list[str]) -> str:
    best = next(kind for kind, count in _COUNT.items() if count() > 0)
    if cluster.device == "auto" or cluster.device == best or _COUNT[cluster.device]() > 0:
        return best if cluster.device == "auto" else cluster.device
    missing = Fault(f"--device {cluster.device}", "this machine has no such device", f"Give --device {best}, or auto")
    if cluster.strict:
        raise UnavailableError(missing)
    notes.append(f"--device {cluster.device}: this machine has no such device; {best} is used instead.")
    return best


def _chosen_gpus(cluster: ClusterSettings, address: str | None, device: str, notes: list[str]) -> list[str]:
    """The GPUs of --cuda-ids that this machine has, as CUDA_VISIBLE_DEVICES names them."""
    if address:
        reason = "on a running cluster Ray chooses the GPUs"
        raise SettingsError(Fault(f"--cuda-ids {cluster.cuda_ids}", reason, "Leave out --cuda-ids or --ray-address"))
    there = torch.cuda.device_count()
    missing = [number for number in cluster.cuda_numbers if number >= there]
    if missing and cluster.strict:
        reason = f"this machine has {there} CUDA devices"
        raise UnavailableError(Fault(f"--cuda-ids {cluster.cuda_ids}", reason, "Give the numbers of existing GPUs"))
    kept = [number for number in cluster.cuda_numbers if number < there]
    if missing:
        rest = f"GPUs {kept}" if kept else device
        notes.append(f"--cuda-ids {cluster.cuda_ids}: there are {there} CUDA devices; training on {rest} instead.")
    # The numbers count what this process sees; where that is a choice already (a batch system's), choose among it.
    visible = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    return [visible[number] if visible else str(number) for number in kept]
