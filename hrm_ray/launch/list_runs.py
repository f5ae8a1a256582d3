"""What lies in the bundles below a folder. Reads their small files only, and loads no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_ray.bundle.stored_settings import stored_settings
from hrm_ray.errors import DataError
from hrm_ray.launch.run_lock import is_in_use
from hrm_ray.metrics.jsonl import last_records
from hrm_ray.rundir import RunDir, read_json

BEST_FIGURES = ("exact_accuracy", "loss")
"""The held-out figure of a bundle: the first that it has."""


@dataclass(frozen=True)
class RunEntry:
    """One bundle. What is not known is None; `state` is running, finished, stopped, failed (its last steps have no end)
    or damaged, for the reason `damage`."""

    bundle: str
    state: str
    damage: str | None
    task: str | None
    parameters: int | None
    disk_bytes: int
    step: int | None
    steps: int | None
    """The step at which the run ends; None where it is not limited by steps."""
    loss: float | None
    best: dict[str, float] | None
    """The held-out figure of the best evaluation, by its name, and its step."""
    written_s: float
    """When the run last wrote, in seconds since the epoch."""


_MADE = {"merged": "merged", "expert": "with expert"}
"""What the metadata of a bundle that no run wrote tells of -> its state."""


def list_runs(folder: Path) -> list[RunEntry]:
    """The bundles below `folder` (or `folder` itself), the last written first. Damaged ones are listed as such."""
    return sorted(map(_entry, _bundles(folder)), key=lambda entry: -entry.written_s)


def _bundles(folder: Path) -> Iterator[RunDir]:
    """Folders that have a file of a bundle, also where another is missing."""
    for root, folders, files in os.walk(folder):
        run_dir = RunDir(Path(root))
        marks = {run_dir.training_args.name, run_dir.metrics.name, run_dir.metadata.name}
        if marks & set(files) or run_dir.checkpoints.name in folders:
            folders.clear()
            yield run_dir
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))


def _entry(run_dir: RunDir) -> RunEntry:
    known: dict[str, Any] = {"damage": None}
    for part in (_settings, _end, _records, _checkpoint):
        try:
            known |= part(run_dir)
        except DataError as error:
            known["damage"] = known["damage"] or f"{Path(error.faults[0].value).name}: {error.faults[0].reason}"
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            # JSON of another shape than ours.
            known["damage"] = known["damage"] or f"is not what hrm-ray train wrote ({error})"
    ended, step, checkpoint = (known.pop(name, None) for name in ("ended", "ended_step", "checkpoint"))
    if is_in_use(run_dir):
        state = "running"
    elif known["damage"] is not None:
        state = "damaged"
    elif ended is None or (checkpoint is not None and checkpoint > (step or 0)):
        state = "failed"
    else:
        state = ended if ended in ("finished", *_MADE.values()) else "stopped"
    reached = [one for one in (checkpoint, step, known.pop("recorded_step", None)) if one is not None]
    size, written_s = disk_use(run_dir.root)
    absent = dict.fromkeys(("task", "parameters", "steps", "loss", "best"))
    return RunEntry(
        **{
            **absent,
            **known,
            "bundle": str(run_dir.root),
            "state": state,
            "step": max(reached, default=None),
            "disk_bytes": size,
            "written_s": written_s,
        }
    )


def _settings(run_dir: RunDir) -> dict[str, Any]:
    settings = stored_settings(run_dir)
    return {"task": settings.model.task, "steps": settings.run.step_limit}


def _end(run_dir: RunDir) -> dict[str, Any]:
    """What metadata.json says of the last end, and best/ of the best evaluation."""
    found: dict[str, Any] = {}
    if run_dir.best.metadata.is_file():
        best = read_json(run_dir.best.metadata).get("best") or {}
        name = next((name for name in BEST_FIGURES if name in best), None)
        found["best"] = None if name is None else {name: float(best[name]), "step": int(best["step"])}
    if run_dir.metadata.is_file():
        about = read_json(run_dir.metadata)
        found["parameters"] = int(about["parameters"])
        made = next((name for name in _MADE if name in about), None)
        if made is None:
            found |= {"ended": about["ended"], "ended_step": int(about["step"])}
        else:
            found["ended"] = _MADE[made]
    return found


def _records(run_dir: RunDir) -> dict[str, Any]:
    """The last record of a step."""
    if not run_dir.metrics.is_file():
        return {}
    trained = [record for record in last_records(run_dir.metrics) if record.kind == "train"]
    if not trained:
        return {}
    # A record of puzzles has no loss where none halted since the one before.
    losses = [loss for record in trained if isinstance(loss := record.values.get("loss"), float)]
    return {"recorded_step": trained[-1].step, "loss": losses[-1] if losses else None}


def _checkpoint(run_dir: RunDir) -> dict[str, Any]:
    return {"checkpoint": max(run_dir.checkpoint_steps(), default=None)}


def disk_use(folder: Path) -> tuple[int, float]:
    """The bytes of all files below a folder, and when the newest was written."""
    size, newest_s = 0, 0.0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                found = os.lstat(os.path.join(root, name))
            except OSError:
                continue  # deleted meanwhile by a run
            size += found.st_size
            newest_s = max(newest_s, found.st_mtime)
    return size, newest_s


def as_json(entry: RunEntry) -> str:
    """One line of JSON."""
    return json.dumps(vars(entry))
