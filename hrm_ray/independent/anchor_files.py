"""Which files of anchors and contributions are whole, and which nobody needs any more."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from hrm_ray.atomic_files import atomic_write
from hrm_ray.independent.calls import AnchorRef
from hrm_ray.ledger import LedgerReader, Round
from hrm_ray.rundir import RunDir, file_sha256

KEPT_ANCHORS = 3
"""Newest anchors that stay: a trainer may be reading the one before, and recovery goes back where the newest is
damaged."""
_WEIGHTS, _MOMENTUM, _CHECKSUM = ".safetensors", ".momentum.safetensors", ".sha256"


def momentum_of(anchor: Path) -> Path:
    """The momentum of the outer step beside an anchor."""
    return anchor.with_name(anchor.name.replace(_WEIGHTS, _MOMENTUM))


def seal_momentum(anchor: Path, checksum: str) -> None:
    """Write the sha256 of an anchor's momentum beside it."""
    momentum = momentum_of(anchor)
    with atomic_write(momentum.with_name(momentum.name + _CHECKSUM)) as file:
        file.write(checksum.encode())


def whole_momentum(anchor: Path) -> bool:
    """Whether an anchor's momentum is there as it was written."""
    momentum = momentum_of(anchor)
    try:
        sealed = momentum.with_name(momentum.name + _CHECKSUM).read_bytes().decode("ascii", "replace")
        return file_sha256(momentum) == sealed
    except FileNotFoundError:
        return False


def remove_anchor(anchor: Path) -> None:
    """Delete an anchor that no round names."""
    for path in anchor.parent.glob(f"{anchor.name.removesuffix(_WEIGHTS)}.*"):
        _remove(path)


def whole_anchor(run_dir: RunDir, round_: Round) -> bool:
    """Whether the anchor of a round is there as it was written."""
    path = run_dir.root / round_.anchor
    return path.is_file() and file_sha256(path) == round_.checksum


def remove_old_anchors(run_dir: RunDir, ledger: LedgerReader, anchor: AnchorRef) -> None:
    """Delete all anchors but the newest of the lineage. What another process has open stays: Windows deletes no such
    file, and the next call does."""
    kept = {run_dir.root / anchor.path}
    kept |= {run_dir.root / one.anchor for one in islice(ledger.lineage(), KEPT_ANCHORS)}
    for path in _files(run_dir.independent.anchors):
        if path.with_name(path.name.removesuffix(_CHECKSUM).replace(_MOMENTUM, _WEIGHTS)) not in kept:
            _remove(path)


def remove_reports(run_dir: RunDir, names: Iterable[str]) -> None:
    """Delete the files of reports that were merged or rejected."""
    for name in names:
        for path in run_dir.independent.contributions.glob(f"{name}.*"):
            _remove(path)


def remove_unreported(run_dir: RunDir, ledger: LedgerReader, trainer: str | None = None) -> None:
    """Delete the contributions that are not staged, all or those of one trainer. Only while it writes none."""
    staged = {one.name for one in ledger.staged()}
    for path in _files(run_dir.independent.contributions):
        name = path.name.partition(".")[0]
        if name not in staged and trainer in (None, name.rsplit("-", 2)[0]):
            _remove(path)


def remove_states(run_dir: RunDir) -> None:
    """Delete the states of their optimizers that trainers have left."""
    for folder in _files(run_dir.independent.trainers):
        shutil.rmtree(RunDir(folder).checkpoints, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
