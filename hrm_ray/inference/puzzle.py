"""Puzzle solving with a trained model: puzzles come from a file or are typed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hrm_ray.bundle.store import open_bundle
from hrm_ray.data.puzzles.format import PuzzleFacts
from hrm_ray.data.puzzles.samples import open_puzzles, puzzle_splits
from hrm_ray.errors import DataError, Fault
from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.layers import Context
from hrm_ray.model.scope import FULL
from hrm_ray.rundir import RunDir, read_json
from hrm_ray.types import IGNORE_LABEL, Columns

BATCH_SIZE = 256


@dataclass(frozen=True)
class Answers:
    """The most probable token of every cell [B, S], and the number of segments that each puzzle ran [B]."""

    tokens: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]


@torch.no_grad()
def solve(
    model: ActV1, inputs: npt.NDArray[np.int32], identifiers: npt.NDArray[np.int32], *, stop_by_q: bool
) -> Answers:
    """Answer puzzles [B, S]. With `stop_by_q` a puzzle is read at the first segment where q_halt > q_continue."""
    config, device = model.config, model.lm_head.weight.device
    cells = torch.from_numpy(inputs).to(device)
    x = model.embedding(cells, torch.from_numpy(identifiers).to(device), None)
    states = model.initial_states(len(inputs), config.total_positions)
    context = Context(FULL, model.rotation(0, config.total_positions))
    answer = torch.zeros_like(cells)
    segments = torch.zeros(len(inputs), dtype=torch.int32, device=device)
    for segment in range(1, config.halt_max_steps + 1):
        states = model.segment(states, x, context)
        q_halt, q_continue = model.halting_scores(states.z_h[:, 0])
        stops = (q_halt > q_continue) if stop_by_q else torch.zeros_like(segments, dtype=torch.bool)
        if segment == config.halt_max_steps:
            stops = torch.ones_like(stops)
        now = stops & (segments == 0)
        tokens = model.logits(states.z_h).argmax(-1).to(answer.dtype)
        answer = torch.where(now.unsqueeze(-1), tokens, answer)
        segments = torch.where(now, segment, segments)
    return Answers(answer.cpu().numpy(), segments.cpu().numpy())


@dataclass(frozen=True)
class SolvedPuzzle:
    """A puzzle and its answer [S], the segments that it ran, and whether the answer is right (None: not known)."""

    puzzle: npt.NDArray[np.int32]
    answer: npt.NDArray[np.int32]
    segments: int
    correct: bool | None


class PuzzleModel:
    """A trained puzzle model, with the format of its puzzles."""

    def __init__(self, model: ActV1, facts: PuzzleFacts) -> None:
        self.model = model
        self.facts = facts

    @classmethod
    def open(cls, bundle: Path, device: torch.device) -> PuzzleModel:
        """Read a bundle. Raises DataError where it is damaged or its model writes text."""
        model = open_bundle(bundle, device).model
        if not isinstance(model, ActV1) or model.config.task != "puzzle":
            raise DataError(Fault(str(bundle), "this is a language model", "Use `hrm-ray generate` with it"))
        return cls(model, PuzzleFacts.from_plain(read_json(RunDir(bundle).puzzle)))

    def from_file(self, path: Path, split: str | None = None, limit: int | None = None) -> Columns:
        """The first `limit` puzzles of a data set: of `split`, or else of its test split if it has one."""
        samples = open_puzzles(path, split or ("test" if "test" in puzzle_splits(path) else "train"))
        samples.fit_to(self.facts)
        count = len(samples) if limit is None else min(limit, len(samples))
        return samples.rows(np.arange(count, dtype=np.int64))

    def from_words(self, words: list[str]) -> Columns:
        """Puzzles typed with one symbol per cell. An empty cell may also be written 0 where 0 is no symbol, and . where
        a space is the empty one."""
        symbols = self.facts.symbols
        empty = "." if "." in symbols else " "
        others = [sign for sign in "0." if sign not in symbols and empty in symbols]
        spelling = str.maketrans(dict.fromkeys(others, empty))
        inputs = np.stack([self.facts.parse(word.translate(spelling)) for word in words])
        return {
            "inputs": inputs,
            "labels": np.full_like(inputs, IGNORE_LABEL),
            "puzzle_identifiers": np.full(len(words), self.facts.blank_id, dtype=np.int32),
        }

    def solve(self, puzzles: Columns, *, stop_by_q: bool = False) -> Iterator[SolvedPuzzle]:
        """Solve puzzles, one batch after the other."""
        for first in range(0, len(puzzles["inputs"]), BATCH_SIZE):
            batch = {name: values[first : first + BATCH_SIZE] for name, values in puzzles.items()}
            answers = solve(self.model, batch["inputs"], batch["puzzle_identifiers"], stop_by_q=stop_by_q)
            rows = zip(batch["inputs"], batch["labels"], answers.tokens, answers.segments.tolist(), strict=True)
            for puzzle, labels, answer, segments in rows:
                known = labels != IGNORE_LABEL
                correct = bool((answer[known] == labels[known]).all()) if known.any() else None
                yield SolvedPuzzle(puzzle, answer, segments, correct)
