"""Held-out figures: loss, perplexity, bits per byte, accuracy, and what halting would cost and save.

One job: evaluate a model on the first samples of a held-out set. The samples counted are the same for any number of
workers; sums are added over ranks before they are divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from hrm_ray.model.adaptive import adaptive_segments
from hrm_ray.model.layers import Context
from hrm_ray.model.objective import AnyObjective, Batch
from hrm_ray.model.puzzle_objective import PuzzleObjective
from hrm_ray.model.scope import text_scope
from hrm_ray.model.scoring import score_tokens
from hrm_ray.model.text_objective import TextObjective, TransformerObjective
from hrm_ray.train.microbatch import to_batch, wanted_columns
from hrm_ray.train.world import World
from hrm_ray.values import IGNORE_LABEL, SampleSet

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class HeldOut:
    """A held-out set and how much of it an evaluation reads: `batches` batches of `batch_size` samples."""

    samples: SampleSet
    batch_size: int
    batches: int

    @property
    def count(self) -> int:
        return min(len(self.samples), self.batch_size * self.batches)


def evaluate(objective: AnyObjective, held_out: HeldOut, world: World) -> dict[str, float]:
    """Figures of the model as it is now; a collective. Leaves the objective in training mode."""
    objective.eval()
    wanted = wanted_columns(objective.model.config) | {"label_bytes"}
    totals: Sums = {}
    with torch.no_grad():
        for number, first in enumerate(range(0, held_out.count, held_out.batch_size)):
            if number % world.size != world.rank:
                continue
            indices = np.arange(first, min(first + held_out.batch_size, held_out.count), dtype=np.int64)
            batch = to_batch(held_out.samples.rows(indices), wanted, world.device)
            for name, value in _SUMS[type(objective)](objective, batch).items():
                totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + value.cpu().double()
    objective.train()
    names = _NAMES[type(objective)](objective)
    vector = torch.stack([totals.get(name, torch.zeros((), dtype=torch.float64)) for name in names])
    if world.device.type != "mps":
        vector = vector.to(world.device)
    summed = dict(zip(names, world.sum(vector).tolist(), strict=True))
    return _FIGURES[type(objective)](summed)


def _text_sums(objective: AnyObjective, batch: Batch) -> Sums:
    text = cast(TextObjective, objective)
    labels = batch["labels"]
    carry = text.initial_carry(batch)
    x = text.model.embedding(batch["inputs"], None, batch.get("positions"))
    scope = text_scope(labels.shape[1], batch.get("documents"), batch.get("prompt"))
    context = Context(scope, text.model.rotation(0, labels.shape[1]))
    states = carry.states
    for _ in range(text.segments_per_step):
        states = text.model.segment(states, x, context)
    sums = _token_sums(text, states.z_h, batch)
    if _reads_adaptively(text):
        sums |= _adaptive_sums(text, batch, x)
    return sums


def _reads_adaptively(text: TextObjective) -> bool:
    return text.model.config.halt_rule == "gain" and text.segments_per_step > 1


def _adaptive_sums(text: TextObjective, batch: Batch, x: Tensor) -> Sums:
    labels = batch["labels"]
    scope = text_scope(labels.shape[1], batch.get("documents"), batch.get("prompt"))
    valid = labels != IGNORE_LABEL
    loss, segments = x.new_zeros(()), x.new_zeros(())
    for reading in adaptive_segments(text.model, x, scope, batch.get("prompt")):
        now = reading.reads & valid
        scored = score_tokens(reading.states.z_h, text.model.lm_head.weight, labels, text.loss_kind)
        loss = loss + torch.where(now, scored.loss, 0.0).sum()
        segments = segments + reading.segment * now.sum()
    return {"adaptive_loss": loss, "segments": segments}


def _transformer_sums(objective: AnyObjective, batch: Batch) -> Sums:
    plain = cast(TransformerObjective, objective)
    length = batch["labels"].shape[1]
    x = plain.model.embedding(batch["inputs"], None, batch.get("positions"))
    scope = text_scope(length, batch.get("documents"), batch.get("prompt"))
    return _token_sums(plain, plain.model(x, Context(scope, plain.model.rotation(0, length))), batch)


def _token_sums(text: TextObjective | TransformerObjective, hidden: Tensor, batch: Batch) -> Sums:
    labels = batch["labels"]
    scored = score_tokens(hidden, text.model.lm_head.weight, labels, text.loss_kind)
    return {
        "loss": scored.loss.sum(),
        "hits": scored.hit.sum(),
        "tokens": (labels != IGNORE_LABEL).sum(),
        "bytes": batch["label_bytes"].sum(),
    }


def _text_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Nats per token, perplexity, bits per UTF-8 byte of the predicted text, token accuracy; halting's if it is on."""
    tokens = sums["tokens"]
    loss = sums["loss"] / tokens
    figures = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": sums["hits"] / tokens,
        "tokens": tokens,
    }
    if sums["bytes"] > 0:
        figures["bits_per_byte"] = sums["loss"] / math.log(2) / sums["bytes"]
    if "adaptive_loss" in sums:
        figures |= {"adaptive_loss": sums["adaptive_loss"] / tokens, "mean_segments": sums["segments"] / tokens}
    return figures


def _puzzle_sums(objective: AnyObjective, batch: Batch) -> Sums:
    """All segments of every puzzle; a row also has its answer at the first segment where q_halt > q_continue."""
    puzzle = cast(PuzzleObjective, objective)
    labels = batch["labels"]
    supervised = labels != IGNORE_LABEL
    counts = supervised.sum(-1)
    carry = puzzle.initial_carry(batch)
    stopped = torch.zeros(labels.shape[0], dtype=torch.bool, device=labels.device)
    stop_exact, stop_steps = torch.zeros_like(stopped), torch.zeros_like(counts)
    for segment in range(1, puzzle.model.config.halt_max_steps + 1):
        view = puzzle.think(batch, carry)
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
    """Per puzzle: loss and exact accuracy at the last segment, and both accuracy and segments when stopping by Q."""
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


def _text_names(objective: AnyObjective) -> list[str]:
    names = ["loss", "hits", "tokens", "bytes"]
    adaptive = isinstance(objective, TextObjective) and _reads_adaptively(objective)
    return names + (["adaptive_loss", "segments"] if adaptive else [])


def _puzzle_names(objective: AnyObjective) -> list[str]:
    return ["rows", "loss", "cells", "exact", "exact_q", "steps_q", "q_right"]


_SUMS: dict[type, Callable[[AnyObjective, Batch], Sums]] = {
    TextObjective: _text_sums,
    TransformerObjective: _transformer_sums,
    PuzzleObjective: _puzzle_sums,
}
_NAMES: dict[type, Callable[[AnyObjective], list[str]]] = {
    TextObjective: _text_names,
    TransformerObjective: _text_names,
    PuzzleObjective: _puzzle_names,
}
_FIGURES: dict[type, Callable[[Mapping[str, float]], dict[str, float]]] = {
    TextObjective: _text_figures,
    TransformerObjective: _text_figures,
    PuzzleObjective: _puzzle_figures,
}


def better(figures: Mapping[str, float], best: Mapping[str, Any] | None) -> bool:
    """Whether held-out `figures` beat the best so far: exact accuracy first for puzzles, then the lower loss.

    Figures that are not finite beat nothing, so that they are never what is kept as the best.
    """
    if not math.isfinite(figures["loss"]):
        return False
    if best is None:
        return True
    rank = (figures.get("exact_accuracy", 0.0), -figures["loss"])
    return rank > (best.get("exact_accuracy", 0.0), -best["loss"])
