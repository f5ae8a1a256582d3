"""Detects whether a path contains puzzles or text, and how much. Text is read up to its first document only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hrm_ray.data.file_kinds import TEXT_FORMATS, FileKind, kind_of
from hrm_ray.data.file_systems import file_system_of, is_local
from hrm_ray.data.formats.lines import parse_line
from hrm_ray.data.parts import Part, TextSource, list_parts
from hrm_ray.data.puzzles.format import DESCRIPTION, PuzzleFacts
from hrm_ray.data.puzzles.samples import open_puzzles
from hrm_ray.data.readers import read_documents
from hrm_ray.data.rows import Document, OnBadRow
from hrm_ray.errors import DataError


@dataclass(frozen=True)
class DataFacts:
    """The result of `detect`. `bytes` and `files` are those of the split, `skipped_files` are in the folder (or
    archive) but not read; `columns` is False if no part can have any (plain text files); `puzzle` is set if the task is
    "puzzle"; `notes` are warnings about files that are no part of the data; `unused` names those of
    `as_text`, `delimiter` and `text_rows` that apply to none of the files."""

    task: Literal["lm", "puzzle"]
    path: str
    split: str
    files: int
    bytes: int
    skipped_files: int
    puzzle: PuzzleFacts | None
    columns: bool = True
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def detect(source: TextSource, on_bad_row: OnBadRow = "fail") -> DataFacts:
    """The task that the data is for: a folder with dataset.json, a .safetensors file, and .jsonl whose first row has
    lists `inputs` and `labels` are puzzles; everything else is text, whose first document is read as a check. Bad rows
    before it are skipped where `on_bad_row` says so.

    Raises SettingsError for a path that is not there, DataError for data that cannot be read as either, and what
    `list_parts` raises.
    """
    split, path = source.split, Path(source.path)
    file = puzzle_tensors(source)
    if file is not None:
        samples = open_puzzles(path, split)
        return DataFacts("puzzle", source.path, split, 1, file.stat().st_size, 0, samples.facts)
    found = list_parts(source)
    size = sum(part.bytes for part in found.parts)
    files, skipped = len(found.parts), found.skipped
    row = _first_row(found.parts[0], on_bad_row)
    if _is_puzzle(row):
        return DataFacts("puzzle", source.path, split, files, size, skipped, open_puzzles(path, split).facts)
    if row is None or not _has_text(row, source):
        for document in read_documents(source, on_bad_row):
            if document.text:
                break
    columns = any(part.kind is None or part.kind.form not in TEXT_FORMATS for part in found.parts)
    return DataFacts("lm", source.path, split, files, size, skipped, None, columns, found.notes, _unused(found.parts))


def _unused(parts: Sequence[Part]) -> tuple[str, ...]:
    """Which of `as_text`, `delimiter` and `text_rows` apply to none of the parts; what is in an archive or
    on the Hub may be any."""
    kinds = [part.kind for part in parts]
    if any(kind is None or kind.is_archive for kind in kinds):
        return ()
    by_name = {"as_text": all(part.kind == kind_of(part.address) for part in parts)}
    by_name["delimiter"] = not any(kind is not None and kind.form in ("csv", "tsv") for kind in kinds)
    by_name["text_rows"] = not any(kind is not None and kind.form in TEXT_FORMATS for kind in kinds)
    return tuple(name for name, unused in by_name.items() if unused)


def puzzle_tensors(source: TextSource) -> Path | None:
    """The .safetensors file that holds the puzzles of `source`, its split of a folder with dataset.json or itself; None
    where it is neither of the two."""
    path = Path(source.path)
    if not is_local(source.path):
        return None
    if (path / DESCRIPTION).is_file():
        return path / f"{source.split}.safetensors"
    return path if path.suffix.lower() == ".safetensors" and path.is_file() else None


def is_puzzle_rows(part: Part) -> bool:
    """True for a .jsonl file whose first row has `inputs` and `labels` as lists."""
    return _is_puzzle(_first_row(part, "skip"))


def _first_row(part: Part, on_bad_row: OnBadRow) -> dict[str, object] | None:
    """The first row of a .jsonl file on this machine, or where bad rows are skipped the first that can be read; None
    for other files, and where there is no such row, which reading the text reports."""
    if part.kind != FileKind("jsonl", None) or not is_local(part.address):
        return None
    try:
        with file_system_of(part.address).open(part.address) as lines:
            for line in lines:
                try:
                    row = parse_line(line, part.address, 0)
                except DataError:
                    if on_bad_row == "fail":
                        return None
                    continue
                if row is not None:
                    return row
    except OSError:
        return None
    return None


def _is_puzzle(row: dict[str, object] | None) -> bool:
    return row is not None and isinstance(row.get("inputs"), list) and isinstance(row.get("labels"), list)


def _has_text(row: dict[str, object], source: TextSource) -> bool:
    """Whether a row is a document that is not empty."""
    document = source.columns.document(row, "", 0, None)
    return isinstance(document, Document) and bool(document.text)
