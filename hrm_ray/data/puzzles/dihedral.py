"""The eight symmetries of a square: four turns, each also mirrored."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

COUNT = 8


def turned(grid: npt.NDArray[Any], number: int) -> npt.NDArray[Any]:
    """The grid [H, W] under symmetry `number`: 0 leaves it, 1 to 3 turn it, 4 to 7 mirror it before."""
    return np.rot90(np.fliplr(grid) if number >= 4 else grid, number % 4)


def canonical(grid: npt.NDArray[Any]) -> bytes:
    """The same bytes for all eight copies of a square grid, and different ones for grids that are not copies."""
    return min(np.ascontiguousarray(turned(grid, number)).tobytes() for number in range(COUNT))
