"""Sudoku of 4x4, 6x6 and 9x9: solving, grading, and generating puzzles with exactly one solution, and their symmetries.

Grids and puzzles are tuples of digits (0 = empty, row by row). The solver holds all candidates of a grid in one
Python integer, one bit per (digit, row, column). A constraint is "this group of candidates holds exactly one";
counting a whole family of groups at once (all cells, all rows, all columns, all boxes, for all digits) takes `size`
shifts of that integer, which makes pure Python fast enough."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Grid: TypeAlias = tuple[int, ...]

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Size -> rows and columns of a box. A band is a row of boxes, a stack a column of boxes."""
SIZES = tuple(BOXES)


@dataclass(frozen=True)
class _Family:
    """Groups of one kind: a group's members are its base bit shifted left by each of `offsets`."""

    base: int
    offsets: tuple[int, ...]
    spread: int


@dataclass(frozen=True)
class Board:
    """The constants of one size: candidate bit = digit_index * cells + cell; `box` is its rows and columns."""

    size: int
    box: tuple[int, int]
    cells: int
    every: int
    keep: tuple[int, ...]
    families: tuple[_Family, ...]

    @property
    def full(self) -> int:
        """Mask of one bit per cell."""
        return (1 << self.cells) - 1


@cache
def board(size: int) -> Board:
    """The board of `size` (4, 6 or 9). Raises ValueError for another size."""
    if size not in SIZES:
        raise ValueError(f"Sudoku of size {size} is not known; sizes are {SIZES}")
    (height, width), cells = BOXES[size], size * size

    def family(base_cells: Sequence[int], offsets: Sequence[int]) -> _Family:
        base = sum(1 << (digit * cells + cell) for digit in range(size) for cell in base_cells)
        return _Family(base, tuple(offsets), sum(1 << offset for offset in offsets))

    rows = family([row * size for row in range(size)], range(size))
    columns = family(range(size), range(0, cells, size))
    corners = [row * size + column for row in range(0, size, height) for column in range(0, size, width)]
    boxes = family(corners, [row * size + column for row in range(height) for column in range(width)])
    cell_groups = _Family(
        (1 << cells) - 1, tuple(range(0, size * cells, cells)), sum(1 << d * cells for d in range(size))
    )
    every = (1 << (size * cells)) - 1
    keep = []
    for digit in range(size):
        for cell in range(cells):
            row, column = divmod(cell, size)
            peers = [
                peer
                for peer in range(cells)
                if peer // size == row
                or peer % size == column
                or (peer // size // height, peer % size // width) == (row // height, column // width)
            ]
            cleared = sum(1 << (digit * cells + peer) for peer in peers)
            cleared |= sum(1 << (other * cells + cell) for other in range(size))
            keep.append(every & ~cleared | 1 << (digit * cells + cell))
    return Board(size, (height, width), cells, every, tuple(keep), (cell_groups, rows, columns, boxes))


def place(table: Board, candidates: int, cell: int, digit: int) -> int:
    """The candidates left after putting `digit` (1..size) in `cell`; a digit that is no candidate leaves no grid
    (0)."""
    index = (digit - 1) * table.cells + cell
    return candidates & table.keep[index] if candidates >> index & 1 else 0


def candidates_of(table: Board, puzzle: Sequence[int]) -> int:
    """All candidates left by the clues of `puzzle`; 0 when two clues contradict each other."""
    candidates = table.every
    for cell, digit in enumerate(puzzle):
        if digit:
            candidates = place(table, candidates, cell, digit)
            if not candidates:
                return 0
    return candidates


def _propagate(table: Board, candidates: int, families: Sequence[_Family]) -> int:
    """Puts the singles of `families` until none is left; 0 when some group has no candidate any more."""
    placed = 0
    while True:
        forced = 0
        for family in families:
            base = family.base
            once = twice = 0
            for offset in family.offsets:
                member = candidates >> offset & base
                twice |= once & member
                once |= member
            if once != base:
                return 0
            forced |= (base & ~twice) * family.spread
        fresh = forced & candidates & ~placed
        if not fresh:
            return candidates
        placed |= fresh
        while fresh:
            index = (fresh & -fresh).bit_length() - 1
            candidates &= table.keep[index]
            fresh &= fresh - 1


def _branch_cell(table: Board, candidates: int) -> int:
    """A cell with the fewest candidates but at least two (the lowest numbered); -1 when every cell is decided."""
    at_least = [0] * (table.size + 2)
    at_least[0] = table.full
    for digit in range(table.size):
        layer = candidates >> digit * table.cells & table.full
        for held in range(digit, -1, -1):
            at_least[held + 1] |= at_least[held] & layer
    for held in range(2, table.size + 1):
        exactly = at_least[held] & ~at_least[held + 1]
        if exactly:
            return (exactly & -exactly).bit_length() - 1
    return -1


@dataclass
class SearchCost:
    """The cost of a search: the number of cells at which it had to guess."""

    guesses: int = 0


def solutions(
    size: int, puzzle: Sequence[int], cost: SearchCost | None = None, rng: random.Random | None = None
) -> Iterator[Grid]:
    """Every solution of `puzzle`, found in a fixed order (with `rng`: digits tried in random order)."""
    table = board(size)
    yield from _search(table, candidates_of(table, puzzle), cost or SearchCost(), rng)


def _search(table: Board, candidates: int, cost: SearchCost, rng: random.Random | None) -> Iterator[Grid]:
    candidates = _propagate(table, candidates, table.families)
    if not candidates:
        return
    cell = _branch_cell(table, candidates)
    if cell < 0:
        yield _read_off(table, candidates)
        return
    cost.guesses += 1
    digits = [digit for digit in range(table.size) if candidates >> digit * table.cells + cell & 1]
    if rng is not None:
        rng.shuffle(digits)
    for digit in digits:
        yield from _search(table, candidates & table.keep[digit * table.cells + cell], cost, rng)


def _read_off(table: Board, candidates: int) -> Grid:
    grid = [0] * table.cells
    while candidates:
        digit, cell = divmod((candidates & -candidates).bit_length() - 1, table.cells)
        grid[cell] = digit + 1
        candidates &= candidates - 1
    return tuple(grid)


def count_solutions(size: int, puzzle: Sequence[int], limit: int = 2) -> int:
    """Number of solutions, counted up to `limit`."""
    found = 0
    for _ in solutions(size, puzzle):
        found += 1
        if found >= limit:
            break
    return found


def grade(size: int, puzzle: Sequence[int]) -> int:
    """How hard a puzzle is for this solver: 1 when naked singles alone solve it (a cell with one candidate), 2 when
    hidden singles are needed too (a digit with one place in a row, column or box), else 2 + the number of cells at
    which the solver had to guess until the solution was found and proved to be the only one.

    Deterministic: the undecided cell with the fewest candidates is guessed first, digits in ascending order.
    Symmetric copies share the grades 1 and 2; above, the number of guesses depends on the order of cells and digits.
    Raises ValueError for a puzzle without exactly one solution.
    """
    table = board(size)
    naked = _propagate(table, candidates_of(table, puzzle), table.families[:1])
    if naked and _branch_cell(table, naked) < 0:
        return 1
    cost = SearchCost()
    if len(list(islice(solutions(size, puzzle, cost), 2))) != 1:
        raise ValueError("only a puzzle with exactly one solution has a grade")
    return 2 + cost.guesses


def random_grid(size: int, rng: random.Random) -> Grid:
    """A random complete grid: the first row is drawn freely, the rest is searched in random digit order. Every grid can
    come, not all equally often."""
    first_row = rng.sample(range(1, size + 1), size)
    return next(solutions(size, [*first_row, *[0] * (size * size - size)], rng=rng))


@cache
def all_grids_4x4() -> tuple[Grid, ...]:
    """The 288 complete 4x4 grids, sorted."""
    return tuple(sorted(solutions(4, (0,) * 16)))


@cache
def ordered_grids_6x6() -> tuple[Grid, ...]:
    """The 4,896 complete 6x6 grids whose first row is 1 to 6, and whose first column ascends inside the second and the
    third band and from the second to the third. Each of the 28,200,960 grids comes to exactly one of them by
    relabelling digits (720 ways) and exchanging the rows of these bands and the bands (8 ways)."""
    found: list[Grid] = []
    for second in (4, 5, 6):
        others = [digit for digit in range(2, 7) if digit != second]
        lowest = others[0]
        for partner in others[1:]:
            rest = [digit for digit in others[1:] if digit != partner]
            first_column = (second, lowest, partner, *rest)
            puzzle = [1, 2, 3, 4, 5, 6]
            for digit in first_column:
                puzzle += [digit, 0, 0, 0, 0, 0]
            found.extend(solutions(6, puzzle))
    return tuple(found)


@cache
def classes_6x6() -> Counter[tuple[object, ...]]:
    """How many of the ordered 6x6 grids each class (`grid_class`) has; each stands for as many grids."""
    return Counter(grid_class(6, grid) for grid in ordered_grids_6x6())


def reduce_clues(size: int, grid: Grid, rng: random.Random, clues: int | None) -> Grid:
    """Takes clues off a complete grid in random order as long as the solution stays the only one.

    With `clues` None the result is minimal: no further clue can go. Otherwise it stops at that many clues, and may
    end with more where the order drawn allows no fewer; the caller compares.
    """
    table = board(size)
    puzzle = list(grid)
    left = table.cells
    for cell in rng.sample(range(table.cells), table.cells):
        if clues is not None and left <= clues:
            break
        digit, puzzle[cell] = puzzle[cell], 0
        # The grid itself is one solution, so a second one must have another digit in this cell.
        others = candidates_of(table, puzzle) & ~(1 << (digit - 1) * table.cells + cell)
        if next(_search(table, others, SearchCost(), None), None) is None:
            left -= 1
        else:
            puzzle[cell] = digit
    return tuple(puzzle)


def puzzles_4x4(grid: Grid, clues: int | None) -> npt.NDArray[np.uint8]:
    """All 4x4 puzzles with `grid` as their only solution, uint8 [N, 16]: the minimal ones, or those with so many
    clues."""
    solution = np.array(grid, dtype=np.uint8)
    bits = np.uint32(1) << np.arange(16, dtype=np.uint32)
    kept = np.arange(1 << 16, dtype=np.uint32)  # the cells that keep their clue, as bits
    unique = np.ones(len(kept), dtype=bool)
    # A puzzle has no other solution where it shows a cell in which that solution differs.
    differs = np.array(all_grids_4x4(), dtype=np.uint8) != solution
    for cells in np.unique(differs @ bits):
        if cells:
            unique &= (kept & cells) != 0
    wanted = unique.copy()
    if clues is None:
        for bit in bits:
            wanted &= ((kept & bit) == 0) | ~unique[kept & ~bit]
    else:
        wanted &= (kept[:, None] & bits != 0).sum(axis=1) == clues
    return np.where(kept[wanted][:, None] & bits != 0, solution, 0).astype(np.uint8)


def grid_class(size: int, grid: Grid) -> tuple[object, ...]:
    """A fingerprint that all symmetric copies of a grid share (relabelled digits, permuted bands, stacks, rows and
    columns inside them, and transposed where boxes are square). Different fingerprints prove that two grids are
    essentially different; equal ones prove nothing.

    For two rows the map "digit in the first -> digit in the second" is a permutation; relabelling conjugates it and
    reordering columns leaves it alone, so its cycle lengths are invariant. Gathered per band and over bands.
    """
    lines = [grid[row * size : (row + 1) * size] for row in range(size)]
    crossed = [tuple(line[column] for line in lines) for column in range(size)]
    height, width = BOXES[size]
    classes = (_line_class(height, lines), _line_class(width, crossed))
    return tuple(sorted(classes)) if height == width else classes


def _line_class(depth: int, lines: Sequence[Sequence[int]]) -> tuple[object, ...]:
    """The fingerprint of rows, or of columns, of which each `depth` in turn are a band, or a stack."""
    bands = range(len(lines) // depth)

    def between(first: int, second: int) -> tuple[tuple[int, ...], ...]:
        pairs = [
            (a, b)
            for a in range(first * depth, first * depth + depth)
            for b in range(second * depth, second * depth + depth)
            if first != second or a < b
        ]
        return tuple(sorted(_cycle_lengths(lines[a], lines[b]) for a, b in pairs))

    inside = tuple(sorted(between(band, band) for band in bands))
    across = tuple(sorted(between(first, second) for first in bands for second in bands if first < second))
    return (inside, across)


def _cycle_lengths(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    step = dict(zip(first, second, strict=True))
    lengths = []
    while step:
        length, (start, at) = 1, step.popitem()
        while at != start:
            at = step.pop(at)
            length += 1
        lengths.append(length)
    return tuple(sorted(lengths))


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


def draw_symmetries(count: int, size: int, rng: np.random.Generator) -> Symmetries:
    """`count` symmetries of the size x size board, each uniform over the whole group.

    They keep a solution valid and a puzzle's solution unique. A symmetry relabels the digits, permutes bands, stacks,
    and the rows and columns inside them, and may transpose where boxes are square (else boxes would lie down).
    """
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
