"""Chooses device, launcher, workers and threads of a run from its settings and this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch

from hrm_ray.errors import Fault, SettingsError, UnavailableError
from hrm_ray.launch.resources import ResourceRequest, places, usable_cpus
from hrm_ray.settings.cluster import ClusterSettings, Launcher

VISIBLE = "CUDA_VISIBLE_DEVICES"

INDEPENDENT_ON_RAY = "hrm_ray.orchestration.independent_launcher"
"""The module of --launcher ray for independent trainers."""
LAUNCHERS = {
    "local": "hrm_ray.launch.local",
    "ray": "hrm_ray.orchestration.worker_group",
    "subprocess": "hrm_ray.launch.independent_run",
}
"""--launcher -> module, imported when it is used. Its function `run(plan, *, sink, stop)` gives a RunResult. That of a
launcher with a cluster has `attached()` too, whether the program has connected this process to a cluster itself, and
`cluster_nodes(address)`, the resources of each node, and `node_reports(address, bundle, libraries)`."""


@dataclass(frozen=True)
class Devices:
    """The devices of a run. `visible_gpus` is CUDA_VISIBLE_DEVICES for the run, None to leave the variable as it
    is."""

    device: str
    world_size: int
    threads: int
    launcher: str
    strategy: str
    ray_address: str | None
    visible_gpus: str | None
    independent: bool = False
    """Whether the workers share no step."""
    gpus_per_worker: float = 1.0
    """Where workers train on GPUs."""

    @property
    def workers_of_an_update(self) -> int:
        """Workers whose rows are in one weight update."""
        return 1 if self.independent else self.world_size

    @property
    def request(self) -> ResourceRequest:
        """What the workers take."""
        return ResourceRequest(self.world_size, self.threads, self.gpus_per_worker if self.device == "cuda" else 0)

    @property
    def module(self) -> str:
        """The launcher's module."""
        return INDEPENDENT_ON_RAY if self.independent and self.launcher == "ray" else LAUNCHERS[self.launcher]


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

    Only --device auto takes what there is; a device or GPU that was named and is missing is an error. The cluster that
    a program is connected to counts as one at an address.
    """
    address = _cluster_address(cluster)
    if address is None:
        try:
            here = _choose(cluster, None)
        except UnavailableError:
            # What this machine lacks, the program's cluster may have.
            here = _choose(cluster.model_copy(update={"device": "auto", "cuda_ids": None}), None)
        if here.launcher == "ray" and import_module(LAUNCHERS[here.launcher]).attached():
            cluster, address = cluster.model_copy(update={"world_size": here.world_size}), "auto"
    devices = _choose(cluster, address)
    if devices.ray_address is None and (cluster.max_workers or 0) > devices.world_size:
        reason = "nothing joins a cluster that is started for the run on this machine"
        hint = "Give --ray-address, or a larger --world-size"
        raise SettingsError(Fault(f"--max-workers {cluster.max_workers}", reason, hint))
    if (
        cluster.strict
        and devices.ray_address is None
        and (cluster.min_workers or devices.world_size) < devices.world_size
    ):
        reason = f"--min-workers {cluster.min_workers} has no effect on a cluster that is started for the run"
        raise SettingsError(Fault("--strict", reason, "Leave one of them out, or give --ray-address"))
    return devices


def _choose(cluster: ClusterSettings, address: str | None) -> Devices:
    gpus = _chosen_gpus(cluster, address) if cluster.cuda_numbers else []
    found = 1
    if address:
        device, found = _on_cluster(cluster, address)
    else:
        device = "cuda" if gpus else choose_device(cluster.device)
        if device == "cuda" and cluster.launcher != "local":
            found = (len(gpus) or _COUNT["cuda"]()) * int(1 / cluster.gpus_per_worker)
    if cluster.max_workers is not None:
        found = min(found, cluster.max_workers)
    world_size = cluster.world_size or (1 if cluster.strategy == "single" else found)
    strategy = cluster.strategy_for(world_size)
    if cluster.parallel_independent:
        strategy = "single"
    if device in ("xpu", "mps") and world_size > 1:
        raise SettingsError(
            Fault(f"--world-size {world_size}", f"several workers on {device} are not supported", "Give --world-size 1")
        )
    _check_workers(cluster, world_size)
    grows = (cluster.max_workers or 0) > world_size
    launcher = _launcher(cluster) or ("ray" if address or grows or strategy != "single" else "local")
    if cluster.parallel_independent:
        launcher = "ray" if address else cluster.launcher or "subprocess"
    threads = cluster.threads or (1 if address else max(1, usable_cpus() // world_size))
    visible = ",".join(gpus) or None
    return Devices(
        device, world_size, threads, launcher, strategy, address, visible, cluster.parallel_independent,
        cluster.gpus_per_worker,
    )  # fmt: skip


def _check_workers(cluster: ClusterSettings, world_size: int) -> None:
    """Raises SettingsError unless the run begins with a number of workers between the fewest and the most."""
    least, most = cluster.min_workers or world_size, cluster.max_workers or world_size
    begins = f"--world-size {world_size}{'' if cluster.world_size else ' (default)'}"
    if least > world_size:
        hint = f"Give --world-size {least}, or a smaller --min-workers"
        raise SettingsError(Fault(f"--min-workers {least} with {begins}", "the run would begin with fewer", hint))
    if most < world_size:
        hint = f"Give --world-size {most}, or a larger --max-workers"
        raise SettingsError(Fault(f"--max-workers {most} with {begins}", "the run would begin with more", hint))


def _on_cluster(cluster: ClusterSettings, address: str) -> tuple[str, int]:
    """The device of workers on a running cluster, and the number of workers by default: one for each of its GPUs.

    The cluster is asked only for what the settings leave open.
    """
    counts_workers = cluster.world_size is None and cluster.strategy != "single"
    if cluster.device not in ("auto", "cuda") or (cluster.device == "cuda" and not counts_workers):
        return cluster.device, 1
    nodes = import_module(LAUNCHERS["ray"]).cluster_nodes(address)
    gpus = places(ResourceRequest(1, cluster.threads or 1, cluster.gpus_per_worker), nodes)
    return "cuda" if gpus or cluster.device == "cuda" else "cpu", max(1, gpus)


def _cluster_address(cluster: ClusterSettings) -> str | None:
    """The running cluster to use, if any: the option, or what `ray job submit` sets; the local launcher uses none."""
    if _launcher(cluster) in ("local", "subprocess"):
        return None
    if cluster.parallel_independent and cluster.launcher is None and cluster.ray_address is None:
        return None  # They need no Ray.
    address = cluster.ray_address or os.environ.get("RAY_ADDRESS") or None
    return None if address == "local" else address


def _launcher(cluster: ClusterSettings) -> Launcher | None:
    """The launcher that was chosen. That of independent trainers alone gives way where their run goes on with a
    strategy."""
    return None if cluster.launcher == "subprocess" and not cluster.parallel_independent else cluster.launcher


def choose_device(wanted: str) -> str:
    """The device that is meant by --device, the best one of this machine for auto. Raises UnavailableError."""
    there = [kind for kind, count in _COUNT.items() if count() > 0]
    if wanted == "auto":
        return there[0]
    if wanted not in there:
        reason = f"this machine has no such device, only {' and '.join(there)}"
        raise UnavailableError(Fault(f"--device {wanted}", reason, f"Give --device auto, or {there[0]}"))
    return wanted


def _chosen_gpus(cluster: ClusterSettings, address: str | None) -> list[str]:
    """The GPUs of --cuda-ids as CUDA_VISIBLE_DEVICES names them."""
    if address:
        reason = "on a running cluster Ray chooses the GPUs"
        raise SettingsError(Fault(f"--cuda-ids {cluster.cuda_ids}", reason, "Leave out --cuda-ids or --ray-address"))
    there = torch.cuda.device_count()
    if any(number >= there for number in cluster.cuda_numbers):
        has = f"{there} CUDA device{'' if there == 1 else 's'}{', counted from 0' if there else ''}"
        hint = "Leave it out: --device auto takes the best device there is"
        if there:
            hint = "Give the numbers of GPUs that are there, or leave it out"
        raise UnavailableError(
            Fault(f"--cuda-ids {cluster.cuda_ids}", f"this machine has {has}", f"{hint}; or give --device cpu")
        )
    # The numbers count what this process sees; where that is a choice already (a batch system's), choose among it.
    visible = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    return [visible[number] if visible else str(number) for number in cluster.cuda_numbers]
