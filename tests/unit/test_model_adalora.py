"""AdaLoRA: ranks go as planned, the least important first; its state survives a file, its loss counts once a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hrm_ray.bundle.weights_file import read_tensors, save_tensors
from hrm_ray.model.build import build_objective
from hrm_ray.model.objective import AnyObjective, Batch, Regulariser, regularise
from hrm_ray.model.transforms.adalora import RankPlan, RankSchedule
from hrm_ray.model.transforms.peft import Adapters, apply_peft
from hrm_ray.settings.adapt import AdaptSettings
from hrm_ray.train.loop import weighted_loss
from tests.support.tiny_models import backward_all, puzzle_batch, text_batch, tiny_config, tiny_model

STEPS = 20
LAYERS = 4
BATCH = text_batch(0, [[12], [5, 7]])


def adapted(rank: int = 4, total_steps: int = STEPS) -> tuple[nn.Module, Adapters, RankSchedule]:
    model = tiny_model(tiny_config())
    settings = AdaptSettings(use_peft=True, peft_method="adalora", lora_r=rank, lora_dropout=0.0)
    adapters = apply_peft(model, settings, seed=0, total_steps=total_steps)
    assert adapters.ranks is not None
    return model, adapters, adapters.ranks


def trainer(model: nn.Module, ranks: RankSchedule) -> Any:
    objective = build_objective(model, "softmax", supervision="rollout", halt_margin=0.01)  # type: ignore[arg-type]
    regularise(objective, ranks.regulariser())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    optimizer.register_step_post_hook(lambda *_: ranks.after_update())

    def step() -> float:
        loss = backward_all(objective.train(), BATCH)
        optimizer.step()
        return loss

    return step


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_E" in name}


@given(st.integers(1, 5000), st.integers(1, 300))
def test_a_plan_fits_every_length(total_steps: int, rank: int) -> None:
    """There is always a step at which ranks go, and always a rank that can go."""
    plan = RankPlan.over(total_steps, rank)
    assert plan.warmup_steps < plan.total_steps - plan.final_steps
    assert plan.first_rank > plan.last_rank == rank
    assert plan.interval_steps >= 1


def test_the_ranks_go_as_planned() -> None:
    """Cubic from 6 a layer to 4 between steps 2 and 16 (Zhang et al. 2023, equation 12), all together; then they stay.
    What is masked is zero."""
    model, _, ranks = adapted()
    step = trainer(model, ranks)
    for number in range(1, STEPS + 5):
        step()
        left = 1 - (number - 2) / (16 - 2)
        budget = 6 * LAYERS if number <= 2 else int(2 * LAYERS * left**3 + 4 * LAYERS) if number < 16 else 4 * LAYERS
        assert float(ranks.mean_rank()) == budget / LAYERS, number
        run_lock = sum(int(value.ne(0).sum()) for value in values(model).values())
        assert run_lock == budget, number
        assert ranks.settled == (number >= 16)


def test_the_least_important_go_first() -> None:
    """A rank whose singular value and factors get no gradient has no importance: those are the masked ones."""
    model, _, ranks = adapted()
    useless = {name: [1, 4] for name in values(model)}
    step = trainer(model, ranks)

    def silence(*_: Any) -> None:
        for name, parameter in model.named_parameters():
            for kind in ("lora_A", "lora_B", "lora_E"):
                if kind in name and parameter.grad is not None:
                    rows = useless[name.replace(kind, "lora_E")]
                    (parameter.grad if kind != "lora_B" else parameter.grad.T)[rows] = 0

    hooks = [p.register_post_accumulate_grad_hook(silence) for n, p in model.named_parameters() if "lora_" in n]
    for _ in range(16):
        step()
    for name, value in values(model).items():
        assert value.flatten().eq(0).nonzero().flatten().tolist() == [1, 4], name
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("at", [1, 7, 16, 18])
def test_its_state_survives_a_file(at: int, tmp_path: Path) -> None:
    """In the warm-up, among the masks, when they are settled and after: the rest of the run is the same to the bit."""
    model, _, ranks = adapted()
    step = trainer(model, ranks)
    for _ in range(at):
        step()
    save_tensors(ranks.state(), tmp_path / "ranks.safetensors")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = [step() for _ in range(STEPS + 2 - at)]
    again, adapters, its_ranks = adapted()
    again.load_state_dict(weights)
    stored = read_tensors(tmp_path / "ranks.safetensors")
    its_ranks.load(stored)
    assert its_ranks.state().keys() == stored.keys() and len(stored) == 3 + (3 * 3 * LAYERS if at < 16 else 0)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in its_ranks.state().items())
    its_step = trainer(again, its_ranks)
    assert [its_step() for _ in range(STEPS + 2 - at)] == losses
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert adapters.in_file()[0]["rank_pattern"] == {
        name.replace(".default", ""): mask for name, mask in ranks.tuner.peft_config["default"].rank_pattern.items()
    }


@pytest.mark.parametrize("at", [1, 7, 16, 18])
@pytest.mark.parametrize("longer", [5 * STEPS, STEPS // 2])
def test_a_schedule_is_kept_in_a_longer_run(at: int, longer: int) -> None:
    """Resumed under a plan of another length: masks, weights and the arguments of peft are those of the run
    that went on, and ranks that had settled stay so."""
    model, _, ranks = adapted()
    step = trainer(model, ranks)
    for _ in range(at):
        step()
    stored = {name: tensor.clone() for name, tensor in ranks.state().items()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again, adapters, its_ranks = adapted(total_steps=longer)
    again.load_state_dict(weights)
    its_ranks.load(stored)
    assert its_ranks.plan == ranks.plan and its_ranks.settled == ranks.settled
    its_step = trainer(again, its_ranks)
    for _ in range(STEPS + 2 - at):
        assert its_step() == step()
        assert its_ranks.settled == ranks.settled and float(its_ranks.mean_rank()) == float(ranks.mean_rank())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert adapters.in_file()[0]["total_step"] == STEPS
    assert its_ranks.state()["total_steps"] == STEPS, "kept for the next time too"


def test_disorder_by_hand() -> None:
    model, _, ranks = adapted(rank=2)
    distances = []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    for name, parameter in model.named_parameters():
        factor = parameter.detach().double()
        if "lora_B" in name:
            factor = factor.T
        if "lora_A" in name or "lora_B" in name:
            distances.append((factor @ factor.T - torch.eye(len(factor))).square().sum().sqrt())
    assert len(distances) == 2 * LAYERS
    assert float(ranks.disorder().detach()) == pytest.approx(float(torch.stack(distances).mean()), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(ranks.disorder().detach()) == pytest.approx(float(torch.stack(distances).mean()), rel=1e-5)


def text_objective(changes: dict[str, Any]) -> AnyObjective:
    return build_objective(tiny_model(tiny_config(**changes)), "softmax", supervision="rollout", halt_margin=0.01)


def puzzle_objective(supervision: str) -> AnyObjective:
    model = tiny_model(tiny_config(task="puzzle", halt_max_steps=3))
    return build_objective(model, "softmax", supervision=supervision, halt_margin=0.0)


OBJECTIVES = {
    "text": lambda: text_objective({"halt_max_steps": 3}),
    "transformer": lambda: text_objective({"arch": "transformer", "halt_max_steps": 1}),
    "carried puzzle": lambda: puzzle_objective("segment"),
    "rolled out puzzle": lambda: puzzle_objective("rollout"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_of_the_weights_counts_once_a_step(name: str) -> None:
    """Six rows at once, in threes, in unequal parts with padding rows: coefficient times loss, and its gradient, once.
    Float32 sums of three or nine parts."""
    objective = OBJECTIVES[name]().train()
    weight = objective.model.lm_head.weight
    regulariser = Regulariser("size", 0.25, lambda: weight.square().sum(), lambda: {"rows": weight.new_tensor(3.0)})
    config = objective.model.config
    whole = puzzle_batch(0, 6, config) if config.task == "puzzle" else text_batch(0, [[12]] * 6)
    padded = [*range(4), -1, 4, 5, -1]
    cuts = [[list(range(6))], [[0, 1, 2], [3, 4, 5]], [padded[:5], padded[5:]]]
    without = [sum(total(objective, whole, cut)[0]) for cut in cuts]
    regularise(objective, regulariser)
    expected = 0.25 * float(weight.detach().square().sum())
    for cut, plain in zip(cuts, without, strict=True):
        losses, metrics = total(objective, whole, cut)
        assert sum(losses) - plain == pytest.approx(expected, rel=1e-5)
        assert metrics["size"] == pytest.approx(expected / 0.25) and metrics["rows"] == 3.0
    objective.zero_grad()
    total(objective, whole, cuts[2])
    with_term = weight.grad
    assert with_term is not None
    gradient = with_term.clone()
    objective._forward_hooks.clear()
    objective.zero_grad()
    total(objective, whole, cuts[2])
    assert weight.grad is not None
    torch.testing.assert_close(gradient - weight.grad, 0.5 * weight.detach(), rtol=1e-4, atol=1e-5)


def total(objective: AnyObjective, whole: Batch, cut: list[list[int]]) -> tuple[list[float], dict[str, float]]:
    """The loop's parts of the loss for micro-batches of these rows (-1: padding), and the last pass's metrics."""
    batches = [{name: pick(name, values, rows) for name, values in whole.items()} for rows in cut]
    carries = [objective.initial_carry(batch) for batch in batches]
    shares = [objective.weights(batch, carry) for batch, carry in zip(batches, carries, strict=True)]
    totals = {name: float(sum(share[name] for share in shares)) for name in shares[0]}
    losses, metrics = [], {}
    for batch, carry in zip(batches, carries, strict=True):
        for _ in range(objective.passes_per_step):
            output = objective(batch, carry)
            loss = weighted_loss(output, totals)
            loss.backward()
            losses.append(float(loss.detach()))
            carry = output.carry
            metrics = {name: float(a.sum() / b) for name, (a, b) in output.metrics.items() if b > 0}
    return losses, metrics


def pick(name: str, column: Tensor, rows: list[int]) -> Tensor:
    fill = {"labels": -100, "active": False}.get(name, 0)
    return torch.stack([column[row] if row >= 0 else torch.full_like(column[0], fill) for row in rows])
