"""The parts of a corpus: its files in a fixed order.

One job: list them, with what tells whether they changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hrm_ray.data.splits import split_files

if TYPE_CHECKING:
    from hrm_ray.data.readers import TextSource


@dataclass(frozen=True)
class Part:
    """One file."""

    name: str
    address: str
    bytes: int
    stamp: str
    random_access: bool


@dataclass(frozen=True)
class PartList:
    """The parts, and how many other files lie beside them."""

    parts: tuple[Part, ...]
    skipped: int


def list_parts(source: TextSource) -> PartList:
    """The files of a source."""
    found = split_files(source.path, source.split, source.apart)
    root = source.path if source.path.is_dir() else source.path.parent
    parts = []
    for file in found.files:
        stat = file.stat()
        parts.append(Part(file.relative_to(root).as_posix(), str(file), stat.st_size, str(stat.st_mtime_ns), True))
    return PartList(tuple(parts), found.skipped)
