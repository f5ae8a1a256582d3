"""Sudoku: the solver against brute force, uniqueness, grades, and symmetries that keep both."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.puzzles import sudoku

# An example with a known solution (the one in the Wikipedia article on Sudoku), solvable without guessing.
KNOWN = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
KNOWN_SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
# "Golden Nugget", known to need deep search.
HARD = "000000039000001005003050800008090006070002000100400000009080050020000600400700000"


def digits(text: str) -> sudoku.Grid:
    return tuple(map(int, text))


def is_valid(size: int, grid: Sequence[int]) -> bool:
    """Written apart from the solver: every row, column and box holds each digit once."""
    square = np.array(grid).reshape(size, size)
    height, width = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]
    boxes = square.reshape(size // height, height, size // width, width).transpose(0, 2, 1, 3).reshape(size, size)
    wanted = list(range(1, size + 1))
    return all(sorted(group.tolist()) == wanted for groups in (square, square.T, boxes) for group in groups)


def agrees(puzzle: Sequence[int], grid: Sequence[int]) -> bool:
    return all(clue in (0, digit) for clue, digit in zip(puzzle, grid, strict=True))


def test_there_are_288_grids_of_4x4() -> None:
    grids = sudoku.all_grids_4x4()
    rows = list(itertools.permutations(range(1, 5)))
    brute = {sum(four, ()) for four in itertools.product(rows, repeat=4) if is_valid(4, sum(four, ()))}
    assert len(grids) == 288 and set(grids) == brute


@settings(max_examples=60, deadline=None)
@given(clues=st.lists(st.integers(0, 4), min_size=16, max_size=16), keep=st.integers(0, 2**16 - 1))
def test_solutions_are_those_of_brute_force(clues: list[int], keep: int) -> None:
    puzzle = [clue if keep >> cell & 1 and keep >> (15 - cell) & 1 else 0 for cell, clue in enumerate(clues)]
    brute = sorted(grid for grid in sudoku.all_grids_4x4() if agrees(puzzle, grid))
    assert sorted(sudoku.solutions(4, puzzle)) == brute
    assert sudoku.count_solutions(4, puzzle) == min(2, len(brute))


def test_known_puzzles_are_solved() -> None:
    assert list(sudoku.solutions(9, digits(KNOWN))) == [digits(KNOWN_SOLUTION)]
    (solution,) = sudoku.solutions(9, digits(HARD))
    assert is_valid(9, solution) and agrees(digits(HARD), solution)


def test_contradictions_have_no_solution() -> None:
    assert sudoku.count_solutions(9, digits("55" + "0" * 79)) == 0
    assert sudoku.count_solutions(9, digits("123456780" + "0" * 17 + "9" + "0" * 54)) == 0
    assert sudoku.count_solutions(9, digits("0" * 81)) == 2


def test_grades_follow_what_is_needed() -> None:
    almost = digits("0" + KNOWN_SOLUTION[1:])
    assert sudoku.grade(9, almost) == 1
    assert sudoku.grade(9, digits(KNOWN)) <= 2
    assert sudoku.grade(9, digits(HARD)) >= 6
    for without_grade in ("0" * 81, "55" + "0" * 79):
        with pytest.raises(ValueError, match="one solution"):
            sudoku.grade(9, digits(without_grade))


def test_grade_2_needs_a_digit_with_one_place() -> None:
    """All puzzles of grade 2 have a point at which no cell has one candidate only, and no puzzle of grade 1 has."""
    rng = random.Random(3)
    puzzles = [sudoku.reduce_clues(9, sudoku.random_grid(9, rng), rng, clues) for clues in [26, 34] * 20]
    for puzzle in puzzles:
        grade = sudoku.grade(9, puzzle)
        if grade <= 2:
            assert solved_by_naked_singles(puzzle) == (grade == 1)
        else:
            assert not solved_by_naked_singles(puzzle)
    assert {1, 2} <= {sudoku.grade(9, puzzle) for puzzle in puzzles}


def solved_by_naked_singles(puzzle: sudoku.Grid) -> bool:
    """Written apart from the solver, with sets."""
    grid = np.array(puzzle).reshape(9, 9)
    while True:
        found = False
        for row, column in np.argwhere(grid == 0):
            box = grid[row // 3 * 3 : row // 3 * 3 + 3, column // 3 * 3 : column // 3 * 3 + 3]
            left = set(range(1, 10)) - {*grid[row], *grid[:, column], *box.ravel()}
            if len(left) == 1:
                grid[row, column], found = left.pop(), True
        if not found:
            return not (grid == 0).any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize("size", [4, 6, 9])
def test_generated_puzzles_are_minimal_and_have_one_solution(size: int, seed: int) -> None:
    rng = random.Random(seed)
    grid = sudoku.random_grid(size, rng)
    assert is_valid(size, grid)
    puzzle = sudoku.reduce_clues(size, grid, rng, None)
    assert agrees(puzzle, grid) and list(sudoku.solutions(size, puzzle)) == [grid]
    for cell in np.flatnonzero(puzzle):
        without = [0 if at == cell else digit for at, digit in enumerate(puzzle)]
        assert sudoku.count_solutions(size, without) == 2, "a minimal puzzle needs each of its clues"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), clues=st.integers(30, 80))
def test_a_wanted_number_of_clues_is_met(seed: int, clues: int) -> None:
    rng = random.Random(seed)
    grid = sudoku.random_grid(9, rng)
    puzzle = sudoku.reduce_clues(9, grid, rng, clues)
    assert 81 - puzzle.count(0) == clues and list(sudoku.solutions(9, puzzle)) == [grid]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize("size", [4, 6, 9])
def test_symmetries_keep_validity_uniqueness_clues_and_class(size: int, seed: int) -> None:
    rng = random.Random(seed)
    grid = sudoku.random_grid(size, rng)
    puzzle = sudoku.reduce_clues(size, grid, rng, None)
    drawn = sudoku.draw_symmetries(3, size, np.random.default_rng(seed))
    grids = drawn.apply(np.array([grid] * 3, dtype=np.uint8))
    puzzles = drawn.apply(np.array([puzzle] * 3, dtype=np.uint8))
    for new_grid, new_puzzle in zip(grids.tolist(), puzzles.tolist(), strict=True):
        assert is_valid(size, new_grid) and agrees(new_puzzle, new_grid)
        assert list(sudoku.solutions(size, new_puzzle)) == [tuple(new_grid)]
        assert sum(map(bool, new_puzzle)) == sum(map(bool, puzzle))
        assert sudoku.grid_class(size, tuple(new_grid)) == sudoku.grid_class(size, grid)
        easy, new_easy = sudoku.grade(size, puzzle), sudoku.grade(size, new_puzzle)
        assert min(easy, 3) == min(new_easy, 3), "grades 1 and 2 are those of every symmetric copy"


def test_different_grids_mostly_have_different_classes() -> None:
    rng = random.Random(0)
    classes = {sudoku.grid_class(9, sudoku.random_grid(9, rng)) for _ in range(200)}
    assert len(classes) >= 199
    assert len({sudoku.grid_class(4, grid) for grid in sudoku.all_grids_4x4()}) == 2, "4x4 has two essential grids"


def test_symmetries_reach_the_whole_class() -> None:
    """From one 4x4 grid every grid of its class: nothing of the group is missing (96 and 192 of the 288)."""
    rng = np.random.default_rng(0)
    sizes = {}
    for grid in sudoku.all_grids_4x4():
        kind = sudoku.grid_class(4, grid)
        if kind not in sizes:
            reached = sudoku.draw_symmetries(4000, 4, rng).apply(np.array([grid] * 4000, dtype=np.uint8))
            sizes[kind] = len(np.unique(reached, axis=0))
    assert sorted(sizes.values()) == [96, 192]


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="8"):
        sudoku.board(8)


def test_the_ordered_6x6_grids_stand_for_all() -> None:
    """As many as there are, none twice, all valid; and drawn grids come to one of them as is said."""
    grids = sudoku.ordered_grids_6x6()
    assert len(set(grids)) == len(grids) == 28_200_960 // (720 * 8)
    assert all(is_valid(6, grid) for grid in grids)
    rng = random.Random(0)
    for _ in range(50):
        drawn = np.array(sudoku.random_grid(6, rng)).reshape(6, 6)
        named = np.argsort(drawn[0])[drawn - 1] + 1
        second, third = sorted(sorted(named[row : row + 2].tolist()) for row in (2, 4))
        assert tuple(np.array([*named[:2].tolist(), *second, *third]).ravel().tolist()) in grids


def test_6x6_symmetries_are_all_that_keep_boxes_lying() -> None:
    """48 orders of rows (3 bands of 2) times 72 of columns (2 stacks of 3), each drawn, and no transposition."""
    drawn = sudoku.draw_symmetries(60_000, 6, np.random.default_rng(0))
    assert len(np.unique(drawn.cells, axis=0)) == 48 * 72
    rows = drawn.cells.reshape(-1, 6, 6) // 6
    assert (rows == rows[:, :, :1]).all(), "a row stays a row"
