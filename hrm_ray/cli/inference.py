"""The bodies of `hrm-ray generate` and `hrm-ray solve`: they print what inference/ computes."""

from __future__ import annotations

import json
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hrm_ray.data.puzzles.format import PuzzleFacts
from hrm_ray.errors import Fault, SettingsError
from hrm_ray.inference.puzzle import PuzzleModel, SolvedPuzzle
from hrm_ray.inference.text import Sampling, TextModel
from hrm_ray.launch.devices import choose_device


def run_generate(
    bundle: Path, *, prompt: str, sampling: Sampling, max_new_tokens: int, seed: int, adaptive: bool, device: str
) -> int:
    """Print the prompt and its continuation, as it is generated; returns the exit code."""
    model = TextModel.open(bundle, torch.device(choose_device(device)))
    completion = model.complete(prompt, sampling=sampling, max_new_tokens=max_new_tokens, seed=seed, adaptive=adaptive)
    for note in completion.notes:
        print(note, file=sys.stderr)
    print(prompt, end="", flush=True)
    with torch.inference_mode():
        for piece in completion:
            print(piece, end="", flush=True)
    print()
    if adaptive and completion.segments:
        mean = sum(completion.segments) / len(completion.segments)
        print(f"mean segments {mean:.2f} of {model.model.config.halt_max_steps}", file=sys.stderr)
    return 0


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
    """Solve puzzles and print them with their answers; returns the exit code."""
    if bool(puzzles) == (file is not None):
        raise SettingsError(Fault("PUZZLE or --file", "exactly one of them is needed", "Give puzzles, or --file PATH"))
    model = PuzzleModel.open(bundle, torch.device(choose_device(device)))
    given = model.from_file(file, split, limit) if file is not None else model.from_words(puzzles[:limit])
    right = known = 0
    for solved in model.solve(given, stop_by_q=stop_by_q):
        known += solved.correct is not None
        right += bool(solved.correct)
        print(_as_json(model.facts, solved) if as_json else _as_grids(model.facts, solved))
    if known and not as_json:
        print(f"{right} of {known} solved exactly ({100 * right / known:.1f} %)")
    return 0


def _as_json(facts: PuzzleFacts, solved: SolvedPuzzle) -> str:
    plain: dict[str, Any] = {"puzzle": cells_of(facts, solved.puzzle), "answer": cells_of(facts, solved.answer)}
    plain["segments"] = solved.segments
    return json.dumps(plain if solved.correct is None else plain | {"correct": solved.correct})


def cells_of(facts: PuzzleFacts, tokens: npt.NDArray[np.int32]) -> str | list[int]:
    """A grid as `solve` takes it: a symbol per cell where the tokens have symbols, else their numbers."""
    if not facts.symbols or max(map(len, facts.symbols)) > 1:
        numbers: list[int] = tokens.tolist()
        return numbers
    return "".join(facts.symbols[token] for token in tokens)


def _as_grids(facts: PuzzleFacts, solved: SolvedPuzzle) -> str:
    """Puzzle and answer side by side."""
    verdict = {True: ", right", False: ", wrong", None: ""}[solved.correct]
    left, right = facts.render(solved.puzzle).split("\n"), facts.render(solved.answer).split("\n")
    width = max(map(len, left))
    grids = "\n".join(f"{a:{width}}   {b}" for a, b in zip_longest(left, right, fillvalue=""))
    return f"{grids}\n{solved.segments} segment(s){verdict}\n"
