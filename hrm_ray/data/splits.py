"""Which files of a path belong to a split.

One job: paths and names. It does not open the files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hrm_ray.errors import DataFault, Fault, SettingsError

TEXT_SUFFIXES = (".txt", ".jsonl")
"""Suffixes that are read as documents (compared without regard to case)."""

WHOLE = "train"
"""The split that means everything where a path is not divided into splits."""


@dataclass(frozen=True)
class SplitFiles:
    """The readable files of a split, sorted by their path, and how many other files lie beside them."""

    files: tuple[Path, ...]
    skipped: int


def require_path(path: Path) -> None:
    """Raises SettingsError where nothing is at `path`."""
    if not path.exists():
        nearest = next((parent for parent in path.absolute().parents if parent.exists()), Path(path.anchor))
        raise SettingsError(
            Fault(
                str(path),
                f"nothing is at this path (the nearest folder there is: {nearest})",
                f"Give a {' or '.join(TEXT_SUFFIXES)} file, a folder of them, or a folder made by `hrm-ray data build`",
            )
        )


def missing_split(path: Path, split: str, splits: Sequence[str]) -> DataFault:
    """The fault for a split that is not there; says which are."""
    there = ", ".join(splits) or "none"
    return DataFault(Fault(f"split `{split}` of {path}", "there is no such split", f"Splits there are: {there}"))


def split_files(path: Path, split: str, apart: str | None = None) -> SplitFiles:
    """The .txt and .jsonl files of `split` at `path`, a file or a folder (searched through, hidden names left out).

    In a folder, split NAME is its sub-folder NAME and its files NAME.txt, NAME.jsonl; where there are none, the split
    "train" is the whole folder, without the files of the split `apart`. A single file has only the split "train".
    Raises SettingsError for a missing path, DataFault for an unknown suffix, an unknown split, or a folder without
    readable files.
    """
    require_path(path)
    suffixes = " and ".join(TEXT_SUFFIXES)
    if not path.is_dir():
        if path.suffix.lower() not in TEXT_SUFFIXES:
            raise DataFault(
                Fault(str(path), f"files with the suffix `{path.suffix}` are not read", f"Give {suffixes} files")
            )
        if split != WHOLE:
            raise missing_split(path, split, [WHOLE])
        return SplitFiles((path,), 0)
    readable, skipped = _walk(path)
    named = [file for file in readable if _split_of(path, file) == split]
    if not named and split != WHOLE:
        raise missing_split(path, split, sorted({_split_of(path, file) for file in readable}))
    if not readable:
        raise DataFault(
            Fault(
                str(path),
                f"there is no readable file in this folder ({skipped} of other kinds)",
                f"Give {suffixes} files",
            )
        )
    rest = [file for file in readable if _split_of(path, file) != apart]
    if not named and not rest:
        reason = f"all of its files are of the split `{apart}`, which is held out"
        raise DataFault(Fault(str(path), reason, "Add training data, or hold out another split"))
    return SplitFiles(tuple(named or rest), skipped)


def _split_of(folder: Path, file: Path) -> str:
    inner = file.relative_to(folder)
    return inner.parts[0] if len(inner.parts) > 1 else inner.stem


def _walk(folder: Path) -> tuple[list[Path], int]:
    readable: list[Path] = []
    skipped = 0
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(root, name)
            if name.startswith(".") or file.suffix.lower() not in TEXT_SUFFIXES:
                skipped += 1
            else:
                readable.append(file)
    # By the parts of the path and not by its text: the order must be the same on Windows and Linux.
    return sorted(readable, key=lambda file: file.relative_to(folder).parts), skipped
