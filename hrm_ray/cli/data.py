"""`hrm-ray data build`: says what was built.

One job: call the builders of `hrm_ray.data.builders` and print their summaries. It decides nothing about the data.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from hrm_ray.data.builders.arc import build_arc
from hrm_ray.data.builders.maze import build_maze
from hrm_ray.data.builders.sudoku import Difficulty, build_sudoku
from hrm_ray.data.builders.text import build_text


def run_build_sudoku(
    out: Path,
    *,
    size: int,
    train: int,
    test: int,
    difficulty: Difficulty,
    clues: int | None,
    augment: int,
    seed: int,
    overwrite: bool,
) -> int:
    """Build the puzzles; gives the exit code."""
    made = build_sudoku(
        out,
        size=size,
        train=train,
        test=test,
        difficulty=difficulty,
        clues=clues,
        augment=augment,
        seed=seed,
        overwrite=overwrite,
    )
    print(f"{made.folder}: Sudoku {made.size}x{made.size}")
    print(f"  train  {made.train} puzzles on {made.train_grids} grids ({made.base_puzzles} before augmentation)")
    print(f"  test   {made.test} puzzles on {made.test_grids} other grids")
    print(f"  clues  {_counts(made.clues)}")
    print(f"  grades {_counts(made.grades)}")
    print(f"next: hrm-ray train --dataset-file {shlex.quote(str(made.folder))} --val-split test")
    return 0


def run_build_maze(
    out: Path,
    *,
    size: int,
    train: int,
    test: int,
    min_path: int | None,
    openings: float,
    augment: int,
    seed: int,
    overwrite: bool,
) -> int:
    """Build the mazes; gives the exit code."""
    made = build_maze(
        out,
        size=size,
        train=train,
        test=test,
        min_path=min_path,
        openings=openings,
        augment=augment,
        seed=seed,
        overwrite=overwrite,
    )
    print(f"{made.folder}: mazes {made.size}x{made.size}, one shortest path each")
    print(f"  train  {made.train} mazes ({made.base_puzzles} before augmentation)")
    print(f"  test   {made.test} mazes with other walls")
    fewest, median, most = made.moves
    print(f"  path   {fewest} to {most} moves, median {median}")
    print(f"next: hrm-ray train --dataset-file {shlex.quote(str(made.folder))} --val-split test")
    return 0


def run_build_arc(tasks: Path, out: Path, *, augment: int, seed: int, overwrite: bool) -> int:
    """Build the set out of the tasks; gives the exit code."""
    made = build_arc(tasks, out, augment=augment, seed=seed, overwrite=overwrite)
    print(f"{made.folder}: {made.tasks} ARC tasks and {made.copies} copies of them")
    print(f"  train  {made.train} train pairs of tasks and copies")
    print(f"  test   {made.test} test pairs of the tasks")
    if made.kept_back:
        print(f"  left out  {made.kept_back} test pairs whose output is kept back")
    if made.also_held_out:
        print(f"  left out  {made.also_held_out} train pairs that are test pairs too")
    # Without an embedding of its identifier nothing tells the model which task's rule is asked for.
    about = "--val-split test --puzzle-emb-ndim 512"
    print(f"next: hrm-ray train --dataset-file {shlex.quote(str(made.folder))} {about}")
    return 0


def run_build_text(out: Path, *, max_bytes: int | None, seed: int, overwrite: bool) -> int:
    """Build the corpus; gives the exit code."""
    made = build_text(out, max_bytes=max_bytes, seed=seed, overwrite=overwrite)
    print(f"{made.folder}: text of Python's documentation")
    print(f"  train  {made.train_documents} documents, {made.train_bytes} bytes")
    print(f"  test   {made.test_documents} documents, {made.test_bytes} bytes")
    print(f"  {made.duplicates} duplicates left out")
    print(f"next: hrm-ray train --dataset-file {shlex.quote(str(made.folder))} --val-split test")
    return 0


def _counts(numbers: dict[int, int]) -> str:
    return ", ".join(f"{count} with {value}" for value, count in sorted(numbers.items()))
