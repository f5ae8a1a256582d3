"""Builds a puzzle set from ARC tasks: their train pairs and augmented copies for training, their test pairs held
out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hrm_ray.atomic_files import atomic_directory, check_vacant
from hrm_ray.data.builders.progress import Progress, no_progress
from hrm_ray.data.puzzles import arc
from hrm_ray.data.puzzles.format import BUILT_FILES, SplitEntry, square_description, write_description, write_split
from hrm_ray.errors import Fault, SettingsError

IDENTIFIERS = "identifiers.json"
"""Beside dataset.json: a list that says what each puzzle identifier is; the first is that of no task."""
BLANK = "<blank>"

_TRIES = 5
"""Changes that are drawn for each copy wanted, before a task is taken to have no more different ones."""
_OWNED = BUILT_FILES | {IDENTIFIERS}

Tokens = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ArcSummary:
    """The result of build_arc: tasks and augmented copies, pairs per split, and what was left out: test pairs without
    an output, and training pairs that are also test pairs."""

    folder: Path
    tasks: int
    copies: int
    train: int
    test: int
    kept_back: int
    also_held_out: int


@dataclass(frozen=True)
class _Samples:
    """Pairs as tokens, [N, 900] each, with the identifier of each pair's task or copy, [N], and how many pairs were
    left out."""

    inputs: Tokens
    labels: Tokens
    identifiers: npt.NDArray[np.int32]
    left_out: int


def build_arc(
    tasks: Path,
    out: Path,
    *,
    augment: int = 0,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ArcSummary:
    """A puzzle set of the ARC tasks in the folder `tasks` (.json files, also in folders below).

    Every task has a puzzle identifier from 1 on, and so has every one of up to `augment` different copies of it (one
    of eight symmetries, colours but black exchanged): a model learns a task's rule by its identifier. Train pairs of
    tasks and copies are the split "train", test pairs of the tasks themselves the split "test". A training pair that
    is also a test pair is left out. Raises SettingsError for values and paths that cannot be used, DataError for a file
    that is no task.
    """
    if augment < 0:
        raise SettingsError(Fault(f"--augment {augment}", "must be at least 0", "Give --augment 0 or more"))
    if out.resolve().is_relative_to(tasks.resolve()):
        reason = f"it is inside the folder of tasks, {tasks}, and would be read as a task"
        raise SettingsError(Fault(str(out), reason, "Give --out another folder"))
    check_vacant(out, overwrite=overwrite, owned=_OWNED, option="--out")
    read = arc.read_tasks(tasks)
    changes = list(_changes(read, augment, seed, progress))
    names = [BLANK, *(f"{task.name}_{change.name}" if change else task.name for task, change in changes)]
    test = _samples([(task.test if change is None else (), None) for task, change in changes], frozenset())
    if not len(test.inputs):
        hint = "Give tasks whose test pairs have an output"
        raise SettingsError(Fault(str(tasks), "no test pair has an output, so none can be held out", hint))
    held_out = {_key(shown, wanted) for shown, wanted in zip(test.inputs, test.labels, strict=True)}
    train = _samples([(task.train, change) for task, change in changes], held_out)
    if not len(train.inputs):
        hint = "Give tasks whose train pairs are not their test pairs"
        reason = "every training pair is also a test pair, so none is left to train on"
        raise SettingsError(Fault(str(tasks), reason, hint))
    built = {"augment": augment, "seed": seed, "tasks": len(read), "copies": len(changes) - len(read)}
    with atomic_directory(out, overwrite=overwrite, owned=_OWNED) as building:
        splits: dict[str, SplitEntry] = {
            name: write_split(building, name, split.inputs, split.labels, split.identifiers)
            for name, split in (("train", train), ("test", test))
        }
        (building / IDENTIFIERS).write_text(json.dumps(names, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
        description = square_description("arc", arc.MOST_SIDE, arc.SYMBOLS, splits, built, len(names), arc.END)
        write_description(building, description)
    kept_back = sum(pair.wanted is None for task in read for pair in task.test)
    copies = len(changes) - len(read)
    return ArcSummary(out, len(read), copies, len(train.inputs), len(test.inputs), kept_back, train.left_out)


def _changes(
    tasks: list[arc.Task], augment: int, seed: int, progress: Progress
) -> Iterator[tuple[arc.Task, arc.Change | None]]:
    """Each task as it is (None), and then its copies, no two of which show the same."""
    for number, task in enumerate(tasks):
        progress("tasks", number, len(tasks))
        yield task, None
        rng = np.random.default_rng([seed, number])
        known = {_shown(task, None)}
        for _ in range(_TRIES * augment):
            if len(known) > augment:
                break
            change = arc.draw_change(rng)
            shown = _shown(task, change)
            if shown not in known:
                known.add(shown)
                yield task, change


def _shown(task: arc.Task, change: arc.Change | None) -> bytes:
    """A task's train pairs under a change, as bytes, to compare them with others."""
    grids = [grid for pair in task.train for grid in (pair.shown, pair.wanted) if grid is not None]
    changed = grids if change is None else [change.apply(grid) for grid in grids]
    return b"".join(bytes(grid.shape) + grid.tobytes() for grid in changed)


def _samples(pairs: list[tuple[tuple[arc.Pair, ...], arc.Change | None]], apart_from: Set[bytes]) -> _Samples:
    """The pairs whose output is known as tokens, without those that are `apart_from`; identifiers count the entries of
    `pairs` from 1 on."""
    room = sum(pair.wanted is not None for examples, _ in pairs for pair in examples)
    inputs = np.empty((room, arc.MOST_SIDE**2), dtype=np.uint8)
    labels = np.empty_like(inputs)
    identifiers = np.empty(room, dtype=np.int32)
    row = 0
    for identifier, (examples, change) in enumerate(pairs, start=1):
        for pair in examples:
            if pair.wanted is None:
                continue
            grids = (pair.shown, pair.wanted)
            inputs[row], labels[row] = (arc.tokens(grid if change is None else change.apply(grid)) for grid in grids)
            identifiers[row] = identifier
            row += _key(inputs[row], labels[row]) not in apart_from
    return _Samples(inputs[:row], labels[:row], identifiers[:row], left_out=room - row)


def _key(shown: Tokens, wanted: Tokens) -> bytes:
    """A pair as bytes, whatever its identifier."""
    return shown.tobytes() + wanted.tobytes()
