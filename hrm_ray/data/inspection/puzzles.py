"""Inspects a puzzle set as training would read it, with a few samples.

A small set is read completely, with all checks of training; of a large one, the description and the first puzzles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from hrm_ray.data.detect import puzzle_tensors
from hrm_ray.data.inspection.figures import Certainty, Figure, Lengths, Spread
from hrm_ray.data.parts import PartList, TextSource
from hrm_ray.data.puzzles.format import DESCRIPTION, PuzzleFacts
from hrm_ray.data.puzzles.samples import PuzzleSamples, open_puzzles, puzzle_splits
from hrm_ray.types import IGNORE_LABEL, Columns

_WHOLE_TENSOR_BYTES, _WHOLE_ROWS_BYTES = 256 << 20, 16 << 20
"""Files up to this size are read whole within a second or two."""
_FIRST = 4096


@dataclass(frozen=True)
class PuzzleSample:
    """A puzzle and its solution, each on one line: its tokens as they print, "|" between the rows of a grid."""

    identifier: int
    puzzle: str
    solution: str


@dataclass(frozen=True)
class PuzzleSetFacts:
    """The result of `inspect_puzzles`. `checked` of all `puzzles` were read and found valid; `used` are trained on.
    `open_cells` is about the cells of a puzzle whose label differs from the input, in the first 4096."""

    path: str
    split: str
    parts: int
    bytes: int
    skipped: int
    splits: tuple[str, ...]
    name: str
    puzzles: Figure
    used: Figure
    checked: int
    seq_len: int
    grid: tuple[int, int] | None
    vocab_size: Figure
    symbols: tuple[str, ...]
    identifiers: Figure
    open_cells: Spread | None
    samples: tuple[PuzzleSample, ...]


def inspect_puzzles(
    source: TextSource, found: PartList | None, *, max_rows: int | None = None, read_all: bool = False, samples: int = 3
) -> PuzzleSetFacts:
    """The facts of the puzzle set at `source`: the file `puzzle_tensors(source)`, or the .jsonl parts `found`.

    Raises SettingsError for a path that is not there, DataError for puzzles that cannot be used.
    """
    path, file = Path(source.path), puzzle_tensors(source)
    if found is not None:
        size = sum(part.bytes for part in found.parts)
    else:
        # A missing file is reported by its reader.
        size = file.stat().st_size if file is not None and file.is_file() else 0
    small = size <= (_WHOLE_TENSOR_BYTES if found is None else _WHOLE_ROWS_BYTES)
    opened = open_puzzles(path, source.split, None if read_all or small else _FIRST)
    whole = read_all or small or len(opened) < _FIRST
    facts = opened.facts
    puzzles = Figure(len(opened)) if whole else _all_puzzles(opened, source, file, found, size)
    known: Certainty = "exact" if whole or (path / DESCRIPTION).is_file() else "at least"
    columns = opened.rows(np.arange(min(len(opened), _FIRST), dtype=np.int64))
    labels, open_cells = columns["labels"], Lengths()
    for count in ((labels != IGNORE_LABEL) & (labels != columns["inputs"])).sum(axis=1).tolist():
        open_cells.add(count)
    return PuzzleSetFacts(
        path=source.path,
        split=source.split,
        parts=1 if found is None else len(found.parts),
        bytes=size,
        skipped=0 if found is None else found.skipped,
        splits=tuple(puzzle_splits(path)) if found is None else found.splits or (),
        name=facts.name,
        puzzles=puzzles,
        used=puzzles if max_rows is None else Figure(min(puzzles.value, max_rows), puzzles.certainty),
        checked=len(opened),
        seq_len=facts.seq_len,
        grid=facts.grid,
        vocab_size=Figure(facts.vocab_size, known),
        symbols=facts.symbols,
        identifiers=Figure(facts.num_puzzle_identifiers, known),
        open_cells=open_cells.spread,
        samples=tuple(_sample(facts, columns, row) for row in range(min(samples, len(opened)))),
    )


def _all_puzzles(
    opened: PuzzleSamples, source: TextSource, file: Path | None, found: PartList | None, size: int
) -> Figure:
    """The number of puzzles in a set of which the first were opened."""
    if found is not None:
        of_first = _bytes_of_rows([Path(part.address) for part in found.parts], len(opened))
        return Figure(round(len(opened) * size / of_first), "about")
    if opened.facts.count > len(opened):
        return Figure(opened.facts.count)
    with safe_open(file, framework="np") as tensors:
        name = "inputs" if "inputs" in tensors.keys() else f"{source.split}.inputs"  # noqa: SIM118
        return Figure(int(tensors.get_slice(name).get_shape()[0]))


def _bytes_of_rows(paths: Sequence[Path], rows: int) -> int:
    """Bytes of the first rows, blank lines between them included."""
    taken = 0
    for path in paths:
        with path.open("rb") as lines:
            for line in lines:
                if not rows:
                    return taken
                taken += len(line)
                rows -= bool(line.strip())
    return taken


def _sample(facts: PuzzleFacts, columns: Columns, row: int) -> PuzzleSample:
    inputs, labels = columns["inputs"][row], columns["labels"][row]
    # A cell whose label does not count shows what the input has there.
    solution = np.where(labels == IGNORE_LABEL, inputs, labels)
    return PuzzleSample(
        int(columns["puzzle_identifiers"][row]), _on_one_line(facts, inputs), _on_one_line(facts, solution)
    )


def _on_one_line(facts: PuzzleFacts, tokens: npt.NDArray[Any]) -> str:
    lines = facts.render(tokens).split("\n")
    if facts.symbols and " " not in facts.symbols and max(map(len, facts.symbols)) == 1:
        lines = [line.replace(" ", "") for line in lines]
    return "|".join(lines)
