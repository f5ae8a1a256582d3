"""`hrm-ray data build`: calls the builders of `hrm_ray.data.builders` and prints what they built."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from hrm_ray.cli.error_handler import command
from hrm_ray.cli.help_page import CommandLine

Difficulty: TypeAlias = Literal["any", "easy", "medium", "hard"]
Out: TypeAlias = Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")]
Seed: TypeAlias = Annotated[int, typer.Option(help="Random seed.")]
Overwrite: TypeAlias = Annotated[bool, typer.Option("--overwrite", help="Replace an existing data set.")]

build_app = CommandLine("Build a data set without a download.")


@build_app.command("sudoku")
@command
def sudoku(
    out: Out,
    size: Annotated[int, typer.Option(help="4, 6 or 9 cells to a side.")] = 9,
    train: Annotated[int, typer.Option(help="Training puzzles, before augmentation.")] = 1000,
    test: Annotated[int, typer.Option(help="Test puzzles, on other grids than the training puzzles.")] = 1000,
    difficulty: Annotated[
        Difficulty, typer.Option(help="By guesses that a solver needs: easy none, medium 1 to 3, hard more.")
    ] = "any",
    clues: Annotated[int | None, typer.Option(help="Clues in a puzzle [default: as few as possible].")] = None,
    augment: Annotated[int, typer.Option(help="Symmetric copies to add for each training puzzle.")] = 0,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> int:
    """Build Sudoku puzzles with exactly one solution each."""
    from hrm_ray.data.builders.sudoku import build_sudoku

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
        progress=_BuildProgress(),
    )
    print(f"{made.folder}: Sudoku {made.size}x{made.size}")
    print(f"  train  {made.train} puzzles on {made.train_grids} grids ({made.base_puzzles} before augmentation)")
    print(f"  test   {made.test} puzzles on {made.test_grids} other grids")
    print("  clues  " + ", ".join(f"{count} with {value}" for value, count in sorted(made.clues.items())))
    grades = ", ".join(f"{count} of grade {value}" for value, count in sorted(made.grades.items()))
    print(f"  grades {grades} (1 and 2 take no guesses, each guess adds 1)")
    return _next(made.folder)


@build_app.command("maze")
@command
def maze(
    out: Out,
    size: Annotated[int, typer.Option(help="Cells to a side, 5 to 30.")] = 30,
    train: Annotated[int, typer.Option(help="Training mazes, before augmentation.")] = 1000,
    test: Annotated[int, typer.Option(help="Test mazes, with other walls than the training mazes.")] = 1000,
    min_path: Annotated[
        int | None, typer.Option(help="Minimum number of moves from start to goal [default: the maze's width].")
    ] = None,
    openings: Annotated[float, typer.Option(help="Share of walls between rooms to remove; 0: no loops.")] = 0.05,
    augment: Annotated[int, typer.Option(help="Rotated or mirrored copies to add for each maze, up to 7.")] = 0,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> int:
    """Build mazes with exactly one shortest path each."""
    from hrm_ray.data.builders.maze import build_maze

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
        progress=_BuildProgress(),
    )
    fewest, median, most = made.moves
    print(f"{made.folder}: mazes {made.size}x{made.size}, one shortest path each")
    print(f"  train  {made.train} mazes ({made.base_puzzles} before augmentation)")
    print(f"  test   {made.test} mazes with other walls")
    print(f"  path   {fewest} to {most} moves, median {median}")
    return _next(made.folder)


@build_app.command("arc")
@command
def arc(
    tasks: Annotated[Path, typer.Argument(metavar="FOLDER", help="ARC tasks, one .json file each; subfolders too.")],
    out: Out,
    augment: Annotated[
        int, typer.Option(help="Maximum number of rotated, mirrored and recoloured copies of each task.")
    ] = 0,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> int:
    """Build a puzzle set from ARC tasks: their train pairs for training, their test pairs for evaluation."""
    from hrm_ray.data.builders.arc import build_arc

    made = build_arc(tasks, out, augment=augment, seed=seed, overwrite=overwrite, progress=_BuildProgress())
    print(f"{made.folder}: {made.tasks} ARC tasks and {made.copies} copies of them")
    print(f"  train  {made.train} train pairs of tasks and copies")
    print(f"  test   {made.test} test pairs of the tasks")
    if made.kept_back:
        print(f"  left out  {made.kept_back} test pairs whose output is not published")
    if made.also_held_out:
        print(f"  left out  {made.also_held_out} train pairs that are test pairs too")
    # Only an embedding of the puzzle identifier tells the model which task's rule to apply.
    return _next(made.folder, " --puzzle-emb-ndim 512")


@build_app.command("text")
@command
def text(
    out: Out,
    max_bytes: Annotated[int | None, typer.Option(help="Maximum size of the corpus in bytes.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> int:
    """Build a text corpus from the documentation that comes with Python."""
    from hrm_ray.data.builders.text import build_text

    made = build_text(out, max_bytes=max_bytes, seed=seed, overwrite=overwrite)
    print(f"{made.folder}: text of Python's documentation")
    print(f"  train  {made.train_documents} documents, {made.train_bytes} bytes")
    print(f"  test   {made.test_documents} documents, {made.test_bytes} bytes")
    print(f"  {made.duplicates} duplicate(s) left out")
    return _next(made.folder)


_ON_TERMINAL_S, _ELSEWHERE_S = 0.5, 10.0
"""Seconds between two views of the progress."""


class _BuildProgress:
    """Shows how far a builder has come: one line that changes on a terminal, now and then a line elsewhere."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._live = sys.stderr.isatty()
        self._shown_s = clock()

    def __call__(self, what: str, made: int, wanted: int) -> None:
        now_s = self._clock()
        if now_s - self._shown_s < (_ON_TERMINAL_S if self._live else _ELSEWHERE_S):
            return
        self._shown_s = now_s
        text = f"{what}: {made} of {wanted}"
        print(f"\r{text:40}\r" if self._live else text, end="" if self._live else "\n", file=sys.stderr, flush=True)


def _next(folder: Path, more: str = "") -> int:
    print(f"next: hrm-ray train --dataset-file {shlex.quote(str(folder))} --val-split test{more}")
    return 0
