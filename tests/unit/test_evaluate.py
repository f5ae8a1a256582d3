"""Held-out figures against a naive model that reads every document alone, in float64.

Reading documents alone is what packing must amount to. Tolerance 5e-6 relative on losses: sums of float32 numbers that
are each right to about 1e-6. Counts and accuracies are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from hrm_ray.inference.puzzle import solve
from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.build import build_objective
from hrm_ray.model.layers import Context
from hrm_ray.model.objective import AnyObjective, Batch
from hrm_ray.model.scope import CAUSAL
from hrm_ray.train.evaluate import EvalSet, better, evaluate
from hrm_ray.train.loop import MetricTotals, weighted_loss
from hrm_ray.train.world import World
from hrm_ray.types import IGNORE_LABEL, Columns
from tests.support.naive_model import NaiveByToken, NaiveModel, cross_entropies, full_table, text_table
from tests.support.tiny_models import between, puzzle_batch, text_batch, tiny_config, tiny_model

ALONE = World(0, 1, torch.device("cpu"), False)


class HeldRows:
    """A batch as a SampleSet."""

    def __init__(self, batch: Batch) -> None:
        self.columns: Columns = {name: tensor.numpy() for name, tensor in batch.items()}

    def __len__(self) -> int:
        return len(self.columns["inputs"])

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        assert (indices >= 0).all()
        return {name: column[indices] for name, column in self.columns.items()}


LENGTHS = [[7, 3, 2], [12], [4, 8], [12], [1, 11], [6, 6], [12]]
TEXT_CASES: dict[str, dict[str, Any]] = {
    "rope": {"halt_max_steps": 3},
    "learned": {"pos_encodings": "learned"},
    "prefix": {"lm_mask": "prefix", "pos_encodings": "none"},
    "one segment": {"halt_max_steps": 1},
    "no halting": {"halt_rule": "none"},
    "transformer": {"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none", "h_layers": 2},
}


def held_text(case: str) -> Batch:
    batch = text_batch(6, LENGTHS, prompts=[3, 5, 1, 2, 1, 4, 11] if case == "prefix" else None)
    bytes_of = np.random.default_rng(0).integers(1, 5, batch["labels"].shape)
    return batch | {"label_bytes": torch.from_numpy(np.where(batch["labels"] >= 0, bytes_of, 0).astype(np.int32))}


def objective_of(case: str, loss: str = "softmax") -> AnyObjective:
    model = tiny_model(tiny_config(**TEXT_CASES[case]), seed=2)
    if isinstance(model, ActV1):
        lean_to_the_middle(model)
    return build_objective(model, loss, supervision="rollout", halt_margin=0.01)  # type: ignore[arg-type]


def lean_to_the_middle(model: ActV1) -> None:
    """Sets the halting bias so that about half of the tokens halt at the first segment."""
    batch = text_batch(6, LENGTHS)
    with torch.no_grad():
        x = model.embedding(batch["inputs"], None, None)
        states = model.segment(model.initial_states(len(LENGTHS), 12), x, Context(CAUSAL, model.rotation(0, 12)))
        model.q_head.bias[0] -= between(model.halting_scores(states.z_h)[0])


def documents(batch: Batch, row: int) -> list[slice]:
    numbers = batch["documents"][row].tolist()
    starts = [place for place in range(len(numbers)) if place == 0 or numbers[place] != numbers[place - 1]]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True)]


@dataclass
class NaiveFigures:
    loss: float = 0.0
    hits: int = 0
    tokens: int = 0
    bytes: int = 0
    adaptive: float = 0.0
    segments: int = 0


def naive_text(objective: AnyObjective, batch: Batch, rows: int, loss: str) -> NaiveFigures:
    figures, config = NaiveFigures(), objective.model.config
    for row in range(rows):
        for own in documents(batch, row):
            inputs, labels = batch["inputs"][row, own], batch["labels"][row, own].tolist()
            prompt = batch["prompt"][row, own].tolist() if "prompt" in batch else [False] * len(inputs)
            naive = NaiveModel(objective.model)
            state, table = naive.start(len(inputs)), text_table([0] * len(inputs), prompt)
            for _ in range(config.halt_max_steps):
                state = naive.segment(state, naive.embed(inputs, torch.arange(len(inputs))), table)
            logits = naive.logits(state).detach()
            for place, value in enumerate(cross_entropies(logits, labels, loss)):
                if value is not None:
                    figures.loss += float(value)
                    figures.hits += int(logits[place].argmax()) == labels[place]
                    figures.tokens += 1
                    figures.bytes += int(batch["label_bytes"][row, own][place])
            if config.halt_rule == "gain" and config.lm_mask == "causal":
                add_adaptive(figures, objective.model, inputs, labels, loss)
    return figures


@torch.no_grad()
def add_adaptive(figures: NaiveFigures, model: Any, inputs: Tensor, labels: list[int], loss: str) -> None:
    by_token = NaiveByToken(model)
    for place, token in enumerate(inputs.tolist()):
        logits, segments = by_token.read(token, place)
        if labels[place] >= 0:
            value = cross_entropies(logits.unsqueeze(0), [labels[place]], loss)[0]
            assert value is not None
            figures.adaptive += float(value)
            figures.segments += segments
    assert by_token.margin > 1e-4, "rounding could turn a halting decision: choose another seed"


@pytest.mark.parametrize("loss", ["softmax", "stablemax"])
@pytest.mark.parametrize("case", TEXT_CASES)
def test_text_figures(case: str, loss: str) -> None:
    objective, batch = objective_of(case, loss), held_text(case)
    got = evaluate(objective, EvalSet(HeldRows(batch), 3, 2), ALONE)
    want = naive_text(objective, batch, 6, loss)
    assert objective.training
    assert got["tokens"] == want.tokens > 30
    assert got["token_accuracy"] == want.hits / want.tokens
    assert got["loss"] == pytest.approx(want.loss / want.tokens, rel=5e-6)
    assert got["perplexity"] == pytest.approx(math.exp(want.loss / want.tokens), rel=2e-5)
    assert got["bits_per_byte"] == pytest.approx(want.loss / math.log(2) / want.bytes, rel=5e-6)
    adaptive = TEXT_CASES[case].get("halt_rule", "gain") == "gain" and objective.segments_per_step > 1
    assert ("adaptive_loss" in got) == ("mean_segments" in got) == adaptive
    if adaptive and case != "prefix":
        assert want.tokens < want.segments < objective.segments_per_step * want.tokens
        assert got["mean_segments"] == pytest.approx(want.segments / want.tokens, rel=1e-12)
        assert got["adaptive_loss"] == pytest.approx(want.adaptive / want.tokens, rel=5e-6)
        assert abs(got["adaptive_loss"] - got["loss"]) > 1e-3, "adaptive reading gave the same as reading to the end"


@pytest.mark.parametrize("case", ["rope", "prefix", "transformer"])
def test_batch_size_does_not_matter(case: str) -> None:
    """Seven rows in one batch, by ones, or with a short last batch. Only the order of float32 sums differs."""
    objective, batch = objective_of(case), held_text(case)
    whole = evaluate(objective, EvalSet(HeldRows(batch), 7, 1), ALONE)
    for size, batches in ((1, 7), (2, 10), (3, 3), (100, 1)):
        other = evaluate(objective, EvalSet(HeldRows(batch), size, batches), ALONE)
        assert other == pytest.approx(whole, rel=2e-6)


def test_how_much_is_read() -> None:
    rows = HeldRows(held_text("rope"))
    assert EvalSet(rows, 3, 2).count == 6 and EvalSet(rows, 3, 3).count == 7
    labels = rows.columns["labels"]
    got = evaluate(objective_of("rope"), EvalSet(rows, 2, 2), ALONE)
    assert got["tokens"] == (labels[:4] != IGNORE_LABEL).sum()


class OneOfTwo(World):
    """A rank that keeps what it would have added to the other's."""

    def sum(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            # Whether memory ran out: on neither.
            return tensor
        SENT.append(tensor.clone())
        return torch.stack(SENT).sum(0)


SENT: list[Tensor] = []


@pytest.mark.parametrize("task", ["text", "puzzle"])
def test_ranks_share_the_batches(task: str) -> None:
    objective = objective_of("rope") if task == "text" else puzzle_objective("segment")
    batch = held_text("rope") if task == "text" else puzzle_batch(2, 7, objective.model.config)
    held_out = EvalSet(HeldRows(batch), 2, 10)
    SENT.clear()
    evaluate(objective, held_out, OneOfTwo(1, 2, torch.device("cpu"), True))
    both = evaluate(objective, held_out, OneOfTwo(0, 2, torch.device("cpu"), True))
    assert len(SENT) == 2 and not torch.equal(SENT[0], SENT[1])
    assert both == pytest.approx(evaluate(objective, held_out, ALONE), rel=1e-12)


def puzzle_objective(supervision: str) -> AnyObjective:
    config = tiny_config(
        task="puzzle", seq_len=6, halt_max_steps=3, vocab_size=5, puzzle_emb_ndim=10, num_puzzle_identifiers=3
    )
    model = tiny_model(config, seed=2)
    assert isinstance(model, ActV1)
    return build_objective(model, "stablemax", supervision=supervision, halt_margin=0.01)


def naive_puzzles(model: ActV1, batch: Batch) -> list[list[tuple[Tensor, Tensor]]]:
    """(logits, q) of every segment of every row."""
    naive = NaiveModel(model)
    rows = []
    with torch.no_grad():
        for inputs, identifier in zip(batch["inputs"], batch["puzzle_identifiers"].tolist(), strict=True):
            x = naive.embed(inputs, None, identifier)
            state, views = naive.start(len(x)), []
            for _ in range(model.config.halt_max_steps):
                state = naive.segment(state, x, full_table(len(x)))
                views.append((naive.logits(state), naive.q(state.z_h[0])))
            rows.append(views)
    return rows


def answers_for(model: ActV1, batch: Batch) -> Batch:
    """Labels that the model gets right at segment 1 (row 0 mod 3), at the last (1 mod 3), or random ones."""
    labels = batch["labels"].clone()
    for row, views in enumerate(naive_puzzles(model, batch)):
        if row % 3 < 2:
            answer = views[0 if row % 3 == 0 else -1][0].argmax(-1).int()
            labels[row] = torch.where(labels[row] >= 0, answer, IGNORE_LABEL)
    return batch | {"labels": labels}


@pytest.mark.parametrize("supervision", ["segment", "rollout"])
@pytest.mark.parametrize("size", [2, 9])
def test_puzzle_figures(supervision: str, size: int) -> None:
    objective = puzzle_objective(supervision)
    model = objective.model
    assert isinstance(model, ActV1)
    batch = puzzle_batch(2, 9, model.config)
    with torch.no_grad():
        first = [views[0][1] for views in naive_puzzles(model, batch)]
        model.q_head.bias[0] -= between(torch.stack([q[0] - q[1] for q in first]))
    batch = answers_for(model, batch)
    got = evaluate(objective, EvalSet(HeldRows(batch), size, 9), ALONE)
    want = dict.fromkeys(got, 0.0)
    stops = []
    for row, views in enumerate(naive_puzzles(model, batch)):
        labels = batch["labels"][row].tolist()

        def right(logits: Tensor, labels: list[int] = labels) -> list[bool]:
            return [int(s.argmax()) == label for s, label in zip(logits, labels, strict=True) if label >= 0]

        stop = next((number for number, (_, q) in enumerate(views) if q[0] > q[1]), 2)
        last, q = views[-1]
        losses = [float(v) for v in cross_entropies(last, labels, "stablemax") if v is not None]
        want["puzzles"] += 1
        want["loss"] += sum(losses) / len(losses) / 9
        want["cell_accuracy"] += sum(right(last)) / len(right(last)) / 9
        want["exact_accuracy"] += all(right(last)) / 9
        want["exact_accuracy_q_stop"] += all(right(views[stop][0])) / 9
        want["steps_q_stop"] += (stop + 1) / 9
        want["q_halt_accuracy"] += (bool(q[0] >= 0) == all(right(last))) / 9
        stops.append(stop)
    assert len(set(stops)) >= 2 and 0 < want["exact_accuracy"] < 1
    assert want["exact_accuracy"] != want["exact_accuracy_q_stop"]
    assert got == pytest.approx(want, rel=5e-6)
    # What `hrm-ray solve` would show for the same puzzles.
    for stop_by_q, name in ((False, "exact_accuracy"), (True, "exact_accuracy_q_stop")):
        answers = solve(model, batch["inputs"].numpy(), batch["puzzle_identifiers"].numpy(), stop_by_q=stop_by_q)
        supervised = batch["labels"].numpy() >= 0
        exact = ((answers.tokens == batch["labels"].numpy()) | ~supervised).all(-1)
        assert exact.mean() == pytest.approx(want[name])
        assert answers.segments.mean() == pytest.approx(want["steps_q_stop"] if stop_by_q else 3)


@pytest.mark.parametrize("case", [*TEXT_CASES, "puzzle segment", "puzzle rollout"])
def test_a_name_means_the_same_in_training_and_evaluation(case: str) -> None:
    """The rows of an evaluation as one training step: what both report under one name is equal, and the terms' metrics
    add up to the objective."""
    if case.startswith("puzzle"):
        objective = puzzle_objective(case.split()[1])
        batch = puzzle_batch(2, 9, objective.model.config) | {"min_steps": torch.full((9,), 3, dtype=torch.int32)}
        with torch.no_grad():
            objective.model.q_head.bias.copy_(torch.tensor([-50.0, 0.0]))  # no row halts before its last segment
    else:
        objective, batch = objective_of(case), held_text(case)
    segments = objective.model.config.halt_max_steps
    calls = segments // objective.segments_per_step * objective.segments_per_step
    held_out = evaluate(objective, EvalSet(HeldRows(batch), len(batch["inputs"]), 1), ALONE)
    carry, pairs, whole = objective.initial_carry(batch), MetricTotals(), 0.0
    totals = {name: float(total) for name, total in objective.weights(batch, carry).items()}
    totals = {name: total * segments / objective.segments_per_step for name, total in totals.items()}
    with torch.no_grad():
        for _ in range(calls):
            output = objective(batch, carry)
            carry, whole = output.carry, whole + float(weighted_loss(output, totals))
            pairs.add(output.metrics)
    trained = {name: float(total / weight) for name, (total, weight) in pairs.pairs.items()}
    both = trained.keys() & held_out.keys()
    accuracy = {"cell_accuracy", "exact_accuracy"} if case.startswith("puzzle") else {"token_accuracy"}
    assert both >= {"loss", *accuracy}
    same = ("loss", *sorted(accuracy))
    assert [trained[name] for name in same] == pytest.approx([held_out[name] for name in same], rel=5e-6)
    halves = sum(trained.get(name, 0.0) for name in ("q_halt_loss", "q_continue_loss")) / 2
    assert whole == pytest.approx(trained.get("segment_loss", trained["loss"]) + halves, rel=5e-6)
    assert segments == 1 or abs(trained["segment_loss"] - trained["loss"]) > 1e-4


def test_better() -> None:
    """Exact accuracy first for puzzles, then the lower loss; anything beats nothing, a tie beats nothing else."""
    assert better({"loss": 9.0}, None)
    assert better({"loss": 1.0}, {"loss": 1.1}) and not better({"loss": 1.0}, {"loss": 1.0})
    assert better({"loss": 2.0, "exact_accuracy": 0.6}, {"loss": 1.0, "exact_accuracy": 0.5, "step": 3})
    assert not better({"loss": 1.0, "exact_accuracy": 0.4}, {"loss": 2.0, "exact_accuracy": 0.5})
    assert better({"loss": 1.0, "exact_accuracy": 0.5}, {"loss": 2.0, "exact_accuracy": 0.5})
