"""Checks that CPUs, GPUs and memory suffice for the workers, on this machine or a cluster, before any is started.

Ray would wait forever for missing resources. This module neither starts nor queries Ray.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hrm_ray.errors import Fault, ResourceError

RAY_MEMORY_BYTES = 700 * 2**20
"""Resident memory of Ray's own processes (measured 0.7 GB with and without the dashboard)."""
WORKER_MEMORY_BYTES = 500 * 2**20
"""Resident memory of one training worker with torch loaded, before any model (measured 0.4 GB)."""


@dataclass(frozen=True)
class ResourceRequest:
    """The resources of a worker group: the number of workers, and the CPUs (threads) and GPUs (0 to 1) of each."""

    world_size: int
    threads: int
    gpus_per_worker: float

    @property
    def cpus(self) -> int:
        return self.world_size * self.threads

    @property
    def gpus(self) -> int:
        """Whole GPUs: a worker does not span two."""
        return math.ceil(self.world_size / int(1 / self.gpus_per_worker)) if self.gpus_per_worker else 0

    def per_worker(self) -> dict[str, float]:
        """The resources of one worker in Ray's terms."""
        need: dict[str, float] = {"CPU": float(self.threads)}
        if self.gpus_per_worker:
            need["GPU"] = self.gpus_per_worker
        return need


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Windows and macOS have no affinity mask
        return os.cpu_count() or 1


def check_machine(request: ResourceRequest, cpus: int, memory_bytes: int) -> None:
    """Raise ResourceError unless this machine has room for a local cluster with the worker group."""
    faults = []
    if request.cpus > cpus:
        faults.append(
            Fault(
                f"--world-size {request.world_size} x --threads {request.threads} = {request.cpus} CPUs",
                f"this machine offers {cpus}",
                f"Use at most --world-size {max(1, cpus // request.threads)} with --threads {request.threads}, "
                "or give a cluster with --ray-address",
            )
        )
    need = RAY_MEMORY_BYTES + request.world_size * WORKER_MEMORY_BYTES
    if need > memory_bytes:
        faults.append(
            Fault(
                f"--world-size {request.world_size}",
                f"Ray and the workers need about {need / 2**30:.1f} GiB of memory before any model, "
                f"{memory_bytes / 2**30:.1f} GiB is available",
                "Use fewer workers, free memory, or use --launcher local for one device",
            )
        )
    if faults:
        raise ResourceError(faults)


def check_local_gpus(request: ResourceRequest, gpus: int) -> None:
    """Raise ResourceError unless this machine has a GPU per worker."""
    if request.gpus > gpus:
        raise ResourceError(
            Fault(
                f"--world-size {request.world_size} with --device cuda",
                f"this machine has {gpus} visible GPUs",
                f"Use --world-size {max(1, gpus)}" if gpus else "Use --device cpu",
            )
        )


def places(request: ResourceRequest, nodes: Sequence[Mapping[str, float]]) -> int:
    """The number of workers that fit on these nodes; a worker does not span nodes."""
    return sum(
        min(int(node.get(name, 0.0) // amount) for name, amount in request.per_worker().items()) for node in nodes
    )


def spare_cpus(request: ResourceRequest, nodes: Sequence[Mapping[str, float]], most: int) -> list[int]:
    """Whole CPUs that these nodes (free resources of each) have besides those of the workers, at most `most`: for each
    CPU the index of its node. All workers still find a place when they are taken."""
    free, spare = [dict(node) for node in nodes], list[int]()
    for index, node in enumerate(free):
        while len(spare) < most and node.get("CPU", 0.0) >= 1:
            node["CPU"] -= 1
            if places(request, free) < request.world_size:
                node["CPU"] += 1
                break
            spare.append(index)
    return spare


def check_cluster(request: ResourceRequest, nodes: Sequence[Mapping[str, float]], address: str) -> None:
    """Raise ResourceError unless the worker group fits on the living nodes (total resources of each)."""
    fits = places(request, nodes)
    if fits < request.world_size:
        raise ResourceError(
            Fault(
                f"--world-size {request.world_size} with {_words(request)} per worker",
                f"the cluster at {address} has room for {fits}: {_totals(nodes)} on {len(nodes)} node(s)",
                f"{f'Use --world-size {fits}' if fits else 'Lower --threads, use another device'}, or "
                "--wait-for-resources 10m for more nodes",
            )
        )


def check_free(request: ResourceRequest, free: Mapping[str, float], total: Mapping[str, float], address: str) -> None:
    """Raise ResourceError unless the cluster has enough free right now; others may be using it."""
    need = {"CPU": float(request.cpus), "GPU": request.world_size * request.gpus_per_worker}
    short = [name for name, amount in need.items() if amount > free.get(name, 0.0)]
    if short:
        state = ", ".join(f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name}s free" for name in short)
        raise ResourceError(
            Fault(
                f"--world-size {request.world_size} with {_words(request)} per worker",
                f"the cluster at {address} is busy: {state}",
                "Give --wait-for-resources 10m (`ray status` shows who uses it), or use fewer workers",
            )
        )


def _words(request: ResourceRequest) -> str:
    gpu = f" and {request.gpus_per_worker:g} GPU" if request.gpus_per_worker else ""
    return f"{request.threads} CPU{'s' if request.threads > 1 else ''}{gpu}"


def _totals(nodes: Sequence[Mapping[str, float]]) -> str:
    return ", ".join(f"{sum(node.get(name, 0.0) for node in nodes):g} {name}s" for name in ("CPU", "GPU"))


def gigabytes(size: int) -> str:
    """Bytes as text."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
