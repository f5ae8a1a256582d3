"""ARC tasks: pairs of coloured grids, read from .json files, tokenised and augmented.

Layout as in the public HRM sets (sapientinc/HRM): a grid stands in the upper left of 30x30 cells, colour + 2; a row and
a column of END close it below and to the right where there is room; the rest is PAD."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hrm_ray.data.puzzles import dihedral
from hrm_ray.errors import DataError, Fault, SettingsError

MOST_SIDE = 30
COLOURS = 10
PAD, END, FIRST_COLOUR = 0, 1, 2
SYMBOLS = ["_", "|", *map(str, range(COLOURS))]

Grid = npt.NDArray[np.uint8]
"""Colours 0 to 9, [height, width]."""


@dataclass(frozen=True)
class Pair:
    """One example: what is shown and what is wanted; `wanted` is None where a file keeps it back."""

    shown: Grid
    wanted: Grid | None


@dataclass(frozen=True)
class Task:
    """Examples of one rule: `train` shows it, `test` asks for it."""

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]


@dataclass(frozen=True)
class Change:
    """An augmentation of a task: grids turned by `symmetry` (see dihedral), and colour c becomes colours[c]."""

    symmetry: int
    colours: tuple[int, ...]

    @property
    def name(self) -> str:
        """A short name of the change."""
        return f"t{self.symmetry}_{''.join(map(str, self.colours))}"

    def apply(self, grid: Grid) -> Grid:
        """The augmented grid."""
        changed: Grid = dihedral.turned(np.array(self.colours, dtype=np.uint8)[grid], self.symmetry)
        return changed


def draw_change(rng: np.random.Generator) -> Change:
    """Any of the eight symmetries with any order of the colours; black (0) stays black."""
    return Change(int(rng.integers(dihedral.COUNT)), (0, *(rng.permutation(COLOURS - 1) + 1).tolist()))


def tokens(grid: Grid) -> npt.NDArray[np.uint8]:
    """A grid as the model sees it, uint8 [30 * 30]."""
    height, width = grid.shape
    cells = np.full((MOST_SIDE, MOST_SIDE), PAD, dtype=np.uint8)
    cells[:height, :width] = grid + FIRST_COLOUR
    if height < MOST_SIDE:
        cells[height, :width] = END
    if width < MOST_SIDE:
        cells[:height, width] = END
    return cells.ravel()


def read_tasks(folder: Path) -> list[Task]:
    """Every .json file of the folder and those below it, as a task named after it; in the order of the names.

    Raises SettingsError for a path without such files, DataError for a file that is no task.
    """
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "no such folder"
        raise SettingsError(Fault(str(folder), reason, "Give a folder of ARC tasks, one .json file each"))
    files = sorted(file for file in folder.rglob("*.json") if file.is_file())
    if not files:
        raise SettingsError(Fault(str(folder), "contains no .json file", "Give a folder of ARC tasks"))
    return [_read_task(file, file.relative_to(folder).with_suffix("").as_posix()) for file in files]


def _read_task(file: Path, name: str) -> Task:
    hint = 'A task is {"train": [...], "test": [...]}, each a list of {"input": grid, "output": grid}'
    try:
        raw = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(Fault(str(file), f"not JSON ({error})", "Correct the file, or remove it")) from error
    parts: dict[str, tuple[Pair, ...]] = {}
    for part in ("train", "test"):
        pairs = raw.get(part) if isinstance(raw, dict) else None
        if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, dict) for pair in pairs):
            raise DataError(Fault(str(file), f"is not an ARC task: it has no list of pairs `{part}`", hint))
        where = (f"{file}, {part} pair {number}" for number in range(len(pairs)))
        parts[part] = tuple(_pair(pair, at, part == "test") for pair, at in zip(pairs, where, strict=True))
    return Task(name, parts["train"], parts["test"])


def _pair(raw: dict[str, Any], where: str, may_lack: bool) -> Pair:
    if "input" not in raw:
        raise DataError(Fault(where, "the pair has no `input`", "Give each pair an input and an output"))
    shown = _grid(raw["input"], f"{where}, input")
    if "output" not in raw and may_lack:
        return Pair(shown, None)
    return Pair(shown, _grid(raw.get("output"), f"{where}, output"))


def _grid(raw: Any, where: str) -> Grid:
    """A grid out of JSON. Raises DataError for what is none, ragged, too large, or holds other than colours."""
    hint = f"A grid is 1 to {MOST_SIDE} rows of 1 to {MOST_SIDE} colours each, 0 to {COLOURS - 1}"
    if not isinstance(raw, list) or not raw or not all(isinstance(row, list) and row for row in raw):
        raise DataError(Fault(where, "is not a list of rows", hint))
    for number, row in enumerate(raw):
        if len(row) != len(raw[0]):
            reason = f"row {number} has {len(row)} cells, the first row {len(raw[0])}"
            raise DataError(Fault(where, reason, hint))
        for colour in row:
            if type(colour) is not int or not 0 <= colour < COLOURS:
                reason = f"row {number} contains {json.dumps(colour)}, which is not a colour"
                raise DataError(Fault(where, reason, hint))
    if len(raw) > MOST_SIDE or len(raw[0]) > MOST_SIDE:
        raise DataError(Fault(where, f"the grid has {len(raw)} rows of {len(raw[0])} cells", hint))
    return np.array(raw, dtype=np.uint8)
