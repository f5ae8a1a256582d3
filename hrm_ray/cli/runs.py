"""The body of `hrm-ray runs`: a table of the bundles below a folder."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hrm_ray.errors import Fault, SettingsError
from hrm_ray.launch import list_runs
from hrm_ray.launch.list_runs import RunEntry
from hrm_ray.settings.profiles import BUNDLE_DIRS
from hrm_ray.tables import aligned

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))
_COLUMNS = ("bundle", "task", "parameters", "disk", "step", "loss", "best held out", "state", "age")


def run_runs(folder: Path | None, *, as_json: bool) -> int:
    """Print the bundles; returns the exit code."""
    below = folder if folder is not None else BUNDLE_DIRS[None]
    if folder is not None and not folder.is_dir():
        raise SettingsError(Fault(str(folder), "there is no such folder", "Give a folder of bundles"))
    entries = list_runs.list_runs(below)
    if as_json:
        for entry in entries:
            print(list_runs.as_json(entry))
        return 0
    if not entries:
        print(f"{below}: no bundles; hrm-ray train makes one")
        return 0
    now_s = time.time()
    print(aligned([_COLUMNS, *(_row(entry, below, now_s) for entry in entries)]))
    for entry in entries:
        if entry.damage is not None:
            print(f"{entry.bundle}: {entry.damage}", file=sys.stderr)
    return 0


def _row(entry: RunEntry, below: Path, now_s: float) -> tuple[str, ...]:
    name = Path(entry.bundle).relative_to(below).as_posix()
    best = ""
    if entry.best is not None:
        (figure, value), _ = entry.best.items()
        best = f"{figure} {value:.4g} (step {entry.best['step']})"
    steps = "" if entry.steps is None else f"/{entry.steps}"
    return (
        entry.bundle if name == "." else name,
        entry.task or "",
        "" if entry.parameters is None else f"{entry.parameters:,}",
        f"{entry.disk_bytes / 1e6:.1f} MB",
        "" if entry.step is None else f"{entry.step}{steps}",
        "" if entry.loss is None else f"{entry.loss:.4f}",
        best,
        entry.state,
        _age(now_s - entry.written_s),
    )


def _age(seconds: float) -> str:
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return "now"
