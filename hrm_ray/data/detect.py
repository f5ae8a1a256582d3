"""What a path holds: puzzles or text, and how much of it.

One job: enough facts for settings (the task) and for a dry run, quickly. Text is not read beyond its first document.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hrm_ray.data.file_kinds import FileKind
from hrm_ray.data.formats.lines import parse_line
from hrm_ray.data.parts import Part, TextSource, list_parts
from hrm_ray.data.places import is_local
from hrm_ray.data.puzzles.format import DESCRIPTION, PuzzleFacts
from hrm_ray.data.puzzles.samples import open_puzzles
from hrm_ray.data.readers import read_documents


@dataclass(frozen=True)
class DataFacts:
    """What `detect` found. `bytes` and `files` are those of the split, `skipped_files` lie in the folder (or archive)
    but are not read; `puzzle` is there where the task is "puzzle"."""

    task: Literal["lm", "puzzle"]
    path: str
    split: str
    files: int
    bytes: int
    skipped_files: int
    puzzle: PuzzleFacts | None


def detect(source: TextSource) -> DataFacts:
    """Tells the task from the data: a folder with dataset.json, a .safetensors file, and .jsonl whose first row has
    lists `inputs` and `labels` are puzzles; everything else is text, whose first document is read as a check.

    Raises SettingsError for a path that is not there, DataFault for data that cannot be read as either, and what
    `list_parts` raises.
    """
    split, path = source.split, Path(source.path)
    if is_local(source.path) and (path / DESCRIPTION).is_file():
        samples = open_puzzles(path, split)
        size = (path / f"{split}.safetensors").stat().st_size
        return DataFacts("puzzle", source.path, split, 1, size, 0, samples.facts)
    if is_local(source.path) and path.suffix.lower() == ".safetensors" and path.is_file():
        return DataFacts("puzzle", source.path, split, 1, path.stat().st_size, 0, open_puzzles(path, split).facts)
    found = list_parts(source)
    size = sum(part.bytes for part in found.parts)
    files, skipped = len(found.parts), found.skipped
    if _is_puzzle_rows(found.parts[0]):
        return DataFacts("puzzle", source.path, split, files, size, skipped, open_puzzles(path, split).facts)
    for document in read_documents(source):
        if document.text:
            break
    return DataFacts("lm", source.path, split, files, size, skipped, None)


def _is_puzzle_rows(part: Part) -> bool:
    """True for a .jsonl file whose first row has `inputs` and `labels` as lists."""
    if part.kind != FileKind("jsonl", None) or not is_local(part.address):
        return False
    offset = 0
    with open(part.address, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = parse_line(line, f"{part.address}:{number}", offset)
            offset += len(line)
            if row is not None:
                return isinstance(row.get("inputs"), list) and isinstance(row.get("labels"), list)
    return False
