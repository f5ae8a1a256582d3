"""What a run asks of every machine that it may use, against what is there: a table, and what is missing.

Nothing here queries Ray; `measure` runs on each node.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hrm_ray
from hrm_ray.errors import Fault, HrmRayError, ResourceError, UnavailableError
from hrm_ray.launch.resources import ResourceRequest, gigabytes, places
from hrm_ray.tables import aligned
from hrm_ray.train.host_memory import available_memory_bytes

LIBRARIES = ("torch", "ray")
"""Libraries besides hrm_ray whose versions must be those of the command."""


@dataclass(frozen=True)
class Measured:
    """What a node says of itself. `disk_bytes` are free where the bundle is, or would be; `folder` says whether it sees
    the bundle's folder, or that in which it would be made."""

    memory_bytes: int
    disk_bytes: int
    folder: bool
    versions: Mapping[str, str]
    """By library; without those that are missing."""


@dataclass(frozen=True)
class NodeReport:
    """A node: its resources in Ray's terms, and what it says of itself; `silent` says why it says nothing."""

    name: str
    resources: Mapping[str, float]
    measured: Measured | None = None
    silent: str = ""


@dataclass(frozen=True)
class Need:
    """What a run needs: the workers, host memory of each, disk at the bundle, and libraries with their versions."""

    request: ResourceRequest
    memory_bytes: int
    disk_bytes: int
    versions: Mapping[str, str] = field(default_factory=dict)
    """An empty one: any."""


def installed(libraries: Sequence[str]) -> dict[str, str]:
    """The versions of hrm_ray and of the libraries that are installed here; none is imported."""
    found = {"hrm_ray": hrm_ray.__version__}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure(bundle: str, libraries: Sequence[str]) -> Measured:
    """What this machine says of itself."""
    place = Path(bundle)
    there = place.is_dir() or place.parent.is_dir()
    while not place.exists():
        place = place.parent
    return Measured(available_memory_bytes(), shutil.disk_usage(place).free, there, installed(libraries))


def check_nodes(need: Need, reports: Sequence[NodeReport], where: str) -> None:
    """Raise UnavailableError or ResourceError, with the table as its detail, where the nodes that could take a worker
    lack what the run needs."""
    usable = [report for report in reports if places(need.request, [report.resources])]
    faults: list[Fault] = []
    for report in usable:
        lacking = _lacking(need, report)
        if lacking is not None:
            hint = "Install the same versions on all nodes, with hrm-ray in the environment that started Ray there"
            faults.append(Fault(f"node {report.name}", lacking, hint))
    error: HrmRayError | None = UnavailableError(faults[0] if len(faults) == 1 else faults[:3]) if faults else None
    error = error or _shortage(need, usable, where)
    if error is not None:
        error.detail = table(need, reports)
        raise error


def _lacking(need: Need, report: NodeReport) -> str | None:
    """Which library a node lacks, or has in another version; None for a node that says nothing."""
    if report.measured is None:
        return report.silent if report.silent.startswith("hrm_ray") else None
    for name, wanted in need.versions.items():
        found = report.measured.versions.get(name)
        if found is None:
            return f"{name} is not installed there"
        if wanted and _release(found) != _release(wanted):
            return f"has {name} {found}, but this command {wanted}"
    return None


def _release(number: str) -> tuple[str, ...]:
    """2.13.0+cu128 -> (2, 13): builds for other devices, and repairs, are the same to each other."""
    return tuple(number.partition("+")[0].split(".")[:2])


def _shortage(need: Need, usable: Sequence[NodeReport], where: str) -> ResourceError | None:
    measured = [(report.name, report.resources, report.measured) for report in usable if report.measured is not None]
    # Of a node that says nothing only the CPUs and GPUs are known.
    workers = places(need.request, [report.resources for report in usable if report.measured is None])
    for _, resources, node in measured:
        workers += min(places(need.request, [resources]), node.memory_bytes // max(1, need.memory_bytes))
    if workers < need.request.world_size:
        reason = f"each worker needs {gigabytes(need.memory_bytes)} of memory, and the nodes at {where} have room for "
        hint = f"Use --world-size {workers}" if workers else "Choose a smaller model or --batch-size, or larger nodes"
        return ResourceError(Fault(f"--world-size {need.request.world_size}", f"{reason}{workers}", hint))
    for name, _, node in measured:
        error = disk_shortage(need, node, f"disk of node {name}")
        if error is not None:
            return error
    return None


def disk_shortage(need: Need, node: Measured, disk: str) -> ResourceError | None:
    """The error where the disk of the bundle has no room for what the run saves."""
    if node.disk_bytes >= need.disk_bytes:
        return None
    takes, free = gigabytes(need.disk_bytes), gigabytes(node.disk_bytes)
    hint = "Lower --keep, free some space, or give another --bundle-dir"
    return ResourceError(Fault(disk, f"checkpoints take {takes}, {free} are free at the bundle", hint))


def table(need: Need, reports: Sequence[NodeReport]) -> str:
    """A row for what each worker needs, and one for each node."""
    names = list(dict.fromkeys(["hrm_ray", *LIBRARIES, *need.versions]))
    request = need.request
    workers = f"{request.world_size} worker{'' if request.world_size == 1 else 's'}, each"
    asked = [workers, f"{request.threads}", f"{request.gpus_per_worker:g}", gigabytes(need.memory_bytes)]
    versions = [need.versions.get(name, "") for name in names]
    rows = [
        ["", "CPUs", "GPUs", "memory", "disk", *names],
        [*asked, gigabytes(need.disk_bytes), *versions],
    ]
    for report in reports:
        row = [report.name, *(f"{report.resources.get(kind, 0.0):g}" for kind in ("CPU", "GPU"))]
        node = report.measured
        if node is None:
            rows.append([*row, report.silent])
            continue
        disk = gigabytes(node.disk_bytes) if node.folder else "no folder"
        rows.append([*row, gigabytes(node.memory_bytes), disk, *(node.versions.get(name, "none") for name in names)])
    return aligned([row + [""] * (len(rows[0]) - len(row)) for row in rows])
