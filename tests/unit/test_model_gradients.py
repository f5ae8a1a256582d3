"""Outputs, losses and gradients of the objectives against a naive float64 model that is cut by hand.

Tolerance 1e-4 of a tensor's rms gradient (plus 1e-7): the model computes in float32 (rounding 6e-8) through up to 12
post-norm layers, each of which may amplify it by a small factor; measured gaps are below 1e-5.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_ray.model.build import build_objective
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.objective import AnyObjective, Batch
from hrm_ray.model.puzzle_objective import PuzzleObjective
from hrm_ray.model.router_losses import RouterLosses
from tests.support.naive_model import NaiveModel, cross_entropies, full_table, text_table
from tests.support.tiny_models import backward_all, puzzle_batch, text_batch, tiny_actv1, tiny_config, tiny_model

MARGIN = 0.01
ROUTERS = RouterLosses(balance=0.3, z=0.2)


def objective_of(config: ModelConfig, loss: str = "softmax", supervision: str = "rollout") -> AnyObjective:
    return build_objective(
        tiny_model(config),
        loss,
        supervision=supervision,
        halt_margin=MARGIN,  # type: ignore[arg-type]
        router_losses=ROUTERS,
    ).train()


def naive_router_loss(naive: NaiveModel) -> Tensor:
    """Of one row and segment: means over the routers whose update carries gradient."""
    if not naive.told:
        return torch.zeros((), dtype=torch.float64)
    balance = torch.stack([told.balance for told in naive.told]).mean()
    return ROUTERS.balance * balance + ROUTERS.z * torch.stack([told.z for told in naive.told]).mean()


def naive_text_loss(naive: NaiveModel, batch: Batch, kind: str) -> Tensor:
    """Section 13 with its weights written out: 1/M per segment of the token mean, 0.5/(M-1) per judged segment."""
    config = naive.config
    rows = batch["inputs"].shape[0]
    valid = int((batch["labels"] >= 0).sum())
    segments = config.halt_max_steps
    total = torch.zeros((), dtype=torch.float64)
    for row in range(rows):
        inputs, labels = batch["inputs"][row], batch["labels"][row].tolist()
        prompt = batch["prompt"][row].tolist() if "prompt" in batch else [False] * len(inputs)
        allowed = text_table(batch["documents"][row].tolist(), prompt)
        state = naive.start(len(inputs))
        earlier: list[Tensor | None] = [None] * len(labels)
        naive.counted = 1 + max(place for place, label in enumerate(labels) if label >= 0)
        for _ in range(segments):
            came_in = state.z_h.detach()
            state = naive.segment(state, naive.embed(inputs, batch["positions"][row]), allowed)
            total = total + naive_router_loss(naive) / rows / segments
            losses = cross_entropies(naive.logits(state), labels, kind)
            for place, loss in enumerate(losses):
                if loss is None:
                    continue
                total = total + loss / valid / segments
                before = earlier[place]
                if before is not None and config.halt_rule == "gain" and config.arch == "actv1":
                    target = 1.0 if float(loss.detach()) >= float(before) - MARGIN else 0.0
                    chance = torch.sigmoid(naive.q(came_in[place])[0])
                    judged = -(target * torch.log(chance) + (1 - target) * torch.log(1 - chance))
                    total = total + 0.5 * judged / valid / (segments - 1)
            earlier = [None if loss is None else loss.detach() for loss in losses]
    return total


def assert_same_gradients(objective: AnyObjective, naive: NaiveModel) -> None:
    for name, parameter in objective.model.named_parameters():
        theirs = naive.weights[name].grad
        assert parameter.grad is not None, f"{name} has no gradient"
        theirs = torch.zeros_like(parameter, dtype=torch.float64) if theirs is None else theirs
        rms = float(theirs.square().mean().sqrt())
        gap = float((parameter.grad.double() - theirs).abs().max())
        assert gap <= 1e-4 * rms + 1e-7, f"{name}: {gap} at rms {rms}"


TEXT_CASES: dict[str, dict[str, Any]] = {
    "reference rule": {},
    "one update": {"bp_steps": 1},
    "three updates": {"bp_steps": 3},
    "all updates": {"bp_steps": 6},
    "all updates, one cycle": {"h_cycles": 1, "l_cycles": 1, "bp_steps": 2, "h_layers": 2},
    "one segment": {"halt_max_steps": 1},
    "three segments": {"halt_max_steps": 3, "l_layers": 2},
    "no halting": {"halt_rule": "none", "halt_max_steps": 3},
    "learned positions": {"pos_encodings": "learned", "bp_steps": 4},
    "no positions": {"pos_encodings": "none"},
    "prefix": {"lm_mask": "prefix", "halt_max_steps": 3},
    "transformer": {"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none", "h_layers": 2},
    "gelu": {"activation": "gelu"},
    "relu, no gate": {"activation": "relu", "swiglu": False, "bp_steps": 4},
    "silu, no gate": {"swiglu": False},
    "layer norm": {"rmsnorm": False, "bp_steps": 6},
    "layer norm, one update": {"rmsnorm": False, "bp_steps": 1},
    "experts": {"num_experts": 4},
    "experts, drops, all updates": {"num_experts": 5, "moe_capacity_factor": 0.7, "bp_steps": 6, "l_layers": 2},
    "experts, one chosen, one update": {"num_experts": 4, "num_experts_per_tok": 1, "bp_steps": 1},
    "experts, no gate, prefix": {"num_experts": 3, "num_experts_per_tok": 3, "swiglu": False, "lm_mask": "prefix"},
    "experts in a transformer": {
        **{"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none", "num_experts": 4},
        **{"activation": "gelu", "moe_capacity_factor": 0.9},
    },
    "transformer with layer norm and gelu": {
        **{"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none"},
        **{"rmsnorm": False, "activation": "gelu", "swiglu": False},
    },
}


@pytest.mark.parametrize("loss", ["softmax", "stablemax"])
@pytest.mark.parametrize("case", TEXT_CASES)
def test_text_loss_and_gradients(case: str, loss: str) -> None:
    config = tiny_config(**TEXT_CASES[case])
    objective = objective_of(config, loss)
    batch = text_batch(5, [[7, 3, 2], [12], [4, 8]], prompts=[3, 5, 1] if "prefix" in case else None)
    naive = NaiveModel(objective.model)
    want = naive_text_loss(naive, batch, loss)
    # One backward over the naive sum is the sum over segments, because its carry is detached by hand.
    want.backward()
    assert backward_all(objective, batch) == pytest.approx(float(want.detach()), rel=2e-6)
    assert_same_gradients(objective, naive)


def test_token_embedding_learns_through_the_last_l_update() -> None:
    """At bp_steps 2 the embedding has the gradient of x in the last L update alone; at 1 it has only zeros."""
    config = tiny_config(halt_max_steps=1, halt_rule="none")
    batch = text_batch(5, [[12], [4, 8]])
    two, three = objective_of(config), objective_of(tiny_config(halt_max_steps=1, halt_rule="none", bp_steps=6))
    backward_all(two, batch)
    backward_all(three, batch)
    weight = two.model.embedding.embed_tokens.weight.grad
    assert weight is not None and float(weight.abs().max()) > 1e-4
    other = three.model.embedding.embed_tokens.weight.grad
    assert other is not None and not torch.allclose(weight, other, rtol=1e-2)
    one = objective_of(tiny_config(halt_max_steps=1, halt_rule="none", bp_steps=1))
    backward_all(one, batch)
    for name, parameter in one.model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(("embedding.", "L_level.", "q_head.")):
            assert not parameter.grad.any(), name
        else:
            assert parameter.grad.any(), name


def naive_puzzle_step(
    naive: NaiveModel, batch: Batch, states: list[Any], steps: list[int], loss: str, active: list[bool]
) -> tuple[Tensor, list[Any]]:
    """One ACT step on rows that go on: sums of sections 6.4 and 7, not yet divided; the new states."""
    config = naive.config
    total = torch.zeros((), dtype=torch.float64)
    after = []
    for row, state in enumerate(states):
        x = naive.embed(batch["inputs"][row], None, int(batch["puzzle_identifiers"][row]))
        allowed = full_table(len(x))
        new = naive.segment(state, x, allowed)
        after.append(new)
        if not active[row]:
            continue
        labels = batch["labels"][row].tolist()
        logits = naive.logits(new)
        losses = [value for value in cross_entropies(logits, labels, loss) if value is not None]
        total = total + sum(losses, torch.zeros(())) / len(losses)
        total = total + naive_router_loss(naive)
        right = all(int(s.argmax()) == label for s, label in zip(logits, labels, strict=True) if label >= 0)
        q = naive.q(new.z_h[0])
        bce = F.binary_cross_entropy_with_logits
        total = total + 0.5 * bce(q[0], torch.tensor(float(right), dtype=torch.float64))
        if config.halt_max_steps > 1:
            with torch.no_grad():
                ahead = naive.q(naive.segment(new, x, allowed).z_h[0])
                target = torch.sigmoid(ahead[0] if steps[row] >= config.halt_max_steps else ahead.max())
            total = total + 0.5 * bce(q[1], target)
    return total, after


PUZZLE_CASES: dict[str, dict[str, Any]] = {
    "no embedding": {},
    "learned positions": {"pos_encodings": "learned"},
    "narrow embedding": {"puzzle_emb_ndim": 10, "num_puzzle_identifiers": 4},
    "wide embedding": {"puzzle_emb_ndim": 40, "num_puzzle_identifiers": 4, "bp_steps": 6},
    "one segment": {"halt_max_steps": 1, "puzzle_emb_ndim": 16, "num_puzzle_identifiers": 2},
    "one update": {"bp_steps": 1, "puzzle_emb_ndim": 10, "num_puzzle_identifiers": 4},
    "experts": {"num_experts": 4, "moe_capacity_factor": 0.8, "puzzle_emb_ndim": 10, "num_puzzle_identifiers": 4},
    "experts, no embedding": {"num_experts": 8, "bp_steps": 6},
}


@pytest.mark.parametrize("loss", ["softmax", "stablemax"])
@pytest.mark.parametrize("supervision", ["segment", "rollout"])
@pytest.mark.parametrize("case", PUZZLE_CASES)
def test_puzzle_loss_and_gradients(case: str, supervision: str, loss: str) -> None:
    """Rollout over all segments, or the first carried one; one idle row among them, which adds nothing."""
    config = tiny_config(**({"task": "puzzle", "seq_len": 6, "halt_max_steps": 3} | PUZZLE_CASES[case]))
    objective = objective_of(config, loss, supervision)
    batch = puzzle_batch(2, 3, config)
    batch["active"][1] = False
    batch["labels"][1] = -100
    naive = NaiveModel(objective.model)
    states = [naive.start(config.total_positions) for _ in range(3)]
    segments = config.halt_max_steps if supervision == "rollout" else 1
    want = torch.zeros((), dtype=torch.float64)
    for segment in range(1, segments + 1):
        part, states = naive_puzzle_step(naive, batch, states, [segment] * 3, loss, [True, False, True])
        want = want + part / (2 * segments)
    want.backward()
    assert backward_all(objective, batch) == pytest.approx(float(want.detach()), rel=2e-6)
    assert_same_gradients(objective, naive)
    if config.puzzle_emb_ndim:
        assert_same_puzzle_rows(objective, naive)


def assert_same_puzzle_rows(objective: AnyObjective, naive: NaiveModel) -> None:
    """What the passes took from the table, summed by identifier; an idle row's identifier is not among it."""
    table = objective.model.embedding.puzzle_emb
    assert table is not None
    ours = torch.zeros_like(table.weights, dtype=torch.float64)
    for taken in table.taken:
        used = taken.used()
        assert used is not None and used[0].shape[0] == 2
        ours.index_add_(0, used[0].long(), used[1].double())
    theirs = naive.weights["embedding.puzzle_emb.weights"].grad
    theirs = torch.zeros_like(ours) if theirs is None else theirs
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.square().mean().sqrt()) + 1e-7


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor of a carry or an output, however deep."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [t for f in fields(value) for t in tensors_of(getattr(value, f.name))]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_of(item)]
    if isinstance(value, tuple | list):
        return [t for item in value for t in tensors_of(item)]
    return []


@pytest.mark.parametrize("bp_steps", [1, 2, 6])
@pytest.mark.parametrize("mode", ["text", "segment", "rollout"])
def test_no_graph_survives_a_segment(mode: str, bp_steps: int) -> None:
    """Neither the carry nor the metrics hold on to a graph, so memory does not grow with the segments."""
    task = "lm" if mode == "text" else "puzzle"
    config = tiny_config(task=task, bp_steps=bp_steps, halt_max_steps=3)
    objective = objective_of(config, supervision="segment" if mode == "segment" else "rollout")
    batch = text_batch(1, [[5, 7]]) if mode == "text" else puzzle_batch(1, 2, config)
    carry = objective.initial_carry(batch)
    for _ in range(2):
        output = objective(batch, carry)
        carry = output.carry
        assert any(term.total.requires_grad for term in output.terms)
        held = tensors_of(carry) + tensors_of(output.metrics)
        assert len(held) >= 3
        assert not any(tensor.requires_grad for tensor in held)


def test_look_ahead_and_carry_bring_no_gradient() -> None:
    """A second carried step has the gradient of its own segment only: its states enter as constants."""
    config = tiny_config(task="puzzle", seq_len=6, halt_max_steps=3)
    model = tiny_actv1(config)
    with torch.no_grad():
        model.q_head.bias[0] = -9.0  # nobody halts early
        model.q_head.bias[1] = 9.0
    objective = PuzzleObjective(model, "softmax", rollout=False).train()
    batch = puzzle_batch(4, 2, config)
    carry = objective(batch, objective.initial_carry(batch)).carry
    naive = NaiveModel(model)
    states = [naive.start(6) for _ in range(2)]
    with torch.no_grad():
        _, states = naive_puzzle_step(naive, batch, states, [1, 1], "softmax", [True, True])
    want, _ = naive_puzzle_step(naive, batch, states, [2, 2], "softmax", [True, True])
    want.backward()
    objective.zero_grad(set_to_none=True)
    output = objective(batch, carry)
    total = sum((term.coefficient * term.total for term in output.terms), torch.zeros(()))
    total.backward()
    assert float(total.detach()) == pytest.approx(float(want.detach()), rel=2e-6)
    assert_same_gradients(objective, naive)


@pytest.mark.parametrize("mode", ["text", "transformer", "segment", "rollout"])
def test_a_micro_batch_without_work_has_gradients_of_zero(mode: str) -> None:
    """What a rank or the last micro-batch may get: no label or only idle slots. Nothing is None, nothing is NaN."""
    if mode in ("text", "transformer"):
        config = tiny_config(**(TEXT_CASES["transformer"] if mode == "transformer" else {}))
        batch = text_batch(1, [[5, 7], [12]])
    else:
        config = tiny_config(task="puzzle", seq_len=6, puzzle_emb_ndim=10, num_puzzle_identifiers=4)
        batch = puzzle_batch(1, 2, config)
    batch["labels"][:], batch["active"][:] = -100, False
    objective = objective_of(config, supervision="segment" if mode == "segment" else "rollout")
    assert backward_all(objective, batch) == 0.0
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
