"""Variants of the block: dropout, and where norms and activations show besides their gradients.

The gradients themselves are held against the naive model in test_model_gradients.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hrm_ray.inference.puzzle import solve
from hrm_ray.inference.text import DecodingSession
from hrm_ray.model import dropout as dropping
from hrm_ray.model.build import build_model, build_objective
from hrm_ray.model.config import ModelConfig, model_config
from hrm_ray.model.layers import Block, Context, LayerNorm
from hrm_ray.model.objective import AnyObjective
from hrm_ray.model.scope import CAUSAL, FULL
from hrm_ray.model.transforms.activation_checkpointing import apply_activation_checkpointing
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.train.assemble import assemble
from hrm_ray.train.evaluate import EvalSet, evaluate
from hrm_ray.train.world import World
from tests.support.splits import Rows
from tests.support.tiny_models import (
    backward_all,
    drawing,
    puzzle_batch,
    text_batch,
    tiny_actv1,
    tiny_config,
    tiny_model,
)

WORLD = World(0, 1, torch.device("cpu"), grouped=False)


def objective_of(config: ModelConfig) -> AnyObjective:
    supervision = "rollout" if config.task == "lm" else "segment"
    return build_objective(tiny_model(config), "softmax", supervision=supervision, halt_margin=0.01).train()


@contextmanager
def watched_dropout(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, float]]]:
    """For every call of dropout that is to act: whether a graph was kept, and the share of values set to 0."""
    seen: list[tuple[bool, float]] = []
    genuine = dropping.dropout

    def watching(x: Tensor, keys: Tensor, rate: float) -> Tensor:
        result = genuine(x, keys, rate)
        seen.append((torch.is_grad_enabled(), float((result == 0).float().mean())))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(dropping, "dropout", watching)
        yield seen


def test_dropout_acts_on_both_branches_of_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six updates of one layer have two branches each, in two segments; the last two updates keep a graph."""
    objective = objective_of(tiny_config(dropout_rate=0.25))
    with watched_dropout(monkeypatch) as seen:
        backward_all(objective, drawing(text_batch(0, [[12]] * 8)))
    assert [graph for graph, _ in seen] == ([False] * 8 + [True] * 4) * 2
    # 36864 values at a rate of 1/4: a standard deviation of 0.0023.
    assert sum(share for _, share in seen) / len(seen) == pytest.approx(0.25, abs=0.012)


def test_the_look_ahead_of_a_puzzle_has_dropout_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(task="puzzle", dropout_rate=0.25)
    objective = objective_of(config)
    batch = drawing(puzzle_batch(0, 4, config))
    with watched_dropout(monkeypatch) as seen:
        objective(batch, objective.initial_carry(batch))
    assert len(seen) == 2 * 12


def test_nothing_is_dropped_outside_training() -> None:
    """Evaluation, generation and solving give the numbers of a model without dropout, to the bit."""
    with_it, without = tiny_actv1(tiny_config(dropout_rate=0.9)), tiny_actv1(tiny_config())
    told = [DecodingSession(model.eval(), adaptive=False).read([1, 2, 3])[0] for model in (with_it, without)]
    assert torch.equal(*told)
    samples = WithBytes(Rows("lm"))
    figures = [
        evaluate(
            build_objective(
                tiny_model(tiny_config(dropout_rate=rate)), "softmax", supervision="rollout", halt_margin=0
            ),
            EvalSet(samples, 8, 2),
            WORLD,
        )
        for rate in (0.9, 0.0)
    ]
    assert figures[0] == figures[1]
    puzzles = [tiny_config(task="puzzle", dropout_rate=rate) for rate in (0.9, 0.0)]
    batch = puzzle_batch(0, 5, puzzles[0])
    inputs, identifiers = batch["inputs"].numpy(), batch["puzzle_identifiers"].numpy()
    answers = [solve(tiny_actv1(config).eval(), inputs, identifiers, stop_by_q=True) for config in puzzles]
    assert (answers[0].tokens == answers[1].tokens).all() and (answers[0].segments == answers[1].segments).all()


class WithBytes:
    """Rows with the column that evaluation reads besides."""

    def __init__(self, rows: Rows) -> None:
        self.own = rows

    def __len__(self) -> int:
        return len(self.own)

    def rows(self, indices: Any) -> Any:
        columns = self.own.rows(indices)
        return columns | {"label_bytes": (columns["labels"] >= 0).astype("int32")}


@pytest.mark.parametrize("task", ["lm", "puzzle"])
def test_recomputed_blocks_draw_the_same_masks(task: str) -> None:
    """Gradient checkpointing computes a block again with what it drew the first time: bit for bit."""
    config = tiny_config(task=task, dropout_rate=0.4, bp_steps=6, h_layers=2)
    batch = drawing(text_batch(3, [[12], [5, 7]]) if task == "lm" else puzzle_batch(3, 2, config))
    gradients = []
    for recompute in (False, True):
        objective = objective_of(config)
        if recompute:
            apply_activation_checkpointing(objective.model)
        backward_all(objective, batch)
        gradients.append([p.grad for p in objective.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert kept is not None and recomputed is not None and torch.equal(kept, recomputed)


def losses(**changes: Any) -> list[float]:
    """Two steps of a run's loop on the same rows."""
    words = {"--hidden-size": "16", "--num-heads": "2", "--num-layers": "2", "--d-ff": "24", "--no-amp": True}
    words |= {"--dropout-rate": "0.5", "--batch-size": "4"} | changes
    settings = resolve_task(load_settings(words), "lm")
    config = model_config(settings, 17, seq_len=12)
    loop = assemble(settings, config, Rows("lm"), WORLD, 10)
    found = []
    for _ in range(2):
        loop.parts.loader.load_state_dict(0, {"taken": torch.zeros(1, dtype=torch.long).numpy()})
        loop.step()
        found.append(loop.flush_metrics()["objective"])
        # What anybody draws between steps does not matter.
        torch.rand(3)
    return found


def test_masks_follow_from_seed_and_step() -> None:
    first = losses()
    assert losses() == first
    assert losses(**{"--seed": "1"})[0] != first[0]
    assert first[0] != first[1]


@pytest.mark.parametrize("arch", ["actv1", "transformer"])
def test_layer_norms_start_as_the_identity_of_normed_values(arch: str) -> None:
    model = build_model(tiny_config(rmsnorm=False, arch=arch, halt_max_steps=1))
    model.initialise(3)
    found = {name: p for name, p in model.named_parameters() if "norm." in name}
    assert len(found) == 8 and {name.rsplit(".", 1)[1] for name in found} == {"weight", "bias"}
    for name, parameter in found.items():
        assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all()


def test_other_parameters_start_from_the_same_draws() -> None:
    """A variant leaves the starting values of what it shares with the reference alone."""
    base, normed = build_model(tiny_config()), build_model(tiny_config(rmsnorm=False))
    base.initialise(5)
    normed.initialise(5)
    theirs = dict(normed.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in base.named_parameters())


def test_layer_norm_is_computed_in_float32() -> None:
    config = tiny_config(rmsnorm=False, forward_dtype="bfloat16")
    model = tiny_actv1(config)
    x = model.embedding(torch.arange(12).unsqueeze(0), None, None)
    norm = cast(LayerNorm, cast(Block, model.H_level.layers[0]).attn_norm)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    out = norm(x)
    assert out.dtype == torch.bfloat16
    wide = x.float()
    want = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(out.float(), want * norm.weight, rtol=2**-8, atol=1e-4)
    states = model.segment(model.initial_states(1, 12), x, Context(CAUSAL, model.rotation(0, 12)))
    assert states.z_h.dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("swiglu", [True, False])
def test_writing_over_inner_values_changes_no_number(activation: str, swiglu: bool) -> None:
    """Updates without a graph take another way through the FFN."""
    model = tiny_actv1(tiny_config(activation=activation, swiglu=swiglu))
    context = Context(FULL, None)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    kept = x.clone()
    with_graph = model.H_level(x, None, context)
    with torch.no_grad():
        without = model.H_level(x, None, context)
    assert torch.equal(with_graph, without) and torch.equal(x, kept)
