"""Which names belong to a split; the same rules for folders and archives."""

from __future__ import annotations

from collections.abc import Sequence

from hrm_ray.data.file_kinds import READABLE, stem_of
from hrm_ray.errors import DataError, Fault, listed

WHOLE = "train"
"""The split that means all of a path that is not divided into splits."""


def split_of(name: str) -> str:
    """The split that a name ("/" between its parts) belongs to: the first folder, or the file's stem."""
    first, slash, _ = name.partition("/")
    return first if slash else stem_of(first)


def missing_split(path: str, split: str, splits: Sequence[str]) -> DataError:
    """The error for an unknown split; it names those there are."""
    hint = f"The splits are: {listed(splits)}"
    return DataError(Fault(f"split `{split}` of {path}", "there is no such split", hint))


def has_split(path: str, names: Sequence[str], split: str, skipped: int) -> bool:
    """Whether `names` are divided so that `split` is one of its parts; False where `split` is the whole.

    `skipped` counts the names of other kinds beside them. Raises DataError where there is nothing to read, or no such
    split.
    """
    if split in {split_of(name) for name in names}:
        return True
    if split != WHOLE:
        raise missing_split(path, split, sorted({split_of(name) for name in names}))
    if not names:
        reason = f"contains no readable file ({skipped} of other kinds)"
        raise DataError(Fault(path, reason, f"Give {READABLE}, or --as-text PATTERNS"))
    return False


def check_left(path: str, names: Sequence[str], apart: str | None) -> None:
    """Raises DataError if nothing is left to train on once the split `apart` is held out."""
    if all(split_of(name) == apart for name in names):
        reason = f"all files belong to the split `{apart}`, which is held out"
        raise DataError(Fault(path, reason, "Add training data, or hold out another split"))


def in_path_order(name: str) -> list[str]:
    """The sort key of a name: its parts, not its text, so that the order is the same on every system."""
    return name.split("/")
