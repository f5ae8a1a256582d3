"""Evaluation on the first samples of a held-out set, with the metrics of puzzles; those of text are in evaluate_text.

The samples are the same for any number of workers; sums are added over ranks before they are divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from hrm_ray.model.objective import AnyObjective, Batch
from hrm_ray.model.puzzle_objective import PuzzleObjective
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.evaluate_text import Sums, TextObjectives, text_figures, text_names, text_sums
from hrm_ray.train.microbatch import to_batch, wanted_columns
from hrm_ray.train.out_of_memory import reading_data, too_large, unless_out_of_memory
from hrm_ray.train.plan import halved
from hrm_ray.train.world import World
from hrm_ray.types import IGNORE_LABEL, SampleSet


@dataclass(frozen=True)
class EvalSet:
    """A held-out set, of which an evaluation reads `batches` batches of `batch_size` samples."""

    samples: SampleSet
    batch_size: int
    batches: int
    limit: int | None = None
    """Samples at most, where that is no whole number of batches."""

    @classmethod
    def of_run(cls, samples: SampleSet | None, settings: RunSettings, world: World) -> EvalSet | None:
        """The held-out set of a run: --eval-batches effective batches, independent of how those are split."""
        chosen = settings.optimizer
        batches = settings.data.eval_batches * chosen.gradient_accumulation_steps * world.size
        return None if samples is None else cls(samples, chosen.batch_size, batches)

    def with_batch(self, batch_size: int) -> EvalSet:
        """The same samples in batches of `batch_size`, which must divide the present size."""
        return replace(self, batch_size=batch_size, batches=self.batches * self.batch_size // batch_size)

    @property
    def count(self) -> int:
        most = min(len(self.samples), self.batch_size * self.batches)
        return most if self.limit is None else min(most, self.limit)


def evaluate(
    objective: AnyObjective, held_out: EvalSet, world: World, on_batch: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Metrics of the objective's current weights; a collective. Leaves the objective in training mode. `on_batch` is
    called for each batch of this rank.

    If memory runs out on any rank, all halve their batches. Raises ResourceError if one row is too much.
    """
    _, names, figures_of = _functions_of(objective)
    objective.eval()
    while True:
        totals = unless_out_of_memory(partial(_own_sums, objective, held_out, world, on_batch), world.device)
        failed = world.sum(torch.tensor(float(totals is None), device=world.device))
        if totals is not None and float(failed) == 0:
            break
        rows = halved(held_out.batch_size)
        if rows is None:
            raise too_large("an evaluation", "with one row at a time")
        held_out = held_out.with_batch(rows)
    objective.train()
    vector = torch.stack([totals.get(name, torch.zeros((), dtype=torch.float64)) for name in names])
    if world.device.type != "mps":
        vector = vector.to(world.device)
    summed = dict(zip(names, world.sum(vector).tolist(), strict=True))
    return figures_of(summed)


def _own_sums(objective: AnyObjective, held_out: EvalSet, world: World, on_batch: Callable[[], None]) -> Sums:
    """Sums over this rank's batches."""
    sums_of = _functions_of(objective)[0]
    wanted = wanted_columns(objective.model.config) | {"label_bytes"}
    totals: Sums = {}
    with torch.no_grad():
        for number, first in enumerate(range(0, held_out.count, held_out.batch_size)):
            if number % world.size != world.rank:
                continue
            indices = np.arange(first, min(first + held_out.batch_size, held_out.count), dtype=np.int64)
            with reading_data("the held-out data"):
                columns = held_out.samples.rows(indices)
            batch = to_batch(columns, wanted, world.device)
            on_batch()
            for name, value in sums_of(objective, batch).items():
                totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + value.cpu().double()
    return totals


_PUZZLE_SUMS = ("rows", "loss", "cells", "exact", "exact_q", "steps_q", "q_right")


def _puzzle_sums(puzzle: PuzzleObjective, batch: Batch) -> Sums:
    """Sums over puzzles at the last segment, and (`_q`) at the first segment where q_halt > q_continue."""
    labels = batch["labels"]
    supervised = labels != IGNORE_LABEL
    counts = supervised.sum(-1)
    carry = puzzle.initial_carry(batch)
    stopped = torch.zeros(labels.shape[0], dtype=torch.bool, device=labels.device)
    stop_exact, stop_steps = torch.zeros_like(stopped), torch.zeros_like(counts)
    for segment in range(1, puzzle.model.config.halt_max_steps + 1):
        view = puzzle.segment(batch, carry)
        carry = view.carry
        hit = supervised & (view.logits.argmax(-1) == labels)
        exact = hit.sum(-1) == counts
        stops = ((view.q_halt > view.q_continue) | carry.halted) & ~stopped
        stop_exact = torch.where(stops, exact, stop_exact)
        stop_steps = torch.where(stops, segment, stop_steps)
        stopped |= stops
    halt_right = (view.q_halt >= 0) == exact
    loss_rows = puzzle.cross_entropy(view.logits, labels).sum(-1) / counts.clamp(min=1)
    return {
        "rows": batch["active"].sum(),
        "loss": loss_rows.sum(),
        "cells": (hit.sum(-1) / counts.clamp(min=1)).sum(),
        "exact": exact.sum(),
        "exact_q": stop_exact.sum(),
        "steps_q": stop_steps.sum(),
        "q_right": halt_right.sum(),
    }


def _puzzle_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Per puzzle: loss and accuracies at the last segment, and exact accuracy and segments when Q stops."""
    rows = sums["rows"]
    return {
        "loss": sums["loss"] / rows,
        "cell_accuracy": sums["cells"] / rows,
        "exact_accuracy": sums["exact"] / rows,
        "exact_accuracy_q_stop": sums["exact_q"] / rows,
        "steps_q_stop": sums["steps_q"] / rows,
        "q_halt_accuracy": sums["q_right"] / rows,
        "puzzles": rows,
    }


def _functions_of(
    objective: AnyObjective,
) -> tuple[Callable[..., Sums], Sequence[str], Callable[..., dict[str, float]]]:
    """The function that sums over one batch, the sums' names, and the function from all sums to metrics."""
    if isinstance(objective, PuzzleObjective):
        return _puzzle_sums, _PUZZLE_SUMS, _puzzle_figures
    return text_sums, text_names(cast(TextObjectives, objective)), text_figures


def better(figures: Mapping[str, float], best: Mapping[str, Any] | None) -> bool:
    """Whether `figures` beat the best so far: by exact accuracy first for puzzles, then by the lower loss.

    A loss that is not finite beats nothing, not even no best at all.
    """
    if not math.isfinite(figures["loss"]):
        return False
    if best is None:
        return True
    rank = (figures.get("exact_accuracy", 0.0), -figures["loss"])
    return rank > (best.get("exact_accuracy", 0.0), -best["loss"])
