"""Builds a Sudoku set: distinct puzzles with one solution each; held-out puzzles use grids that training never sees."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hrm_ray.atomic_files import atomic_directory, check_vacant
from hrm_ray.data.builders.progress import Progress, no_progress
from hrm_ray.data.puzzles import sudoku
from hrm_ray.data.puzzles.format import BUILT_FILES, SplitEntry, square_description, write_description, write_split
from hrm_ray.errors import Fault, SettingsError

Difficulty: TypeAlias = Literal["any", "easy", "medium", "hard"]

GRADES: dict[Difficulty, tuple[int, int]] = {"any": (1, 10**9), "easy": (1, 2), "medium": (3, 5), "hard": (6, 10**9)}
"""Lowest and highest grade of each difficulty (sudoku.grade): easy needs no guess, medium 1 to 3, hard more."""

_HELD_OUT_GRIDS_4X4 = 72
_HELD_OUT_SHARE_6X6 = 0.2
# If of so many draws fewer than one in _RAREST gives a usable new puzzle, the request is taken for impossible.
_PATIENCE = {4: 20_000, 6: 20_000, 9: 2_000}
_RAREST = 1000
_PROGRESS_DRAWS = 100


@dataclass(frozen=True)
class SudokuSummary:
    """The result of build_sudoku. `grades` and `clues` count the training set's base puzzles by grade and by number of
    clues."""

    folder: Path
    size: int
    train: int
    test: int
    base_puzzles: int
    train_grids: int
    test_grids: int
    grades: dict[int, int]
    clues: dict[int, int]


def build_sudoku(
    out: Path,
    *,
    size: int = 9,
    train: int = 1000,
    test: int = 1000,
    difficulty: Difficulty = "any",
    clues: int | None = None,
    augment: int = 0,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> SudokuSummary:
    """A puzzle set of `train` and `test` different unique-solution Sudokus; each training puzzle comes with `augment`
    symmetric copies beside it. `clues` None gives minimal puzzles (no clue can go), else puzzles with that many
    clues.

    Tokens: 0 pad, 1 empty, digit + 1. Held-out puzzles never share a solution grid with training puzzles or their
    copies. 4x4: 72 of the 288 grids are held out. 9x9: held-out grids are essentially different from all training
    grids, that is, no symmetry maps one to the other (see sudoku.grid_class). 6x6: the same, by holding out classes
    with about a fifth of all grids.

    Raises SettingsError for values that cannot be satisfied, such as more or harder puzzles than can be found.
    """
    _check_sudoku(size, train, test, difficulty, clues, augment)
    check_vacant(out, overwrite=overwrite, owned=BUILT_FILES, option="--out")
    maker = _PuzzleMaker(size, difficulty, clues, seed, progress)
    test_puzzles, test_grids = maker.draw(test, "test")
    base_puzzles, base_grids = maker.draw(train, "train")
    train_puzzles, train_grids = _augmented(size, base_puzzles, base_grids, test_grids, augment, seed)
    with atomic_directory(out, overwrite=overwrite, owned=BUILT_FILES) as building:
        splits: dict[str, SplitEntry] = {
            "train": write_split(building, "train", train_puzzles + 1, train_grids + 1),
            "test": write_split(building, "test", test_puzzles + 1, test_grids + 1),
        }
        built: dict[str, Any] = {
            "difficulty": difficulty,
            "clues": clues,
            "augment": augment,
            "seed": seed,
            "base_puzzles": train,
        }
        symbols = ["#", ".", *map(str, range(1, size + 1))]
        write_description(building, square_description(f"sudoku-{size}x{size}", size, symbols, splits, built))
    grades = [sudoku.grade(size, puzzle) for puzzle in base_puzzles.tolist()]
    return SudokuSummary(
        folder=out,
        size=size,
        train=len(train_puzzles),
        test=len(test_puzzles),
        base_puzzles=train,
        train_grids=len(np.unique(train_grids, axis=0)),
        test_grids=len(np.unique(test_grids, axis=0)),
        grades=_counted(grades),
        clues=_counted(np.count_nonzero(base_puzzles, axis=1).tolist()),
    )


def _check_sudoku(size: int, train: int, test: int, difficulty: str, clues: int | None, augment: int) -> None:
    """Raises SettingsError with everything that is wrong."""
    faults = []
    if size not in sudoku.SIZES:
        faults.append(Fault(f"--size {size}", "puzzles are 4x4, 6x6 or 9x9", "Give --size 4, 6 or 9"))
    if difficulty not in GRADES:
        faults.append(
            Fault(f"--difficulty {difficulty}", "is not a known difficulty", f"Give one of {', '.join(GRADES)}")
        )
    for name, value, least in (("train", train, 1), ("test", test, 1), ("augment", augment, 0)):
        if value < least:
            faults.append(Fault(f"--{name} {value}", f"must be at least {least}", f"Give --{name} {least} or more"))
    if clues is not None and size in sudoku.SIZES:
        # 4, 8 and 17 are the fewest clues with which a unique solution is possible (9x9: McGuire, Tugemann, Civario
        # 2012).
        least, most = {4: (4, 15), 6: (8, 35), 9: (17, 80)}[size]
        if not least <= clues <= most:
            faults.append(
                Fault(
                    f"--clues {clues}",
                    f"a {size}x{size} puzzle has {least} to {most} clues",
                    "Give a number in between",
                )
            )
    if faults:
        raise SettingsError(faults)


class _PuzzleMaker:
    """Draws different puzzles for two splits that share no grid. Draw "test" first: "train" then keeps clear of it,
    and the held-out puzzles do not depend on how many training puzzles are wanted."""

    def __init__(self, size: int, difficulty: Difficulty, clues: int | None, seed: int, progress: Progress) -> None:
        self._progress = progress
        self._size, self._difficulty, self._clues, self._seed = size, difficulty, clues, seed
        self._held_out: set[object] = set()
        self._pools: dict[str, list[sudoku.Grid]] = {}
        if size == 4:
            shuffled = list(sudoku.all_grids_4x4())
            random.Random(f"sudoku grids {seed}").shuffle(shuffled)
            self._pools = {"test": shuffled[:_HELD_OUT_GRIDS_4X4], "train": shuffled[_HELD_OUT_GRIDS_4X4:]}
        if size == 6:
            self._held_out = set(_held_out_classes_6x6(seed))

    def draw(self, count: int, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """`count` different puzzles and their solutions, uint8 [count, size*size] each."""
        rng = random.Random(f"sudoku {self._size} {split} {self._seed}")
        if self._pools and self._difficulty == "any":
            per_grid = [sudoku.puzzles_4x4(grid, self._clues) for grid in self._pools[split]]
            there = sum(map(len, per_grid))
            if count > there:
                reason = f"only {there} different {self._kind} exist on the {len(per_grid)} grids of this split"
                hint = f"Give --{split} {there} or less, another --size{self._others}"
                raise SettingsError(Fault(f"--{split} {count}", reason, hint))
            # Drawing blindly would take long to meet the last ones.
            if count > there // 4:
                puzzles = np.concatenate(per_grid)
                grids = np.repeat(np.array(self._pools[split], dtype=np.uint8), list(map(len, per_grid)), axis=0)
                chosen = rng.sample(range(there), count)
                return puzzles[chosen], grids[chosen]
        low, high = GRADES[self._difficulty]
        found: dict[sudoku.Grid, sudoku.Grid] = {}
        patience, draws, before = _PATIENCE[self._size], 0, 0
        while len(found) < count:
            if draws == patience:
                if len(found) - before <= patience // _RAREST:
                    reason = (
                        f"only {len(found)} different {self._kind} were found: of the last {patience} draws "
                        f"{len(found) - before} gave a new one"
                    )
                    hint = f"Give a smaller --{split}, another --difficulty{self._others}"
                    raise SettingsError(Fault(f"--{split} {count}", reason, hint))
                draws, before = 0, len(found)
            if draws % _PROGRESS_DRAWS == 0:
                self._progress(split, len(found), count)
            draws += 1
            grid = self._grid(split, rng)
            if grid is None:
                continue
            puzzle = sudoku.reduce_clues(self._size, grid, rng, self._clues)
            too_many = self._clues is not None and self._size**2 - puzzle.count(0) != self._clues
            if too_many or puzzle in found:
                continue
            if self._difficulty != "any" and not low <= sudoku.grade(self._size, puzzle) <= high:
                continue
            found[puzzle] = grid
            if split == "test":
                self._held_out.add(sudoku.grid_class(self._size, grid))
        return np.array(list(found), dtype=np.uint8), np.array(list(found.values()), dtype=np.uint8)

    @property
    def _kind(self) -> str:
        """The puzzles that are wanted, for messages."""
        of_difficulty = "" if self._difficulty == "any" else f" of difficulty {self._difficulty}"
        clues = "that are minimal" if self._clues is None else f"with {self._clues} clues"
        return f"{self._size}x{self._size} puzzles{of_difficulty} {clues}"

    @property
    def _others(self) -> str:
        return " or --clues; symmetric copies of training puzzles come with --augment"

    def _grid(self, split: str, rng: random.Random) -> sudoku.Grid | None:
        """A grid that `split` may use; None where the one drawn belongs to the other split."""
        if self._pools:
            return rng.choice(self._pools[split])
        grid = sudoku.random_grid(self._size, rng)
        if split == "test" and self._size == 9:
            return grid
        is_held_out = sudoku.grid_class(self._size, grid) in self._held_out
        return grid if is_held_out == (split == "test") else None


def _held_out_classes_6x6(seed: int) -> Iterator[object]:
    """Classes of 6x6 grids, in an order of the seed's, until they hold the share of all grids that is held out.

    There are some forty, so that those of the puzzles drawn would soon be all: they are shared out beforehand.
    """
    grids = sudoku.classes_6x6()
    classes = sorted(grids, key=repr)
    random.Random(f"sudoku classes {seed}").shuffle(classes)
    taken = 0
    for kind in classes:
        if taken >= _HELD_OUT_SHARE_6X6 * grids.total():
            return
        taken += grids[kind]
        yield kind


def _augmented(
    size: int,
    puzzles: npt.NDArray[np.uint8],
    grids: npt.NDArray[np.uint8],
    held_out: npt.NDArray[np.uint8],
    copies: int,
    seed: int,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Puzzles and solutions followed by `copies` symmetric copies of each. A copy whose solution is a held-out grid
    is drawn again (for 4x4 a quarter of them; for 9x9 there are none, since held-out grids are essentially
    different)."""
    if not copies:
        return puzzles, grids
    rng = np.random.default_rng([seed, size])
    held_out_keys = np.unique(_keys(held_out))
    sources = np.tile(np.arange(len(puzzles)), copies)
    new_puzzles = np.empty((len(sources), puzzles.shape[1]), dtype=np.uint8)
    new_grids = np.empty_like(new_puzzles)
    waiting = np.arange(len(sources))
    while waiting.size:
        drawn = sudoku.draw_symmetries(len(waiting), size, rng)
        taken = sources[waiting]
        new_puzzles[waiting], new_grids[waiting] = drawn.apply(puzzles[taken]), drawn.apply(grids[taken])
        waiting = waiting[np.isin(_keys(new_grids[waiting]), held_out_keys)]
    return np.concatenate([puzzles, new_puzzles]), np.concatenate([grids, new_grids])


def _keys(grids: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """Each grid as one opaque value that can be compared and sorted."""
    grids = np.ascontiguousarray(grids)
    return grids.view(f"V{grids.shape[1]}").reshape(-1)


def _counted(values: Iterable[int]) -> dict[int, int]:
    found, counts = np.unique(list(values), return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))
