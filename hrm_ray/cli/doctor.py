"""The body of `hrm-ray doctor`: a report on this machine, and on a cluster where one is named."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from hrm_ray.errors import HrmRayError
from hrm_ray.launch.doctor import (
    Part,
    Row,
    compilers,
    credentials,
    devices,
    examine,
    option_rows,
    storage,
    trainings,
    versions,
    without_home,
)
from hrm_ray.launch.node_report import LIBRARIES, NodeReport
from hrm_ray.launch.resources import gigabytes
from hrm_ray.tables import aligned

LOOK = "hrm_ray.orchestration.cluster_look"
"""Imported where Ray is asked: it may be broken."""
DEFAULT_BUNDLES = Path("artifacts") / "brains"
_STATES = {True: "ok", False: "NO", None: ""}


def run_doctor(*, as_json: bool, train: bool, ray_address: str | None, bundle_dir: Path | None) -> int:
    """Print the report; returns 0, or 1 where the cluster that was named or a training failed."""
    place = bundle_dir or DEFAULT_BUNDLES
    parts = [
        _shown(examine("versions", versions), as_json),
        _shown(examine("devices", devices), as_json),
        _shown(examine("compilers", compilers), as_json),
        _shown(examine("storage", lambda: storage(place)), as_json),
        _shown(examine("credentials", credentials), as_json),
    ]
    asked = []
    if ray_address is None:
        parts.append(_shown(examine("ray", _ray_here), as_json))
    else:
        asked.append(_shown(examine("cluster", lambda: _cluster(ray_address, bundle_dir)), as_json))
    parts.append(_shown(examine("options", option_rows), as_json))
    if train:
        found = examine("training", lambda: trainings(bundle_dir, ray_address, _say))
        asked.append(_shown(found, as_json))
    if as_json:
        print(json.dumps({part.title: list(map(_plain, part.rows)) for part in (*parts, *asked)}, indent=1))
    return 0 if all(part.works for part in asked) else 1


def _plain(row: Row) -> dict[str, Any]:
    known = {} if row.works is None else {"works": row.works}
    return {"name": row.name, "value": row.value, **known}


def _shown(part: Part, as_json: bool) -> Part:
    """The part, which is printed as soon as it is known, unless JSON is wanted."""
    if as_json:
        return part
    rows = list(part.rows)
    lines = [part.title]
    if part.title == "options":
        # Mostly everything works: those that do stand in one line.
        works = [row.name for row in rows if row.works]
        rows = [row for row in rows if not row.works]
        lines.append(f"  work here: {', '.join(works) or 'none'}")
    if rows:
        table = aligned([[_STATES[row.works], row.name, row.value] for row in rows])
        lines += [f"  {line}" for line in table.splitlines()]
    print("\n".join(lines), flush=True)
    return part


def _say(text: str) -> None:
    print(without_home(text), file=sys.stderr, flush=True)


def _ray_here() -> Iterator[Row]:
    _say("starting Ray on this machine (up to 90 s)")
    look = import_module(LOOK)
    try:
        start_s, task_s = look.start_here()
    except HrmRayError as error:
        yield Row("start", error.faults[0].reason, False)
        return
    yield Row("start", f"{start_s:.1f} s, with a token of its own unless RAY_AUTH_MODE says otherwise", True)
    yield Row("first task", f"{task_s:.1f} s", True)


def _cluster(address: str, bundle_dir: Path | None) -> Iterator[Row]:
    """Each node: its resources, versions, memory, and whether it sees the folder of bundles."""
    if bundle_dir is None:
        yield from _nodes(address, Path.cwd() / "bundle", shared=None)
        return
    bundle_dir.mkdir(parents=True, exist_ok=True)
    # A folder that was made just now: nodes that have one of the same name on their own disk do not have this one.
    with tempfile.TemporaryDirectory(prefix=".hrm-ray-doctor-", dir=bundle_dir) as probe:
        yield from _nodes(address, Path(probe).absolute() / "bundle", shared=bundle_dir)


def _nodes(address: str, bundle: Path, *, shared: Path | None) -> Iterator[Row]:
    try:
        reports: list[NodeReport] = import_module(LOOK).node_reports(address, bundle, LIBRARIES)
    except HrmRayError as error:
        yield Row("connection", str(error.faults[0]), False)
        return
    yield Row("nodes", str(len(reports)), True)
    for report in reports:
        amounts = ", ".join(f"{report.resources.get(kind, 0.0):g} {kind}s" for kind in ("CPU", "GPU"))
        node = report.measured
        if node is None:
            yield Row(report.name, f"{amounts}; {report.silent}", False)
            continue
        libraries = ", ".join(f"{name} {number}" for name, number in node.versions.items())
        seen = "" if shared is None else f"; {'sees' if node.folder else 'does not see'} {shared}"
        yield Row(
            report.name,
            f"{amounts}, {gigabytes(node.memory_bytes)} of memory, {libraries}{seen}",
            node.folder or shared is None,
        )
