"""Holds the model, the losses, the gradients and twenty weight updates against the reference's numbers.

Every `*.json` fixture of the folder named by HRM_RAY_FIXTURES (default: tests/fixtures) is checked as far as it offers.
Tolerances are the strict ones that the fixtures state under `how_to_check`, where the reference's own noise is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hrm_ray.model.import_reference import from_reference, split_fused
from hrm_ray.model.puzzle_objective import PuzzleObjective, PuzzleView
from hrm_ray.settings.optimizer import OptimizerSettings
from hrm_ray.train.loaders import BatchLoader, BatchSize
from hrm_ray.train.loop import TrainingLoop, TrainState
from hrm_ray.train.microbatch import wanted_columns
from hrm_ray.train.optimizers import SparseSignSGD, builder
from hrm_ray.train.precision import Precision
from hrm_ray.train.schedules import LrSchedule, Schedule
from hrm_ray.train.strategies import SingleStrategy
from hrm_ray.train.world import World
from hrm_ray.types import Columns
from tests.support.fixtures import Fixture, discover

LOSSES = {"softmax_cross_entropy": "softmax", "stablemax_cross_entropy": "stablemax"}
LOSS_NAMES = {"lm_loss": "segment_loss", "q_halt_loss": "q_halt_loss", "q_continue_loss": "q_continue_loss"}
METRICS = {
    "accuracy": "cell_accuracy",
    "exact_accuracy": "exact_accuracy",
    "q_halt_accuracy": "q_halt_accuracy",
    "steps": "act_steps",
}


@pytest.fixture(params=discover(), ids=lambda path: path.stem)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    torch.set_num_threads(1)
    return Fixture.open(request.param)


def objective_of(fixture: Fixture, loss: str, train: bool) -> PuzzleObjective:
    objective = PuzzleObjective(fixture.model(), LOSSES[loss], rollout=False)
    return objective.train(train)


def worst(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max())


def check_step(view: PuzzleView, want: dict[str, Tensor], number: int) -> None:
    """Strict tolerances: step 1 tells a wrong formula, later steps have the carry's own growth of rounding."""
    first = number == 1
    prefix = f"step{number}."
    floats = {
        "logits": (view.logits, 8e-6 if first else 3e-4),
        "z_H": (view.carry.states.z_h, 1.2e-5 if first else 3e-4),
        "z_L": (view.carry.states.z_l, 1.2e-5 if first else 3e-4),
        "q_halt_logits": (view.q_halt, 3e-6 if first else 1e-4),
        "q_continue_logits": (view.q_continue, 3e-6 if first else 1e-4),
    }
    if f"{prefix}target_q_continue" in want:
        assert view.target_q_continue is not None
        floats["target_q_continue"] = (view.target_q_continue, 5e-5)
    else:
        assert view.target_q_continue is None
    for name, (ours, tolerance) in floats.items():
        assert worst(ours, want[prefix + name]) <= tolerance, f"step {number} {name}"
    assert torch.equal(view.carry.steps, want[f"{prefix}steps"])
    assert torch.equal(view.carry.halted, want[f"{prefix}halted"])
    for name in ("inputs", "labels", "puzzle_identifiers"):
        assert torch.equal(view.carry.data[name], want[f"{prefix}current_data.{name}"])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_outputs_over_consecutive_steps(fixture: Fixture, mode: str) -> None:
    part = f"steps_{mode}"
    if not fixture.offers(part):
        pytest.skip(f"{fixture.about['name']} offers no {part}")
    objective = objective_of(fixture, "softmax_cross_entropy", mode == "train")
    want = fixture.tensors(part)
    numbers = [row["step"] for row in fixture.about[part]]
    carry = objective.initial_carry(fixture.batch(1))
    with torch.no_grad():
        for number in numbers:
            view = objective.segment(fixture.batch(number), carry)
            check_step(view, want, number)
            carry = view.carry


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_losses_and_metrics(fixture: Fixture, mode: str, loss: str) -> None:
    part = f"steps_{mode}"
    if not fixture.offers(part):
        pytest.skip(f"{fixture.about['name']} offers no {part}")
    objective = objective_of(fixture, loss, mode == "train")
    carry = objective.initial_carry(fixture.batch(1))
    with torch.no_grad():
        for row in fixture.about[part]:
            output = objective(fixture.batch(row["step"]), carry)
            carry = output.carry
            want = row[loss]
            totals = {term.name: float(term.total) for term in output.terms}
            total = sum(term.coefficient * float(term.total) for term in output.terms)
            for theirs, ours in LOSS_NAMES.items():
                assert (ours in totals) == (theirs in want)
                if theirs in want:
                    assert totals[ours] == pytest.approx(want[theirs], rel=2e-6)
            assert total == pytest.approx(want["total_loss"], rel=2e-6)
            check_metrics(output.metrics, want)


def check_metrics(metrics: dict[str, tuple[Tensor, Tensor]], want: dict[str, Any]) -> None:
    """Counts and decisions are equal; the token accuracy is a float sum and may differ by rounding."""
    assert float(metrics["cell_accuracy"][1]) == want["count"]
    for theirs, ours in METRICS.items():
        tolerance = 1e-6 if theirs == "accuracy" else 0.0
        assert float(metrics[ours][0]) == pytest.approx(want[theirs], abs=tolerance)


@pytest.mark.parametrize("part", ["grads_a", "grads_b"])
def test_gradients(fixture: Fixture, part: str) -> None:
    if not fixture.offers(part):
        pytest.skip(f"{fixture.about['name']} offers no {part}")
    about = fixture.about[part]
    objective = objective_of(fixture, about["loss_type"], train=True)
    carry = objective.initial_carry(fixture.batch(1))
    with torch.no_grad():
        for number in range(1, about["at_step"]):
            carry = objective.segment(fixture.batch(number), carry).carry
    output = objective(fixture.batch(about["at_step"]), carry)
    total = sum(term.coefficient * term.total for term in output.terms)
    assert float(total.detach()) == pytest.approx(about["total_loss"], rel=2e-6)
    total.backward()
    ours = {name: p.grad for name, p in objective.model.named_parameters()}
    if objective.model.embedding.puzzle_emb is not None:
        (taken,) = objective.model.embedding.puzzle_emb.taken
        identifiers, ours["puzzle rows"] = taken.used()
    for name, theirs in fixture.tensors(part).items():
        if name.endswith("local_ids"):
            assert torch.equal(identifiers, theirs)
            continue
        pieces = {"puzzle rows": theirs} if name.endswith("local_weights") else split_fused(name, theirs)
        for piece_name, piece in pieces.items():
            mine = ours.pop(piece_name)
            assert mine is not None, piece_name
            # The whole reference tensor's rms, so that a fused projection is measured by one yardstick.
            rms = float(theirs.double().square().mean().sqrt())
            assert worst(mine, piece) <= 2e-4 * max(rms, 1e-12), piece_name
    assert not ours, f"gradients that the reference does not have: {sorted(ours)}"


class FixtureLoader(BatchLoader):
    """Offers the fixture's batches, one a step, every row every time, as the reference's loader does."""

    epoch = 0

    def __init__(self, fixture: Fixture) -> None:
        self.fixture = fixture

    def next_batch(self, halted: object, step: int) -> list[Columns]:
        return [{name: t.numpy() for name, t in self.fixture.batch(step).items()}]

    def start_epoch(self, trained: bool) -> bool:
        return False

    def state_dict(self) -> dict[str, np.ndarray]:
        return {}

    def load_state_dict(self, epoch: int, state_dict: object) -> None:
        raise NotImplementedError


def training_loop(fixture: Fixture) -> tuple[TrainingLoop, PuzzleObjective]:
    """The project's own loop, optimizer and schedule with the trace's hyper-parameters."""
    hyper = fixture.about["trace"]["hyper"]
    objective = objective_of(fixture, hyper["loss_type"], train=True)
    beta1, beta2 = hyper["betas"]
    settings = OptimizerSettings(
        optimizer="adam-atan2", lr=hyper["lr"], weight_decay=hyper["weight_decay"], beta1=beta1, beta2=beta2
    )
    strategy = SingleStrategy(World(0, 1, torch.device("cpu"), False), Precision())
    strategy.prepare(objective, builder(settings))
    table = objective.model.embedding.puzzle_emb
    schedule = Schedule("cosine", hyper["lr_warmup_steps"], hyper["total_steps"], hyper["lr_min_ratio"], 0.2)
    parts = TrainState(
        strategy=strategy,
        objective=objective,
        loader=FixtureLoader(fixture),
        shape=BatchSize(fixture.about["model_config"]["batch_size"], 1, 0, 1),
        lr_schedule=LrSchedule(schedule, hyper["lr"], hyper["puzzle_emb_lr"] or 0.0),
        wanted=wanted_columns(objective.model.config),
        carried=True,
        grad_clip=0.0,
        max_bad_steps=1,
        sparse=SparseSignSGD(table, hyper["puzzle_emb_weight_decay"]) if table is not None else None,
    )
    return TrainingLoop(parts), objective


def check_state(fixture: Fixture, objective: PuzzleObjective, when: str, near: float, far: float) -> None:
    prefix = f"{when}."
    tensors = {n.removeprefix(prefix): t for n, t in fixture.tensors("trace").items() if n.startswith(prefix)}
    ours = objective.model.state_dict()
    theirs = from_reference(tensors)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        gaps = (ours[name].double() - tensor.double()).abs()
        # adam-atan2 and sign-SGD act like a sign: where a gradient is rounding noise the other sign is legal.
        assert float((gaps <= near).double().mean()) >= 0.999, f"{when} {name}"
        assert float(gaps.max()) <= far, f"{when} {name}"


def test_twenty_training_steps(fixture: Fixture) -> None:
    if not fixture.offers("trace"):
        pytest.skip(f"{fixture.about['name']} offers no trace")
    about = fixture.about["trace"]
    loop, objective = training_loop(fixture)
    batch_size = fixture.about["model_config"]["batch_size"]
    moved = 0.0
    for row in about["rows"]:
        report = loop.step()
        assert report is not None and report.applied
        assert report.lr == pytest.approx(row["lr_main"], rel=1e-12)
        assert report.norm == pytest.approx(row["grad_norm_scaled"], rel=1e-3)
        pairs = loop.metrics.pairs
        means = loop.flush_metrics()
        # The fixtures state 1e-5 for small models and 2e-5 for larger ones; the bound here holds for all of them.
        assert means["objective"] * batch_size == pytest.approx(row["loss"], rel=2e-5)
        check_metrics(pairs, row["metrics"])
        carry = loop.carries[0]
        assert carry.steps.tolist() == row["carry_steps"]
        assert carry.halted.tolist() == row["carry_halted"]
        moved += max(row["lr_main"], row["lr_puzzle_emb"] or 0.0)
        if row["step"] == 1:
            # 2e-8 where beta2 is large: the reference evaluates 1 - beta^t in float32 (stated in the fixture).
            near = 1e-8 if about["hyper"]["betas"][1] <= 0.99 else 2e-8
            check_state(fixture, objective, "after_step1", near, 2.1 * moved)
    check_state(fixture, objective, f"after_step{len(about['rows'])}", 1e-5, 2.1 * moved)
    ours = objective.model.state_dict()
    for name, want in about["final_checksum"].items():
        pieces = split_fused(name, torch.zeros(3 * 2 * 8, 1))
        norm = sum(float(ours[piece].double().square().sum()) for piece in pieces) ** 0.5
        assert norm == pytest.approx(want["l2"], rel=1e-5), name


def test_bfloat16_activations(fixture: Fixture) -> None:
    """One ACT step only, within the reference's own spread between two attention kernels (stated in the fixture)."""
    if not fixture.offers("bf16_eval"):
        pytest.skip(f"{fixture.about['name']} offers no bf16_eval")
    objective = PuzzleObjective(fixture.model(forward_dtype="bfloat16"), "softmax", rollout=False).eval()
    want = fixture.tensors("bf16_eval")
    with torch.no_grad():
        view = objective.segment(fixture.batch(1), objective.initial_carry(fixture.batch(1)))
    assert view.logits.dtype == want["step1.logits"].dtype
    assert worst(view.logits, want["step1.logits"]) <= 4.3e-2
    assert worst(view.carry.states.z_h, want["step1.z_H"]) <= 8.7e-2
    assert worst(view.carry.states.z_l, want["step1.z_L"]) <= 8.7e-2
    assert worst(view.q_halt, want["step1.q_halt_logits"]) <= 1.6e-2
    assert worst(view.q_continue, want["step1.q_continue_logits"]) <= 1.6e-2
    assert torch.equal(view.carry.halted, want["step1.halted"])


@pytest.mark.parametrize("folder", [Path("no/such/folder"), Path(__file__).parent])
def test_a_folder_without_fixtures_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HRM_RAY_FIXTURES", str(folder))
    with pytest.raises(FileNotFoundError):
        discover()
