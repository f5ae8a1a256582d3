"""What earlier searches found, kept in the user's cache folder by hardware, versions and configuration."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hrm_ray import __version__
from hrm_ray.launch.resolve import ResolvedRun
from hrm_ray.rundir import write_json
from hrm_ray.search.optimize import LEVERS, Found, Point, Search, Trial, gpus_of
from hrm_ray.search.trial import Verdict
from hrm_ray.settings.tree import to_dotted

_SECTIONS = ("model", "optimizer", "memory", "adapt", "cluster")
_DATA_LEAVES = ("max_seq_len", "packing", "streaming", "linear_dataset", "shuffle_buffer_size")
SAME_LIMIT = 0.05
"""Where more or less memory is free than at the earlier search, by more than this part, the search is made anew."""


def file_of(search: Search) -> Path:
    """The file for what this search finds, on this machine with these versions."""
    resolved = search.resolved
    dotted = to_dotted(resolved.settings)
    leaves = {key: value for key, value in dotted.items() if key.partition(".")[0] in _SECTIONS}
    leaves |= {f"data.{name}": dotted[f"data.{name}"] for name in _DATA_LEAVES}
    about = {
        "versions": [__version__, str(torch.__version__), platform.python_version()],
        "machine": [platform.node(), platform.machine(), *_device(resolved)],
        "config": asdict(resolved.config),
        "evaluates": resolved.evaluation is not None,
        "settings": leaves,
        # What the user has decided is not among the levers.
        "levers": [lever.name for lever in search.levers()],
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    return _cache_folder() / "optimize" / f"{key[:32]}.json"


def remember(file: Path, found: Found) -> None:
    """Keep what was found. Raises OSError."""
    plain = {
        "limit_bytes": found.limit_bytes,
        "point": _plain(found.point),
        "trials": [{"point": _plain(one.point), "verdict": asdict(one.verdict)} for one in found.trials],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, plain)


def recall(file: Path, limit_bytes: int) -> Found | None:
    """What was found under about this limit; None where nothing was, or the file is unreadable."""
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        trials = tuple(Trial(_point(one["point"]), Verdict(**one["verdict"])) for one in plain["trials"])
        found = Found(_point(plain["point"]), trials, int(plain["limit_bytes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if abs(found.limit_bytes - limit_bytes) <= SAME_LIMIT * limit_bytes else None


def _plain(point: Point) -> dict[str, Any]:
    return {
        "context": point.context,
        "batch_size": point.batch_size,
        "levers": [lever.name for lever in point.levers],
    }


def _point(plain: dict[str, Any]) -> Point:
    by_name = {lever.name: lever for lever in LEVERS}
    return Point(plain["context"], plain["batch_size"], tuple(by_name[name] for name in plain["levers"]))


def _device(resolved: ResolvedRun) -> list[str]:
    if resolved.devices.device != "cuda":
        return [resolved.devices.device, str(os.cpu_count())]
    return [f"{gpu.name} {gpu.total_bytes}" for gpu in gpus_of(resolved.devices)]


def _cache_folder() -> Path:
    """The folder of this user for files that may be deleted at any time."""
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hrm_ray"
