"""Builds a maze set: each maze has a start, a goal, and one shortest path between them, which is the label."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hrm_ray.atomic_files import atomic_directory, check_vacant
from hrm_ray.data.builders.progress import Progress, no_progress
from hrm_ray.data.puzzles import dihedral, mazes
from hrm_ray.data.puzzles.format import BUILT_FILES, SplitEntry, square_description, write_description, write_split
from hrm_ray.errors import Fault, SettingsError

SIZES = range(5, 31)
SYMBOLS = ["?", "#", " ", "S", "G", "o"]
"""How tokens print: padding, wall, open, start, goal, way. Numbers and signs are those of the public HRM maze sets
("# SGo" from 1 on); padding has none there."""
WALL, OPEN, START, GOAL, WAY = range(1, 6)

_PATIENCE = 2_000
"""If of so many mazes fewer than one in _RAREST gives a new puzzle, the request is taken for impossible."""
_RAREST = 1000
_PROGRESS_DRAWS = 20
_TEST_SHARE = 5
"""One layout in so many is held out."""

Grids = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class MazeSummary:
    """The result of build_maze: puzzles per split, training puzzles before augmentation, and the minimum, median and
    maximum path length in training."""

    folder: Path
    size: int
    train: int
    test: int
    base_puzzles: int
    moves: tuple[int, int, int]


def build_maze(
    out: Path,
    *,
    size: int = 30,
    train: int = 1000,
    test: int = 1000,
    min_path: int | None = None,
    openings: float = 0.05,
    augment: int = 0,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> MazeSummary:
    """A puzzle set of `train` and `test` different mazes of size x size cells, each with exactly one shortest path from
    start to goal, of at least `min_path` moves (None: as many as the maze is wide). `openings` is the share of walls
    between rooms that is taken away again, so that there are loops; `augment` up to 7 turned and mirrored copies of
    each training maze are added.

    The label is the maze with the path marked. No two puzzles of a split are copies of each other, and walls of a
    held-out maze are not those of a training maze, also turned or mirrored: a hash of the walls decides the split.
    Raises SettingsError for values that cannot be satisfied, such as longer paths than can be found.
    """
    min_path = size if min_path is None else min_path
    _check_maze(size, train, test, min_path, openings, augment)
    check_vacant(out, overwrite=overwrite, owned=BUILT_FILES, option="--out")
    maker = _MazeMaker(size, min_path, openings, seed, progress)
    held_out, base = maker.draw(test, "test"), maker.draw(train, "train")
    copies = _augmented(base, augment, seed)
    built = {"min_path": min_path, "openings": openings, "augment": augment, "seed": seed, "base_puzzles": train}
    with atomic_directory(out, overwrite=overwrite, owned=BUILT_FILES) as building:
        splits: dict[str, SplitEntry] = {
            "train": write_split(building, "train", _inputs(copies), copies.reshape(len(copies), -1)),
            "test": write_split(building, "test", _inputs(held_out), held_out.reshape(len(held_out), -1)),
        }
        write_description(building, square_description(f"maze-{size}x{size}", size, SYMBOLS, splits, built))
    lengths = np.sort((base == WAY).sum(axis=(1, 2)) + 1)
    moves = (int(lengths[0]), int(lengths[len(lengths) // 2]), int(lengths[-1]))
    return MazeSummary(out, size, len(copies), len(held_out), train, moves)


def _check_maze(size: int, train: int, test: int, min_path: int, openings: float, augment: int) -> None:
    """Raises SettingsError with everything that is wrong."""
    faults = []
    if size not in SIZES:
        sizes = f"{SIZES[0]} to {SIZES[-1]}"
        faults.append(Fault(f"--size {size}", f"a maze has {sizes} cells to a side", f"Give --size {sizes}"))
    for name, value, least, most in (("train", train, 1, None), ("test", test, 1, None), ("augment", augment, 0, 7)):
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"{least} to {most}"
            faults.append(Fault(f"--{name} {value}", f"must be {bounds}", f"Give --{name} {bounds}"))
    if not 0 <= openings <= 1:
        faults.append(Fault(f"--openings {openings}", "must be a share of the walls", "Give --openings 0 to 1"))
    if size in SIZES and not 1 <= min_path <= mazes.most_moves(size):
        most_moves = mazes.most_moves(size)
        reason = f"a path through {size}x{size} cells has 1 to {most_moves} moves"
        faults.append(
            Fault(f"--min-path {min_path}", reason, f"Give --min-path {most_moves} or less, or a larger --size")
        )
    if faults:
        raise SettingsError(faults)


class _MazeMaker:
    """Draws different mazes for two splits that share no layout of walls."""

    def __init__(self, size: int, min_path: int, openings: float, seed: int, progress: Progress) -> None:
        self._progress = progress
        self._size, self._min_path, self._openings, self._seed = size, min_path, openings, seed

    def draw(self, count: int, split: str) -> Grids:
        """`count` mazes with their paths marked, uint8 [count, size, size]; no two are copies of each other."""
        rng = random.Random(f"maze {self._size} {split} {self._seed}")
        found: dict[bytes, Grids] = {}
        draws = before = 0
        while len(found) < count:
            if draws % _PROGRESS_DRAWS == 0:
                self._progress(split, len(found), count)
            if draws == _PATIENCE and len(found) - before > _PATIENCE // _RAREST:
                draws, before = 0, len(found)
            if draws == _PATIENCE:
                kind = f"{self._size}x{self._size} mazes with a shortest path of {self._min_path} moves or more"
                reason = (
                    f"only {len(found)} different {kind} were found: of the last {_PATIENCE} draws "
                    f"{len(found) - before} gave a new one"
                )
                hint = f"Give a smaller --{split}, a smaller --min-path, fewer --openings, or a larger --size"
                raise SettingsError(Fault(f"--{split} {count}", reason, hint))
            draws += 1
            free = mazes.carve(self._size, rng, self._openings)
            if self._split_of(free) != split:
                continue
            ends = mazes.draw_endpoints(free, rng, self._min_path)
            if ends is None:
                continue
            maze = _marked(free, *ends)
            found.setdefault(dihedral.canonical(maze), maze)
        return np.array(list(found.values()))

    def _split_of(self, free: mazes.FreeCells) -> str:
        digest = hashlib.sha256(f"{self._seed} ".encode() + dihedral.canonical(free)).digest()
        return "test" if int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0 else "train"


def _marked(free: mazes.FreeCells, start: int, goal: int) -> Grids:
    """Tokens of a maze with its path, uint8 [size, size]."""
    cells = np.where(free, OPEN, WALL).astype(np.uint8)
    cells.ravel()[mazes.shortest_path(free, start, goal)] = WAY
    cells.ravel()[[start, goal]] = START, GOAL
    return cells


def _inputs(labels: Grids) -> Grids:
    """The mazes without their paths, uint8 [N, size * size]."""
    return np.where(labels == WAY, np.uint8(OPEN), labels).reshape(len(labels), -1)


def _augmented(base: Grids, copies: int, seed: int) -> Grids:
    """The mazes followed by `copies` turned or mirrored copies of each, drawn from the seven; a copy that is the same
    as another of its maze is left out."""
    if not copies:
        return base
    rng = np.random.default_rng([seed, base.shape[1]])
    added: list[Grids] = []
    for maze in base:
        known = {maze.tobytes()}
        for number in rng.permutation(np.arange(1, dihedral.COUNT))[:copies].tolist():
            copy = np.ascontiguousarray(dihedral.turned(maze, number))
            if copy.tobytes() not in known:
                known.add(copy.tobytes())
                added.append(copy)
    return np.concatenate([base, np.array(added).reshape(-1, *base.shape[1:])])
