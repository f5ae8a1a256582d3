"""Models and packed rows to train on whole and in chunks, and what comes of one step.

One job: draw the cases and compare the outcomes. What must agree is said in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.build import build_objective
from hrm_ray.model.chunked import ChunkCarry, Chunking
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.objective import AnyObjective, Batch
from hrm_ray.model.router_losses import RouterLosses
from hrm_ray.model.text_objective import TextCarry
from hrm_ray.model.transformer import Transformer
from hrm_ray.train.loop import weighted_loss
from hrm_ray.train.microbatch import wanted_columns
from tests.support.tiny_models import text_batch, tiny_config

NEAR = 2e-5


@dataclass(frozen=True)
class Shape:
    """A model and rows for it."""

    lengths: tuple[tuple[int, ...], ...]
    config: ModelConfig

    def batch(self, seed: int = 3) -> Batch:
        made = text_batch(seed, self.lengths)
        if all(len(row) == 1 for row in self.lengths):
            del made["documents"]
        return {name: column for name, column in made.items() if name in wanted_columns(self.config)}


@st.composite
def shapes(draw: st.DrawFn, transformer: bool = False) -> Shape:
    length = draw(st.integers(2, 14))
    cuts = st.lists(st.integers(1, length - 1), max_size=3, unique=True).map(sorted)
    rows = [[0, *draw(cuts), length] for _ in range(2)]
    lengths = tuple(tuple(stop - start for start, stop in pairwise(row)) for row in rows)
    h_cycles, l_cycles = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    positions, window = draw(st.sampled_from(["rope", "learned", "none"])), draw(st.none() | st.integers(1, length))
    if transformer:
        one_pass = {
            "arch": "transformer",
            "halt_max_steps": 1,
            "halt_rule": "none",
            "h_layers": draw(st.integers(1, 3)),
        }
        return Shape(lengths, tiny_config(seq_len=length, pos_encodings=positions, window_size=window, **one_pass))
    return Shape(
        lengths,
        tiny_config(
            seq_len=length,
            h_cycles=h_cycles,
            l_cycles=l_cycles,
            h_layers=draw(st.integers(1, 2)),
            l_layers=draw(st.integers(1, 2)),
            bp_steps=draw(st.integers(1, h_cycles * (l_cycles + 1))),
            halt_max_steps=draw(st.integers(1, 3)),
            window_size=window,
            pos_encodings=positions,
        ),
    )


@dataclass
class RunResult:
    """What training on one batch gives: the loss, each term's sum by name, gradients, and the final states."""

    loss: float
    terms: dict[str, float]
    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    z_h: Tensor


def trained(objective: AnyObjective, batch: Batch) -> RunResult:
    """All passes of one step, each with its own backward."""
    objective.zero_grad(set_to_none=True)
    carry = objective.initial_carry(batch)
    totals = {name: float(weight) for name, weight in objective.weights(batch, carry).items()}
    loss, terms, metrics = 0.0, dict[str, float](), dict[str, float]()
    for _ in range(objective.passes_per_step):
        output = objective(batch, carry)
        share = weighted_loss(output, totals)
        share.backward()
        loss += float(share.detach())
        for term in output.terms:
            terms[term.name] = terms.get(term.name, 0.0) + float(term.total.detach())
        for name, (total, _) in output.metrics.items():
            # Of a metric with several values every value counts, each in its own measure.
            measures = torch.arange(1, total.numel() + 1, device=total.device)
            metrics[name] = metrics.get(name, 0.0) + float((total.flatten() * measures).sum())
        carry = output.carry
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return RunResult(loss, terms, metrics, gradients, final_states(carry, batch["inputs"].shape[1]))


def final_states(carry: Any, length: int) -> Tensor:
    """z_H of the last segment; nothing for the transformer, which has no carry."""
    if isinstance(carry, TextCarry):
        return carry.states.z_h
    pieces: list[Tensor] = []
    if isinstance(carry, ChunkCarry):
        assert carry.states is not None
        while sum(piece.shape[1] for piece in pieces) < length:
            pieces.append(carry.states.z_h.get(len(pieces)))
    return torch.cat(pieces, dim=1) if pieces else torch.zeros(1)


ROUTER_LOSSES = RouterLosses(0.3, 0.01)


def whole(model: ActV1 | Transformer) -> AnyObjective:
    return build_objective(
        model, "softmax", supervision="rollout", halt_margin=0.01, router_losses=ROUTER_LOSSES
    ).train()


def in_chunks(model: ActV1 | Transformer, size: int, *, exact: bool) -> AnyObjective:
    return build_objective(
        model,
        "softmax",
        supervision="rollout",
        halt_margin=0.01,
        router_losses=ROUTER_LOSSES,
        chunking=Chunking(size, exact),
    ).train()


def gap(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value (a gradient that is rounding noise counts as 1e-2)."""
    return float((one - other).abs().max()) / max(float(other.abs().max()), 1e-2)


def assert_same_forward(got: RunResult, want: RunResult) -> None:
    assert got.loss == pytest.approx(want.loss, rel=NEAR)
    assert got.terms == pytest.approx(want.terms, rel=NEAR, abs=1e-6)
    assert got.metrics == pytest.approx(want.metrics, rel=NEAR, abs=1e-6)
    assert gap(got.z_h, want.z_h) <= NEAR


def assert_same_gradients(got: RunResult, want: RunResult) -> None:
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        assert gap(got.gradients[name], gradient) <= NEAR, name
