"""Symmetric copies of Sudoku grids: permutations that keep a solution valid and a puzzle's solution unique.

A symmetry relabels the digits, permutes bands, stacks, and the rows and columns inside them, and may transpose where
boxes are square (else boxes would lie down)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hrm_ray.data.puzzles.sudoku import BOXES


@dataclass(frozen=True)
class Symmetries:
    """N symmetries. New cell i shows the digit of old cell `cells[n, i]`, renamed by `names[n]` (0, the empty cell,
    stays).

    `cells` int64 [N, size*size], `names` uint8 [N, size+1].
    """

    cells: npt.NDArray[np.int64]
    names: npt.NDArray[np.uint8]

    def apply(self, grids: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Each grid (uint8 [N, size*size], 0 = empty) under its own symmetry."""
        moved = np.take_along_axis(grids, self.cells, axis=1)
        return np.take_along_axis(self.names, moved.astype(np.int64), axis=1)


def draw(count: int, size: int, rng: np.random.Generator) -> Symmetries:
    """`count` symmetries of the size x size board, each uniform over the whole group."""
    height, width = BOXES[size]
    rows, columns = _line_permutations(count, size, height, rng), _line_permutations(count, size, width, rng)
    cells = rows[:, :, None] * size + columns[:, None, :]
    if height == width:
        transposed = rng.integers(0, 2, count).astype(bool)
        cells[transposed] = cells[transposed].transpose(0, 2, 1)
    names = np.zeros((count, size + 1), dtype=np.uint8)
    names[:, 1:] = rng.random((count, size)).argsort(axis=1) + 1
    return Symmetries(cells.reshape(count, size * size), names)


def _line_permutations(count: int, size: int, depth: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """int64 [count, size]: rows (or columns) permuted inside their bands of `depth`, and the bands among each other."""
    bands = rng.random((count, size // depth)).argsort(axis=1)
    inside = rng.random((count, size // depth, depth)).argsort(axis=2)
    return (bands[:, :, None] * depth + inside).reshape(count, size)
