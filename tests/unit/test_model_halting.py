"""When a row or token halts, and what the halting heads are taught."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.model.build import build_objective
from hrm_ray.model.halting import continue_target, gain_target, halt_in_training, last_segment
from hrm_ray.model.losses import CROSS_ENTROPIES
from hrm_ray.model.objective import Batch
from hrm_ray.model.puzzle_objective import PuzzleObjective
from hrm_ray.model.text_objective import TextObjective
from hrm_ray.train.loaders import exploration
from hrm_ray.types import IGNORE_LABEL
from tests.support.tiny_models import (
    backward_all,
    between,
    logits_of_segments,
    puzzle_batch,
    text_batch,
    tiny_actv1,
    tiny_config,
    tiny_model,
)


@given(
    q=st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=6),
    steps=st.integers(1, 5),
    least=st.integers(0, 5),
    limit=st.integers(1, 5),
)
def test_rule_of_the_reference(q: list[tuple[float, float]], steps: int, least: int, limit: int) -> None:
    q_halt, q_continue = torch.tensor(q).unbind(-1)
    count = torch.full((len(q),), steps, dtype=torch.int32)
    last = last_segment(count, limit)
    halted = halt_in_training(q_halt, q_continue, count, last, torch.full_like(count, least))
    for place in range(len(q)):
        # As float32 holds them: two draws may round to the same number.
        stop = float(q_halt[place]) > float(q_continue[place])
        assert bool(halted[place]) == ((steps >= limit or stop) and steps >= least)


def test_equal_scores_do_not_halt() -> None:
    one = torch.ones(1)
    never = torch.zeros(1, dtype=torch.bool)
    assert not halt_in_training(one, one, one.int(), never, torch.zeros(1).int()).item()


def test_continue_target_by_hand() -> None:
    halt, go_on = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([-2.0, 2.0, 2.0])
    target = continue_target(halt, go_on, torch.tensor([False, False, True]))
    want = [1 / (1 + math.exp(-x)) for x in (1.0, 2.0, -1.0)]
    assert target.tolist() == pytest.approx(want, rel=1e-6)


def test_gain_target_by_hand() -> None:
    """1 unless the loss fell by more than the margin."""
    before = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0]])
    after = torch.tensor([[0.5, 0.75, 0.76, 1.0, 2.0]])
    assert gain_target(before, after, 0.25).tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0]]
    assert gain_target(before, after, 0.0).tolist() == [[0.0, 0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_exploration_draws(probability: float) -> None:
    """Uniform in 2..limit with the given chance; 4 sigma of 4000 draws is 0.032 at most."""
    draw = exploration(3, probability, 5)
    drawn = np.concatenate([draw(step, np.arange(40)) for step in range(1, 101)])
    assert set(drawn.tolist()) <= {0, 2, 3, 4, 5}
    assert np.mean(drawn > 0) == pytest.approx(probability, abs=0.032)
    if probability == 1.0:
        for value in (2, 3, 4, 5):
            assert np.mean(drawn == value) == pytest.approx(0.25, abs=0.032)
    assert (draw(7, np.arange(40)) == drawn[240:280]).all(), "the same step and slot, the same draw"
    assert (draw(7, np.arange(30, 40)) == drawn[270:280]).all(), "whatever other slots are asked for"


def test_exploration_keeps_rows_at_work() -> None:
    """A row whose scores say halt goes on until its draw is reached, in the objective itself."""
    config = tiny_config(task="puzzle", seq_len=6, halt_max_steps=4)
    model = tiny_actv1(config)
    with torch.no_grad():
        model.q_head.weight.zero_()
        model.q_head.bias.copy_(torch.tensor([5.0, -5.0]))
    objective = PuzzleObjective(model, "softmax", rollout=False).train()
    batch = puzzle_batch(0, 3, config)
    batch["min_steps"] = torch.tensor([0, 3, 4], dtype=torch.int32)
    carry = objective.initial_carry(batch)
    seen = []
    with torch.no_grad():
        for _ in range(4):
            carry = objective.segment(batch, carry).carry
            seen.append((carry.steps.tolist(), carry.halted.tolist()))
    assert [halted for _, halted in seen] == [
        [True, False, False],
        [True, False, False],
        [True, True, False],
        [True, False, True],
    ]
    assert [steps for steps, _ in seen] == [[1, 1, 1], [1, 2, 2], [1, 3, 3], [1, 1, 4]]


def test_scores_do_not_stop_a_row_in_evaluation() -> None:
    config = tiny_config(task="puzzle", seq_len=6, halt_max_steps=3)
    model = tiny_actv1(config)
    with torch.no_grad():
        model.q_head.weight.zero_()
        model.q_head.bias.copy_(torch.tensor([5.0, -5.0]))
    objective = PuzzleObjective(model, "softmax", rollout=False).eval()
    batch = puzzle_batch(0, 3, config)
    carry = objective.initial_carry(batch)
    with torch.no_grad():
        for segment in range(1, 4):
            view = objective.segment(batch, carry)
            carry = view.carry
            assert view.target_q_continue is None
            assert carry.halted.tolist() == [segment == 3] * 3 and carry.steps.tolist() == [segment] * 3


def halting_text(segments: int, rule: str = "gain") -> tuple[TextObjective, Batch]:
    objective = build_objective(
        tiny_model(tiny_config(halt_max_steps=segments, halt_rule=rule)),
        "softmax",
        supervision="rollout",
        halt_margin=0.01,
    )
    assert isinstance(objective, TextObjective)
    return objective.train(), text_batch(8, [[7, 5], [12], [3, 9]])


@pytest.mark.parametrize("segments", [2, 3])
def test_only_the_halting_term_moves_the_head(segments: int) -> None:
    """The head's own state is a constant to it: its loss gives a gradient to the head and to nothing else."""
    objective, batch = halting_text(segments)
    carry = objective.initial_carry(batch)
    for _ in range(segments):
        objective.zero_grad(set_to_none=True)
        first = carry.segments == 0
        output = objective(batch, carry)
        (judged,) = (term for term in output.terms if term.name == "q_halt_loss")
        judged.total.backward()
        with_gradient = {name for name, p in objective.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert with_gradient == (set() if first else {"model.q_head.weight", "model.q_head.bias"})
        carry = output.carry


@pytest.mark.parametrize(("segments", "rule"), [(1, "gain"), (3, "none"), (1, "none")])
def test_an_idle_head_has_a_gradient_of_exactly_zero(segments: int, rule: str) -> None:
    objective, batch = halting_text(segments, rule)
    backward_all(objective, batch)
    for parameter in objective.model.q_head.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_denominators() -> None:
    """tokens: labels x M; halt_tokens: labels x (M-1); an ignored label counts nowhere."""
    objective, batch = halting_text(3)
    labels = int((batch["labels"] != IGNORE_LABEL).sum())
    weights = objective.weights(batch, objective.initial_carry(batch))
    assert {name: int(w) for name, w in weights.items()} == {"tokens": 3 * labels, "halt_tokens": 2 * labels, "rows": 3}


def test_metrics_of_halting() -> None:
    """Head accuracy and share of halts counted token by token; reported for segments 2 and later."""
    objective, batch = halting_text(2)
    logits = logits_of_segments(objective, batch)
    with torch.no_grad():
        middle = objective.model.halting_scores(objective(batch, objective.initial_carry(batch)).carry.states.z_h)[0]
        objective.model.q_head.bias[0] -= between(middle)  # about half of the tokens halt
        first = objective(batch, objective.initial_carry(batch))
        second = objective(batch, first.carry)
    assert "halt_share" not in first.metrics and "loss" not in first.metrics
    losses = [CROSS_ENTROPIES[objective.loss_kind](scores, batch["labels"]) for scores in logits]
    q_halt = objective.model.halting_scores(first.carry.states.z_h)[0].detach()
    halts = right = count = 0
    for row, place in np.argwhere(batch["labels"].numpy() != IGNORE_LABEL):
        says = float(q_halt[row, place]) > 0
        target = float(losses[1][row, place]) >= float(losses[0][row, place]) - 0.01
        halts, right, count = halts + says, right + (says == target), count + 1
    assert 0 < halts < count and 0 < right < count
    assert [float(x) for x in second.metrics["halt_share"]] == [halts, count]
    assert [float(x) for x in second.metrics["q_halt_accuracy"]] == [right, count]
    hits = int(((logits[1].argmax(-1) == batch["labels"]) & (batch["labels"] >= 0)).sum())
    assert [float(x) for x in second.metrics["token_accuracy"]] == [hits, count]
    assert float(second.metrics["loss"][0]) == pytest.approx(float(losses[1].sum()), rel=1e-6)
