"""The body of `hrm-ray solve`: answers of a trained puzzle model.

One job: puzzles in, filled grids out, with how many segments each took. The network's part is model/solve.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from hrm_ray.cli.used_model import opened
from hrm_ray.data.puzzles.format import PuzzleFacts
from hrm_ray.data.puzzles.samples import open_puzzles, puzzle_splits
from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.inference.puzzle import Answers, solve
from hrm_ray.model.actv1 import ActV1
from hrm_ray.rundir import RunDir, read_json
from hrm_ray.types import IGNORE_LABEL, Columns

_BATCH = 256


def run_solve(
    bundle: Path,
    *,
    puzzles: list[str],
    file: Path | None,
    split: str | None,
    limit: int | None,
    stop_by_q: bool,
    device: str,
    as_json: bool,
) -> int:
    """Solve and print; gives the exit code."""
    if bool(puzzles) == (file is not None):
        raise SettingsError(Fault("PUZZLE or --file", "exactly one of them is needed", "Give puzzles, or --file PATH"))
    model = opened(bundle, device)
    if model.config.task != "puzzle":
        raise DataError(Fault(str(bundle), "this model writes text", "Use `hrm-ray generate` with it"))
    facts = _facts(bundle)
    columns = _from_file(file, split, facts, limit) if file is not None else _from_words(puzzles[:limit], facts)
    right = known = 0
    for first in range(0, len(columns["inputs"]), _BATCH):
        part = {name: values[first : first + _BATCH] for name, values in columns.items()}
        answers = solve(cast(ActV1, model), part["inputs"], part["puzzle_identifiers"], stop_by_q=stop_by_q)
        for row in range(len(part["inputs"])):
            correct = _correct(answers.tokens[row], part["labels"][row])
            known += correct is not None
            right += bool(correct)
            print(_shown(facts, part["inputs"][row], answers, row, correct, as_json))
    if known and not as_json:
        print(f"{right} of {known} solved exactly ({100 * right / known:.1f} %)")
    return 0


def _facts(bundle: Path) -> PuzzleFacts:
    """How the bundle's puzzles print."""
    return PuzzleFacts.from_plain(read_json(RunDir(bundle).puzzle))


def _from_file(path: Path, split: str | None, facts: PuzzleFacts, limit: int | None) -> Columns:
    chosen = split or ("test" if "test" in puzzle_splits(path) else "train")
    samples = open_puzzles(path, chosen)
    samples.fit_to(facts)
    count = len(samples) if limit is None else min(limit, len(samples))
    return samples.rows(np.arange(count, dtype=np.int64))


def _from_words(words: list[str], facts: PuzzleFacts) -> Columns:
    """Puzzles given as words, a symbol for each cell; 0 stands for an empty one where no digit is 0, and so does a
    point where that is a space."""
    empty = "." if "." in facts.symbols else " "
    others = [sign for sign in "0." if sign not in facts.symbols and empty in facts.symbols]
    as_written = str.maketrans(dict.fromkeys(others, empty))
    inputs = np.stack([facts.parse(word.translate(as_written)) for word in words])
    return {
        "inputs": inputs,
        "labels": np.full_like(inputs, IGNORE_LABEL),
        "puzzle_identifiers": np.full(len(words), facts.blank_id, dtype=np.int32),
    }


def _correct(answer: npt.NDArray[np.int32], labels: npt.NDArray[np.int32]) -> bool | None:
    """Whether every labelled cell is right; None where the solution is not known."""
    known = labels != IGNORE_LABEL
    return bool((answer[known] == labels[known]).all()) if known.any() else None


def _written(facts: PuzzleFacts, tokens: npt.NDArray[np.int32]) -> str | list[int]:
    """A grid as `solve` takes it: a sign a cell where the tokens have signs, else their numbers."""
    if not facts.symbols or max(map(len, facts.symbols)) > 1:
        numbers: list[int] = tokens.tolist()
        return numbers
    return "".join(facts.symbols[token] for token in tokens)


def _shown(
    facts: PuzzleFacts, puzzle: npt.NDArray[np.int32], answers: Answers, row: int, correct: bool | None, as_json: bool
) -> str:
    answer, segments = answers.tokens[row], int(answers.segments[row])
    if as_json:
        about: dict[str, Any] = {"puzzle": _written(facts, puzzle), "answer": _written(facts, answer)}
        about["segments"] = segments
        return json.dumps(about if correct is None else about | {"correct": correct})
    verdict = {True: ", right", False: ", wrong", None: ""}[correct]
    left, right = facts.render(puzzle).split("\n"), facts.render(answer).split("\n")
    width = max(map(len, left))
    grids = "\n".join(f"{a:{width}}   {b}" for a, b in zip_longest(left, right, fillvalue=""))
    return f"{grids}\n{segments} segment(s){verdict}\n"
