"""`hrm-ray expert`: lists the stored experts, and puts one into a bundle."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from hrm_ray.bundle.expert_store import StoredExpert, put_expert, read_registry
from hrm_ray.errors import Fault, SettingsError
from hrm_ray.settings.run import DEFAULT_EXPERTS_DIR
from hrm_ray.tables import aligned

_FIGURES = ("exact_accuracy", "loss")
"""The evaluation figure to show: the first that exists."""


def run_list(experts_dir: Path | None, *, as_json: bool) -> int:
    """Print the experts of a folder; returns the exit code."""
    folder = experts_dir if experts_dir is not None else DEFAULT_EXPERTS_DIR
    registry = read_registry(folder)
    if experts_dir is not None and not folder.is_dir():
        hint = "Give the folder in which hrm-ray train --expert-id stored experts"
        raise SettingsError(Fault(f"--experts-dir {folder}", "there is no such folder", hint))
    if as_json:
        print(json.dumps({identifier: asdict(entry) for identifier, entry in registry.items()}, indent=2))
        return 0
    if not registry:
        print(f"{folder}: no experts; hrm-ray train --expert-id trains one")
        return 0
    rows: list[tuple[str, ...]] = [("id", "index", "steps", "evaluation, before -> after", "trained in")]
    rows += [_row(identifier, entry) for identifier, entry in registry.items()]
    print(aligned(rows))
    return 0


def run_put(identifier: str, into: Path, out: Path, experts_dir: Path | None) -> int:
    """Put a stored expert into a copy of a bundle; returns the exit code."""
    folder = experts_dir if experts_dir is not None else DEFAULT_EXPERTS_DIR
    entry = put_expert(folder, identifier, into.absolute(), out)
    if entry.base != str(into.absolute()):
        reason = "the routers of this bundle may send it other tokens"
        print(f"note: {identifier} was trained in {entry.base}, not in {into}: {reason}", file=sys.stderr)
    print(f"{out}: {into} with expert {identifier} as number {entry.index} of every block")
    print(f"next: hrm-ray generate {shlex.quote(str(out))} --prompt ..., or hrm-ray solve")
    return 0


def _row(identifier: str, entry: StoredExpert) -> tuple[str, ...]:
    return (identifier, str(entry.index), str(entry.step), _metric_change(entry.before, entry.after), entry.base)


def _metric_change(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> str:
    """The first metric that both evaluations have, as "name before -> after"."""
    for name in _FIGURES:
        if before is not None and after is not None and name in before and name in after:
            return f"{name} {before[name]:.4g} -> {after[name]:.4g}"
    return "not evaluated"
