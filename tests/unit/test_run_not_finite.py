"""Steps whose gradient is not finite: skipped, counted, told, and without a trace in what is trained."""

from __future__ import annotations

import copy
import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm_ray.model.objective import SegmentOutput
from hrm_ray.train import loop as loop_module
from hrm_ray.train.loop import StepReport, TrainingLoop, weighted_loss
from hrm_ray.train.strategies.single import SingleStrategy
from tests.support.runs import PUZZLE, TEXT, files_below, hrm, puzzle_file, records, text_file, train

POISONS = ("loss", "gradient")
"""A loss that is not a number, which its metrics share, or one infinite gradient after a sound backward pass."""


def poisoned(monkeypatch: pytest.MonkeyPatch, attempts: set[int], poison: str) -> list[dict[str, bool]]:
    """Scripted: the steps tried at these numbers (from 1, skipped ones counted) get a bad gradient in their first
    backward pass. Gives, for each of them, whether the state was the same before and after."""
    real_step, real_backward = TrainingLoop.step, SingleStrategy.backward
    unchanged: list[dict[str, bool]] = []
    now = {"attempt": 0, "armed": False}

    def stepping(loop: TrainingLoop) -> StepReport | None:
        now["attempt"] += 1
        now["armed"] = bad = now["attempt"] in attempts
        before = state_of(loop) if bad else {}
        report = real_step(loop)
        if bad:
            assert report is not None and not report.applied
            after = state_of(loop)
            unchanged.append({name: same(before[name], after[name]) for name in before})
        return report

    def armed(kind: str) -> bool:
        """Whether this call is to go wrong; only the first of a step does."""
        fires = bool(now["armed"]) and poison == kind
        now["armed"] = now["armed"] and not fires
        return fires

    def weighing(output: SegmentOutput[Any], totals: dict[str, float]) -> Tensor:
        loss = weighted_loss(output, totals)
        return loss * math.nan if armed("loss") else loss

    def backward(strategy: SingleStrategy, loss: Tensor) -> None:
        real_backward(strategy, loss)
        if armed("gradient"):
            last = [p for p in strategy.objective.parameters() if p.grad is not None][-1]
            assert last.grad is not None
            last.grad.view(-1)[0] = math.inf
        if armed("rows"):
            taken = strategy.objective.model.embedding.puzzle_emb.taken[-1]
            assert taken.leaf.grad is not None and taken.active is not None
            taken.leaf.grad[taken.active.nonzero()[0, 0], 0] = math.nan

    monkeypatch.setattr(loop_module, "weighted_loss", weighing)
    monkeypatch.setattr(TrainingLoop, "step", stepping)
    monkeypatch.setattr(SingleStrategy, "backward", backward)
    return unchanged


def state_of(loop: TrainingLoop) -> dict[str, Any]:
    strategy = loop.parts.strategy
    assert isinstance(strategy, SingleStrategy)
    names = {id(p): name for name, p in strategy.objective.named_parameters()}
    return copy.deepcopy(
        {
            "weights": strategy.objective.model.state_dict(),
            "optimizer": {names[id(p)]: dict(s) for p, s in strategy.optimizer.state.items()},
            "average": strategy.average.average if strategy.average is not None else {},
            "step": loop.progress.step,
        }
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(torch.equal(a, b)) if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.parametrize(
    ("kind", "poison"),
    [
        *((kind, poison) for kind in ("text", "carried", "rollout") for poison in POISONS),
        *((kind, "rows") for kind in ("carried", "rollout")),
    ],
)
def test_a_skipped_step_leaves_no_trace(
    kind: str, poison: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log covers three steps at a time, so a bad step's numbers would show in a mean."""
    usual = ("--steps", "9", "--log-every", "3", "--ema", "0.9", "--gradient-accumulation-steps", "2")
    if kind == "text":
        data, words = text_file(tmp_path), [*TEXT, *usual]
    else:
        supervision = "segment" if kind == "carried" else "rollout"
        data, words = puzzle_file(tmp_path), [*PUZZLE, *usual, "--puzzle-emb-ndim", "8", "--supervision", supervision]
    unchanged = poisoned(monkeypatch, {1, 4, 5, 10}, poison)
    bundle = tmp_path / "b"
    train(data, bundle, *words)
    assert len(unchanged) == 4 and all(all(each.values()) for each in unchanged), unchanged
    logged = records(bundle)
    assert [record["step"] for record in logged] == [1, 3, 6, 9]
    assert [record["skipped_steps"] for record in logged] == [1, 3, 3, 4]
    assert [record["batch_idx"] for record in logged] == [2, 6, 9, 13]
    for record in logged:
        assert not {"NaN", "Infinity", "-Infinity"} & {value for value in record.values() if isinstance(value, str)}
    told = [event["message"] for event in records(bundle, "event") if event["level"] == "WARNING"]
    assert len(told) == 4 and "(1 in a row)" in told[0] and "(2 in a row)" in told[2]
    for name, content in files_below(bundle / "checkpoints").items():
        assert content, name
    assert hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "10").code == 0
    assert records(bundle)[-1]["skipped_steps"] == 4


@pytest.mark.parametrize("kind", ["text", "rollout"])
def test_a_bad_step_does_not_enter_the_next_gradient(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is skipped: the steps after it are those of a run that begins behind it. Each puzzle has a row of
    its own in the table, so the rows of the skipped batch must be left alone."""
    usual = ("--lr-schedule", "constant", "--optimizer", "sgd", "--lr", "0.1", "--gradient-accumulation-steps", "2")
    if kind == "text":
        data, words = text_file(tmp_path), [*TEXT, *usual]
    else:
        data = puzzle_file(tmp_path, count=30, identifiers=30)
        words = [*PUZZLE, *usual, "--puzzle-emb-ndim", "8", "--supervision", "rollout"]
    with monkeypatch.context() as patch:
        poisoned(patch, {1}, "gradient")
        train(data, tmp_path / "skipped", *words, "--steps", "2")

    def behind(loop: TrainingLoop) -> StepReport | None:
        if loop.progress.step == 0:
            loop._next_batch(1)
        return real(loop)

    real = TrainingLoop.step
    monkeypatch.setattr(TrainingLoop, "step", behind)
    train(data, tmp_path / "behind", *words, "--steps", "2")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("skipped", "behind")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("order", ["--linear-dataset", "--no-linear-dataset"])
def test_the_ledger_counts_what_was_skipped(order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of skipped updates are SKIPPED, not MERGED, through checkpoints in between and a resume; and a ledger
    that says more than its checkpoints have counted is found out."""
    data, bundle = text_file(tmp_path, rows=60), tmp_path / "b"
    words = ["--batch-size", "2", "--save-every", "3", "--keep", "9", order]
    if order == "--no-linear-dataset":
        words += ["--shuffle-buffer-size", "5"]
    poisoned(monkeypatch, {1, 4, 5, 9, 13, 14}, "gradient")
    train(data, bundle, *TEXT, *words, "--steps", "6")
    assert hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "10").code == 0
    metadata = json.loads((bundle / "metadata.json").read_text())
    assert (metadata["trained_samples"], metadata["skipped_samples"]) == (20, 12)
    assert records(bundle)[-1]["skipped_samples"] == 12
    assert "12 samples were read in skipped updates" in str(records(bundle, "event")[-1]["message"])
    verified = hrm("ledger", "verify", bundle)
    assert verified.code == 0 and "20 sequences are merged" in verified.out, verified.out
    shown = hrm("ledger", "show", bundle).out
    assert "20 sequences MERGED" in shown and "12 sequences SKIPPED" in shown
    assert ("not its sequences" in shown) == (order == "--no-linear-dataset"), "it names the order of ranges"
    tracker = json.loads((bundle / "chunk_tracker_state.json").read_text())
    assert sum(one["skipped_sequences"] for one in tracker["rounds"]) == 12
    assert tracker["order"].split(":")[0] == ("shuffled" if order == "--no-linear-dataset" else "linear")
    with sqlite3.connect(bundle / "ledger.sqlite") as ledger:
        ledger.execute("UPDATE ranges SET state = 3, reason = NULL WHERE state = 5")
    found = hrm("ledger", "verify", bundle)
    assert found.code == 1 and "0 sequences are SKIPPED up to it, but checkpoints/step_10 has counted 12" in found.out


def test_too_many_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    poisoned(monkeypatch, {2, 3, 5, 6, 7}, "gradient")
    ran = hrm(
        "train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, "--max-bad-steps", "3", "--save-every", "1"
    )
    assert ran.code == 6 and len(ran.faults) == 1 and "Traceback" not in ran.err
    message = ran.faults[0]
    assert "inf at step 3" in message and "3 updates in a row" in message and "--lr" in message
    assert "lm_head" in message or "q_head" in message or "model." in message, "it names the parameters"
    monkeypatch.undo()
    assert hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "4").code == 0


def test_weights_that_explode(tmp_path: Path) -> None:
    """Unscripted: a learning rate far too high, without clipping."""
    words = (*TEXT, "--optimizer", "sgd", "--lr", "1e30", "--grad-clip", "0", "--max-bad-steps", "4")
    ran = hrm("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *words)
    assert ran.code == 6 and len(ran.faults) == 1 and "in a row" in ran.faults[0], ran.err
    assert len([r for r in records(tmp_path / "b", "event") if r["level"] == "WARNING"]) >= 3
