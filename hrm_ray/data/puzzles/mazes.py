"""Mazes: generation on a square grid, distances, and endpoints with exactly one shortest path between them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FreeCells = npt.NDArray[np.bool_]
"""Which cells of a maze can be walked on, bool [size, size]."""

_STARTS = 8
"""Starts that are tried in one maze before its farthest cell is taken."""


@dataclass(frozen=True)
class Distances:
    """For each cell (number: row * size + column), the moves from `start` (-1: unreachable) and the number of shortest
    paths."""

    start: int
    moves: list[int]
    ways: list[int]

    @property
    def farthest(self) -> int:
        """A cell with the most moves; the first of several."""
        return max(range(len(self.moves)), key=self.moves.__getitem__)


def carve(size: int, rng: random.Random, openings: float) -> FreeCells:
    """A maze of size x size cells without a border of walls: rooms on every second row and column, joined into a tree
    by depth-first search in random order; then a share `openings` of the walls left between neighbouring rooms is
    removed, which makes loops.

    If the size is even, one row and one column at a random edge are walls.
    """
    rooms = (size + 1) // 2
    top, left = (rng.randrange(2), rng.randrange(2)) if size % 2 == 0 else (0, 0)
    free: FreeCells = np.zeros((size, size), dtype=np.bool_)
    stack = [(rng.randrange(rooms), rng.randrange(rooms))]
    free[top + 2 * stack[0][0], left + 2 * stack[0][1]] = True
    while stack:
        row, column = stack[-1]
        closed = [(r, c) for r, c in _beside(row, column, rooms) if not free[top + 2 * r, left + 2 * c]]
        if not closed:
            stack.pop()
            continue
        r, c = rng.choice(closed)
        free[top + row + r, left + column + c] = free[top + 2 * r, left + 2 * c] = True
        stack.append((r, c))
    between = [
        (top + row + r, left + column + c)
        for row in range(rooms)
        for column in range(rooms)
        for r, c in _beside(row, column, rooms)
        if (r, c) > (row, column) and not free[top + row + r, left + column + c]
    ]
    for cell in rng.sample(between, round(openings * len(between))):
        free[cell] = True
    return free


def most_moves(size: int) -> int:
    """Longest shortest path that a maze of this size can have: through all its rooms, one after the other."""
    return 2 * ((size + 1) // 2) ** 2 - 2


def distances(free: FreeCells, start: int) -> Distances:
    """Breadth-first search from `start`."""
    size = len(free)
    passable = free.ravel().tolist()
    moves, ways = [-1] * len(passable), [0] * len(passable)
    moves[start], ways[start] = 0, 1
    frontier = [start]
    while frontier:
        next_frontier = []
        for cell in frontier:
            for beside in _neighbours(cell, size):
                if not passable[beside]:
                    continue
                if moves[beside] < 0:
                    moves[beside] = moves[cell] + 1
                    next_frontier.append(beside)
                if moves[beside] == moves[cell] + 1:
                    ways[beside] += ways[cell]
        frontier = next_frontier
    return Distances(start, moves, ways)


def draw_endpoints(free: FreeCells, rng: random.Random, min_path: int) -> tuple[int, int] | None:
    """A start and a goal with exactly one shortest path between them, of at least `min_path` moves; None if none were
    found. Short paths are more numerous than long ones, so they are drawn more often."""
    cells = np.flatnonzero(free).tolist()
    ends = distances(free, distances(free, rng.choice(cells)).farthest)
    if ends.moves[ends.farthest] < min_path:
        # In a tree no path is longer than this one; loops only shorten.
        return None
    for attempt in range(_STARTS + 1):
        found = ends if attempt == _STARTS else distances(free, rng.choice(cells))
        goals = [cell for cell in cells if found.moves[cell] >= min_path and found.ways[cell] == 1]
        if goals:
            return found.start, rng.choice(goals)
    return None


def shortest_path(free: FreeCells, start: int, goal: int) -> list[int]:
    """The cells of the shortest path from start to goal, both included. Raises ValueError unless there is exactly
    one."""
    found = distances(free, start)
    if found.ways[goal] != 1:
        raise ValueError(f"there are {found.ways[goal]} shortest paths from {start} to {goal}")
    path = [goal]
    while path[-1] != start:
        nearer = found.moves[path[-1]] - 1
        path.append(next(cell for cell in _neighbours(path[-1], len(free)) if found.moves[cell] == nearer))
    return path[::-1]


def _beside(row: int, column: int, side: int) -> Iterator[tuple[int, int]]:
    if row:
        yield row - 1, column
    if row + 1 < side:
        yield row + 1, column
    if column:
        yield row, column - 1
    if column + 1 < side:
        yield row, column + 1


def _neighbours(cell: int, side: int) -> Iterator[int]:
    row, column = divmod(cell, side)
    return (r * side + c for r, c in _beside(row, column, side))
