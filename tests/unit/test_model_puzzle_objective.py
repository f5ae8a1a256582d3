"""Who works on which puzzle: carried slots, rollout, and slots without a puzzle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.model.actv1 import States
from hrm_ray.model.objective import Batch, SegmentOutput
from hrm_ray.model.puzzle_objective import ROW_FIELDS, PuzzleCarry, PuzzleObjective
from hrm_ray.types import IGNORE_LABEL
from tests.support.tiny_models import puzzle_batch, tiny_actv1, tiny_config

CONFIG = tiny_config(task="puzzle", seq_len=6, halt_max_steps=3, puzzle_emb_ndim=10, num_puzzle_identifiers=5)
ROWS = 4


def objective_of(rollout: bool = False, seed: int = 0) -> PuzzleObjective:
    return PuzzleObjective(tiny_actv1(CONFIG, seed), "softmax", rollout=rollout).train()


def offers(seed: int, idle: list[bool] | None = None) -> Batch:
    batch = puzzle_batch(seed, ROWS, CONFIG)
    for row, out in enumerate(idle or []):
        if out:
            batch["active"][row], batch["labels"][row] = False, IGNORE_LABEL
    return batch


@settings(max_examples=15)
@given(seed=st.integers(0, 1000))
def test_rows_stay_until_they_halt(seed: int) -> None:
    """Followed row by row: data, step count, and that a replaced row starts from the initial states."""
    objective = objective_of(seed=seed)
    carry = objective.initial_carry(offers(seed))
    mine: list[tuple[int, int] | None] = [None] * ROWS
    halts = 0
    for number in range(6):
        batch = offers(1000 * seed + number)
        batch["min_steps"] = torch.tensor([0, 2, 0, 3], dtype=torch.int32)
        with torch.no_grad():
            view = objective.segment(batch, carry)
        alone = objective.segment(batch, objective.initial_carry(batch))
        for row in range(ROWS):
            held = mine[row]
            held = (1000 * seed + number, 1) if held is None else (held[0], held[1] + 1)
            source = offers(held[0])
            for name in ROW_FIELDS:
                assert torch.equal(view.carry.data[name][row], source[name][row]), name
            assert int(view.carry.steps[row]) == held[1]
            if held[1] == 1:
                # Same arithmetic on the same numbers and shapes: equal to the bit.
                assert torch.equal(view.logits[row], alone.logits[row])
            stop = held[1] == 3 or bool(view.q_halt[row] > view.q_continue[row])
            stop = stop and held[1] >= int(batch["min_steps"][row])
            assert bool(view.carry.halted[row]) == stop
            halts += stop
            mine[row] = None if stop else held
        carry = view.carry
    assert halts >= 2


def spoiled(carry: PuzzleCarry, rows: list[int]) -> PuzzleCarry:
    """The carry with NaN in the states of `rows`."""
    z_h, z_l = carry.states.z_h.clone(), carry.states.z_l.clone()
    z_h[rows], z_l[rows] = torch.nan, torch.nan
    return replace(carry, states=States(z_h, z_l))


def summary(output: SegmentOutput[PuzzleCarry]) -> dict[str, float]:
    values = {f"term {term.name}": float(term.total.detach()) for term in output.terms}
    for name, (total, weight) in output.metrics.items():
        values |= {f"{name} total": float(total), f"{name} weight": float(weight)}
    return values


@pytest.mark.parametrize("rollout", [False, True])
def test_idle_slots_add_nothing_whatever_is_in_them(rollout: bool) -> None:
    """NaN states of an idle slot, and anything in its data, reach no loss, weight, metric, gradient or table row."""
    results = []
    for garbage in (False, True):
        objective = objective_of(rollout)
        batch = offers(3, [False, True, False, True])
        carry = objective.initial_carry(batch)
        carry = objective(batch, carry).carry
        assert carry.halted.tolist()[1] and carry.halted.tolist()[3], "an idle slot waits for the next offer"
        table = objective.model.embedding.puzzle_emb
        assert table is not None
        table.taken.clear()
        objective.zero_grad(set_to_none=True)
        if garbage:
            carry = spoiled(carry, [1, 3])
            batch = {name: tensor.clone() for name, tensor in batch.items()}
            batch["inputs"][[1, 3]], batch["puzzle_identifiers"][[1, 3]] = 7, 4
        weights = {name: float(w) for name, w in objective.weights(batch, carry).items()}
        output = objective(batch, carry)
        torch.stack([term.coefficient * term.total for term in output.terms]).sum().backward()
        gradients = {name: p.grad for name, p in objective.named_parameters()}
        (used,) = [taken.used() for taken in table.taken]
        assert used is not None
        assert [used[0].tolist()] == [output.carry.data["puzzle_identifiers"][[0, 2]].tolist()]
        results.append((weights, summary(output), gradients, used[1]))
    (plain_weights, plain, gradients, rows), (weights, values, others, other_rows) = results
    assert weights == plain_weights == {"rows": 2.0 * (3 if rollout else 1)}
    assert values == plain
    assert torch.equal(rows, other_rows) and bool(rows.any())
    for name, gradient in gradients.items():
        # Sums over the batch inside a matrix product: the idle rows add exact zeros.
        assert gradient is not None and torch.equal(gradient, others[name]), name


def test_an_idle_slot_takes_a_row_at_once() -> None:
    objective = objective_of()
    carry = objective(offers(3, [True] * ROWS), objective.initial_carry(offers(3))).carry
    assert carry.halted.all() and not carry.data["active"].any()
    batch = offers(5)
    assert float(objective.weights(batch, carry)["rows"]) == ROWS
    view = objective.segment(batch, spoiled(carry, list(range(ROWS))))
    assert torch.equal(view.carry.data["inputs"], batch["inputs"]) and view.carry.steps.tolist() == [1] * ROWS
    assert torch.isfinite(view.logits).all()


def test_nothing_left_weighs_nothing() -> None:
    """The end of an epoch: all slots idle."""
    objective = objective_of()
    batch = offers(3, [True] * ROWS)
    carry = objective.initial_carry(batch)
    assert float(objective.weights(batch, carry)["rows"]) == 0
    values = summary(objective(batch, carry))
    assert set(values.values()) == {0.0}


def test_rollout_supervises_every_segment_without_replacement() -> None:
    """All segments of a batch work on it, even when the scores say halt, and a later offer is ignored."""
    objective = objective_of(rollout=True)
    with torch.no_grad():
        objective.model.q_head.bias.copy_(torch.tensor([50.0, -50.0]))
    assert objective.segments_per_step == 3
    batch, other = offers(1), offers(2)
    del batch["min_steps"], other["min_steps"]  # rollout explores nothing and its loader has no such column
    carry = objective.initial_carry(batch)
    assert float(objective.weights(batch, carry)["rows"]) == 3 * ROWS
    for segment in range(1, 4):
        output = objective(batch if segment == 1 else other, carry)
        carry = output.carry
        assert torch.equal(carry.data["inputs"], batch["inputs"])
        assert carry.steps.tolist() == [segment] * ROWS and carry.halted.tolist() == [segment == 3] * ROWS
        assert {term.name for term in output.terms} == {"segment_loss", "q_halt_loss", "q_continue_loss"}
        assert float(output.metrics["segment_loss"][1]) == ROWS
        assert float(output.metrics["cell_accuracy"][1]) == (ROWS if segment == 3 else 0)
    assert torch.equal(objective(other, carry).carry.data["inputs"], other["inputs"])


def test_metrics_count_rows_that_halted_and_have_labels() -> None:
    objective = objective_of()
    batch = offers(1)
    batch["labels"][2] = IGNORE_LABEL
    with torch.no_grad():
        objective.model.q_head.bias.copy_(torch.tensor([50.0, -50.0]))
    view = objective.segment(batch, objective.initial_carry(batch))
    answers = view.logits.argmax(-1).to(torch.int32)
    batch["labels"][0] = torch.where(batch["labels"][0] >= 0, answers[0], IGNORE_LABEL)
    batch["labels"][1, :2] = answers[1, :2]
    output = objective(batch, objective.initial_carry(batch))
    assert output.carry.halted.all()
    right = [
        [int(view.logits[r, s].argmax()) == int(batch["labels"][r, s]) for s in range(6) if batch["labels"][r, s] >= 0]
        for r in (0, 1, 3)
    ]
    assert [all(row) for row in right] == [True, False, False] and any(right[1])
    values = {name: (float(total), float(weight)) for name, (total, weight) in output.metrics.items()}
    assert values["cell_accuracy"] == (pytest.approx(sum(sum(row) / len(row) for row in right), rel=1e-6), 3.0)
    assert values["exact_accuracy"] == (sum(all(row) for row in right), 3.0)
    assert values["q_halt_accuracy"] == (sum(all(row) for row in right), 3.0)
    assert values["act_steps"] == (3.0, 3.0)
    assert values["segment_loss"][1] == 4.0


def test_after_a_skipped_step_a_row_of_broken_states_begins_again() -> None:
    """A running row whose states are not finite keeps its puzzle and starts anew; the others go on to the bit."""
    objective = objective_of(seed=2)
    batch = offers(3)
    batch["min_steps"] = torch.full((ROWS,), 3, dtype=torch.int32)
    with torch.no_grad():
        carry = objective.segment(batch, objective.initial_carry(batch)).carry
    assert not bool(carry.halted.any())
    states = carry.states.map(torch.clone)
    states.z_l[1, 2, 3] = float("nan")
    states.z_h[3, 0, 0] = float("inf")
    mended = objective.restarted(replace(carry, states=states))
    start = objective.model.initial_states(ROWS, CONFIG.total_positions)
    for row in range(ROWS):
        source = start if row in (1, 3) else carry.states
        assert torch.equal(mended.states.z_h[row], source.z_h[row])
        assert torch.equal(mended.states.z_l[row], source.z_l[row])
        assert int(mended.steps[row]) == (0 if row in (1, 3) else 1)
    assert mended.data is carry.data and torch.equal(mended.halted, carry.halted)
