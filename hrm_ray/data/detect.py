"""What a path holds: puzzles or text, and how much of it.

One job: enough facts for settings (the task) and for a dry run, quickly. Text is not read beyond its first document.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hrm_ray.data.puzzles.format import DESCRIPTION, PuzzleFacts
from hrm_ray.data.puzzles.samples import open_puzzles
from hrm_ray.data.readers import TextSource, parse_line, read_documents
from hrm_ray.data.splits import require_path, split_files


@dataclass(frozen=True)
class DataFacts:
    """What `detect` found. `bytes` and `files` are those of the split, `skipped_files` lie in the folder but are not
    read; `puzzle` is there where the task is "puzzle"."""

    task: Literal["lm", "puzzle"]
    path: Path
    split: str
    files: int
    bytes: int
    skipped_files: int
    puzzle: PuzzleFacts | None


def detect(source: TextSource) -> DataFacts:
    """Tells the task from the data: a folder with dataset.json, a .safetensors file, and .jsonl whose first row has
    lists `inputs` and `labels` are puzzles; everything else is text, whose first document is read as a check.

    Raises SettingsError for a path that is not there, DataFault for data that cannot be read as either.
    """
    path, split = source.path, source.split
    require_path(path)
    if path.is_dir() and (path / DESCRIPTION).is_file():
        samples = open_puzzles(path, split)
        return DataFacts("puzzle", path, split, 1, (path / f"{split}.safetensors").stat().st_size, 0, samples.facts)
    if path.suffix.lower() == ".safetensors" and path.is_file():
        return DataFacts("puzzle", path, split, 1, path.stat().st_size, 0, open_puzzles(path, split).facts)
    found = split_files(path, split, source.apart)
    size = sum(file.stat().st_size for file in found.files)
    if _is_puzzle_rows(found.files[0]):
        return DataFacts("puzzle", path, split, len(found.files), size, found.skipped, open_puzzles(path, split).facts)
    for document in read_documents(source):
        if document.text:
            break
    return DataFacts("lm", path, split, len(found.files), size, found.skipped, None)


def _is_puzzle_rows(file: Path) -> bool:
    """True for a .jsonl file whose first row has `inputs` and `labels` as lists."""
    if file.suffix.lower() != ".jsonl":
        return False
    offset = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = parse_line(line, f"{file}:{number}", offset)
            offset += len(line)
            if row is not None:
                return isinstance(row.get("inputs"), list) and isinstance(row.get("labels"), list)
    return False
