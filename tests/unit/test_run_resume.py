"""A run that was stopped and resumed is the run that was not, to the last bit."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from hrm_ray.train import session
from hrm_ray.train.world import World
from tests.support.runs import (
    EXPERTS,
    PUZZLE,
    TEXT,
    computed,
    files_below,
    hrm,
    puzzle_file,
    records,
    refused,
    stopping_at,
    text_file,
    train,
)

TEXT_CASES: dict[str, tuple[str, ...]] = {
    "plain, three epochs": (),
    "accumulated, shuffled, averaged": (
        *("--gradient-accumulation-steps", "2", "--batch-size", "2", "--no-linear-dataset", "--ema", "0.9"),
    ),
    "adam-atan2 on cosine with warm-up": ("--optimizer", "adam-atan2", "--warmup-steps", "12", "--lr", "1e-3"),
    "sgd, wsd, learned positions": ("--optimizer", "sgd", "--lr-schedule", "wsd", "--no-rope", "--lr", "1e-2"),
    "transformer": ("--arch", "transformer", "--lr-schedule", "linear", "--no-packing"),
    "three segments, epochs alone": ("--halt-max-steps", "3", "--epochs", "3"),
    "experts": (*EXPERTS, "--lr", "1e-2"),
    "experts in a transformer, accumulated": (
        *(*EXPERTS, "--arch", "transformer", "--gradient-accumulation-steps", "2", "--batch-size", "2"),
    ),
    "dropout, no gate, layer norm": ("--dropout-rate", "0.3", "--no-swiglu", "--no-rmsnorm", "--activation", "gelu"),
}
PUZZLE_CASES: dict[str, tuple[str, ...]] = {
    "carried": (),
    "carried, embedding, accumulated, averaged": (
        *("--puzzle-emb-ndim", "8", "--gradient-accumulation-steps", "2", "--batch-size", "2", "--ema", "0.9"),
    ),
    "carried, embedding, adam-atan2, shuffled": (
        *("--puzzle-emb-ndim", "40", "--optimizer", "adam-atan2", "--no-linear-dataset", "--warmup-steps", "12"),
    ),
    "rollout, embedding, sgd": ("--supervision", "rollout", "--puzzle-emb-ndim", "8", "--optimizer", "sgd"),
    "rollout, accumulated": ("--supervision", "rollout", "--gradient-accumulation-steps", "2", "--batch-size", "2"),
    "carried, epochs alone": ("--epochs", "4"),
    "carried, experts, embedding": (*EXPERTS, "--puzzle-emb-ndim", "8", "--ema", "0.9"),
    "carried, dropout, accumulated": (
        *("--dropout-rate", "0.3", "--gradient-accumulation-steps", "2", "--batch-size", "2"),
    ),
}
ALWAYS = ("--eval-every", "6", "--eval-batches", "1", "--save-every", "7", "--keep", "9")


def bounded(words: tuple[str, ...]) -> tuple[str, ...]:
    return words if "--epochs" in words else (*words, "--steps", "20")


def assert_same_run(whole: Path, resumed: Path, *, stopped_at: int) -> None:
    """Every number of the bundles agrees bit for bit: final and best weights, checkpoints, logged values."""
    last = max(int(path.name[5:]) for path in (whole / "checkpoints").glob("step_*"))
    assert last > stopped_at
    ends = [files_below(bundle / "checkpoints" / f"step_{last}") for bundle in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) >= 5
    for name in ends[0]:
        assert ends[0][name] == ends[1][name], name
    for name in ("model.safetensors", "best/model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    about = [json.loads((bundle / "metadata.json").read_text()) for bundle in (whole, resumed)]
    for entry in ("step", "epoch", "figures", "best", "skipped_steps", "weights_sha256"):
        assert about[0][entry] == about[1][entry], entry
    assert computed(whole) == computed(resumed)
    assert computed(whole, "eval") == computed(resumed, "eval")
    steps = [record["step"] for record in records(resumed)]
    assert steps == list(range(1, last + 1))


def some_stop(case: str) -> int:
    """Inside the second epoch, on the step of a checkpoint's neighbour or not, never on that of an evaluation."""
    return 10 + len(case) % 2 * 3


@pytest.mark.parametrize("case", TEXT_CASES)
def test_text(case: str, tmp_path: Path) -> None:
    data, held_out = text_file(tmp_path), text_file(tmp_path, rows=9, name="held_out.txt", seed=1)
    words = (*TEXT, *bounded(TEXT_CASES[case]), *ALWAYS, "--eval-file", held_out)
    compare(data, words, tmp_path, some_stop(case))


@pytest.mark.parametrize("case", PUZZLE_CASES)
def test_puzzles(case: str, tmp_path: Path) -> None:
    data, held_out = puzzle_file(tmp_path), puzzle_file(tmp_path, count=5, name="held_out.safetensors", seed=1)
    words = (*PUZZLE, *bounded(PUZZLE_CASES[case]), *ALWAYS, "--eval-file", held_out)
    compare(data, words, tmp_path, some_stop(case))


def compare(data: Path, words: tuple[object, ...], tmp_path: Path, stop: int) -> None:
    train(data, tmp_path / "whole", *words)
    with stopping_at(stop):
        stopped = train(data, tmp_path / "resumed", *words)
    assert f"at step {stop}" in stopped.out and "--resume" in stopped.out
    assert hrm("train", "--bundle-dir", tmp_path / "resumed", "--resume").code == 0
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", stopped_at=stop)


@pytest.mark.parametrize("epoch", [0, 1])
def test_stopped_where_an_epoch_ends(epoch: int, tmp_path: Path) -> None:
    data = text_file(tmp_path)
    held_out = text_file(tmp_path, rows=9, name="held_out.txt", seed=1)
    words = (*TEXT, "--steps", "20", *ALWAYS, "--eval-file", held_out)
    train(data, tmp_path / "whole", *words)
    last = max(record["step"] for record in records(tmp_path / "whole") if record["epoch"] == epoch)
    assert 3 < last < 20, "the data is of another length than this test is about"
    (tmp_path / "again").mkdir()
    compare(data, words, tmp_path / "again", last)


def test_stopped_twice(tmp_path: Path) -> None:
    data = puzzle_file(tmp_path)
    words = (*PUZZLE, "--steps", "20", "--puzzle-emb-ndim", "8", *ALWAYS, "--eval-file", data)
    train(data, tmp_path / "whole", *words)
    with stopping_at(3):
        train(data, tmp_path / "resumed", *words)
    with stopping_at(11):
        assert hrm("train", "--bundle-dir", tmp_path / "resumed", "--resume").code == 0
    assert hrm("train", "--bundle-dir", tmp_path / "resumed", "--resume").code == 0
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", stopped_at=11)


def test_gone_back_behind_a_better_model(tmp_path: Path) -> None:
    """From step 7 once more: what is said of the best is what lies in best/."""
    data, held_out = text_file(tmp_path), text_file(tmp_path, rows=9, name="held_out.txt", seed=1)
    words = (*TEXT, "--steps", "20", *ALWAYS, "--eval-file", held_out, "--lr", "3e-4")
    train(data, tmp_path / "whole", *words)
    train(data, tmp_path / "back", *words)
    for _ in range(2):  # twice, since checkpoints that stepped aside before are in the way then
        again = hrm("train", "--resume-from", tmp_path / "back" / "checkpoints" / "step_7")
        assert again.code == 0, again.err
        assert_same_run(tmp_path / "whole", tmp_path / "back", stopped_at=7)
    aside = sorted(path.name for path in (tmp_path / "back" / "checkpoints").glob("*superseded*"))
    assert len(aside) == 4, "two later checkpoints stepped aside, twice, and none was deleted"
    best = json.loads((tmp_path / "back" / "best" / "metadata.json").read_text())
    assert best["step"] > 7, "the better model must lie behind the checkpoint"
    worse = hrm("train", "--resume-from", tmp_path / "back" / "checkpoints" / "step_7", "--lr", "20")
    assert worse.code == 0
    best = json.loads((tmp_path / "back" / "best" / "metadata.json").read_text())
    said = json.loads((tmp_path / "back" / "metadata.json").read_text())["best"]
    assert said == best["best"] and said["step"] == best["step"]


def test_a_finished_run_resumed_stays_as_it_is(tmp_path: Path) -> None:
    data = puzzle_file(tmp_path)
    words = (*PUZZLE, "--epochs", "2", "--eval-file", data, "--save-every", "1")
    train(data, tmp_path / "b", *words)
    before, metadata = files_below(tmp_path / "b"), json.loads((tmp_path / "b" / "metadata.json").read_text())
    assert metadata["figures"]
    assert hrm("train", "--bundle-dir", tmp_path / "b", "--resume").code == 0
    after = files_below(tmp_path / "b")
    changing = ("metadata.json", "metrics.jsonl", "training_args.json", "tensorboard/", ".generation.json")
    assert {n: v for n, v in before.items() if not n.startswith(changing)} == {
        n: v for n, v in after.items() if not n.startswith(changing)
    }
    assert len(records(tmp_path / "b", "eval")) == 1
    now = json.loads((tmp_path / "b" / "metadata.json").read_text())
    assert {**now, "written": ""} == {**metadata, "written": ""}


def test_more_epochs_after_the_end(tmp_path: Path) -> None:
    """No epoch is begun again: two and then three are three (the rate is constant, since a schedule would differ)."""
    data = text_file(tmp_path)
    words = (*TEXT, "--lr-schedule", "constant")
    train(data, tmp_path / "whole", *words, "--epochs", "3")
    train(data, tmp_path / "more", *words, "--epochs", "2")
    assert hrm("train", "--bundle-dir", tmp_path / "more", "--resume", "--epochs", "3").code == 0
    assert computed(tmp_path / "whole") == computed(tmp_path / "more")
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "more" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("supervision", ["segment", "rollout"])
def test_the_same_effective_batch_cut_otherwise(supervision: str, tmp_path: Path) -> None:
    """8 rows at once, then 2 x 4 and 4 x 2: the same slots go on from the same carries. Sums are taken in another
    order, so float32 weights may differ by rounding: 1e-5 is some 100 times the rounding of 10 updates."""
    data = puzzle_file(tmp_path, count=30)
    words = (*PUZZLE, "--supervision", supervision, "--steps", "12", "--puzzle-emb-ndim", "8", "--optimizer", "sgd")
    words = (*words, "--no-amp")
    train(data, tmp_path / "whole", *words, "--lr", "0.05", "--batch-size", "8")
    for rows, accumulation in ((4, 2), (2, 4)):
        bundle = tmp_path / f"cut{rows}"
        with stopping_at(6):
            train(data, bundle, *words, "--lr", "0.05", "--batch-size", "8")
        split = ("--batch-size", str(rows), "--gradient-accumulation-steps", str(accumulation))
        assert hrm("train", "--bundle-dir", bundle, "--resume", *split).code == 0
        a, b = load_file(tmp_path / "whole" / "model.safetensors"), load_file(bundle / "model.safetensors")
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5, err_msg=name)
        slots = [load_file(x / "checkpoints/step_12/slots_00000000.safetensors") for x in (tmp_path / "whole", bundle)]
        np.testing.assert_array_equal(slots[0]["feed.taken"], slots[1]["feed.taken"])
        if supervision == "segment":
            for name in ("carry.steps", "carry.halted", "carry.data.inputs", "carry.data.puzzle_identifiers"):
                np.testing.assert_array_equal(slots[0][name], slots[1][name], err_msg=name)
            np.testing.assert_allclose(slots[0]["carry.z_h"], slots[1]["carry.z_h"], rtol=0, atol=1e-4)


def test_another_effective_batch_is_refused(tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    train(data, bundle, *TEXT, "--steps", "3")
    before = files_below(bundle)
    refused(
        2,
        *("train", "--bundle-dir", bundle, "--resume", "--steps", "5", "--batch-size", "3"),
        naming=("effective batch 3", "trained with 4", "--batch-size"),
    )
    assert files_below(bundle) == before
    assert hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "5").code == 0


CHANGED: dict[str, Any] = {
    "--hidden-size": "64",
    "--num-layers": "4",
    "--l-cycles": "3",
    "--vocab-size": "310",
    "--max-seq-len": "8",
    "--optimizer": "sgd",
    "--seed": "5",
    "--ema": "0.5",
    "--retrain-tokenizer": None,
    "--no-linear-dataset": None,
}


@pytest.mark.parametrize("option", CHANGED)
def test_what_a_resumed_run_must_not_change(option: str, tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    train(data, bundle, *TEXT, "--steps", "2")
    before = files_below(bundle)
    words = [option] if CHANGED[option] is None else [option, CHANGED[option]]
    ran = hrm("train", "--bundle-dir", bundle, "--resume", *words)
    assert ran.code == 2 and ran.faults and "Traceback" not in ran.err
    assert any(option.removeprefix("--no-") in fault or "layers" in fault for fault in ran.faults), ran.err
    assert files_below(bundle) == before


FREE: dict[str, tuple[str, ...]] = {
    "attention kernel": ("--no-use-flash-attn",),
    "loss coefficients": (*("--moe-load-balance-coef", "0.1"), *("--moe-router-z-coef", "0"), "--halt-margin", "0.5"),
    "capacity, dropout and gradient": (*("--moe-capacity-factor", "2"), *("--dropout-rate", "0.1"), "--bp-steps", "1"),
    "halting rule": ("--halt-rule", "none"),
    "device and threads": ("--device", "cpu", "--threads", "2"),
    "memory": ("--no-amp", "--no-gradient-checkpointing", "--use-chunked-training", "--chunk-size", "8"),
    "optimisation": (
        "--lr",
        "1e-3",
        "--weight-decay",
        "0",
        "--beta2",
        "0.99",
        "--grad-clip",
        "0",
        "--lr-schedule",
        "wsd",
    ),
}


@pytest.mark.parametrize("case", FREE)
def test_what_a_resumed_run_may_change(case: str, tmp_path: Path) -> None:
    """What decides neither tensors nor the meaning of the saved state: the usual reason is another device."""
    train(text_file(tmp_path), tmp_path / "b", *TEXT, *EXPERTS, "--steps", "2")
    ran = hrm("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "3", *FREE[case])
    assert ran.code == 0, ran.err
    assert [record["step"] for record in records(tmp_path / "b")] == [1, 2, 3]


def test_a_resumed_run_of_puzzles_may_explore_otherwise(tmp_path: Path) -> None:
    train(puzzle_file(tmp_path), tmp_path / "b", *PUZZLE, "--steps", "2")
    ran = hrm("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "3", "--halt-exploration-prob", "0.1")
    assert ran.code == 0, ran.err


def test_a_checkpoint_that_the_ledger_does_not_know_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And rank 0, which alone opens the ledger, refuses it where the other ranks wait for its answer."""
    bundle, waiting = tmp_path / "b", [False]
    train(text_file(tmp_path), bundle, *TEXT, "--steps", "4", "--save-every", "2", "--keep", "9")
    with sqlite3.connect(bundle / "ledger.sqlite") as database:
        database.execute("DELETE FROM rounds WHERE round = 2")
    before = files_below(bundle)
    real_from_leader, real_opening = World.from_leader, session._ledger_writer

    def from_leader(world: World, make: Callable[[], Any]) -> Any:
        waiting[0] = True
        try:
            return real_from_leader(world, make)
        finally:
            waiting[0] = False

    def opening(*words: Any) -> Any:
        assert waiting[0]
        return real_opening(*words)

    monkeypatch.setattr(World, "from_leader", from_leader)
    monkeypatch.setattr(session, "_ledger_writer", opening)
    refused(5, "train", "--resume-from", bundle / "checkpoints" / "step_2", naming=("ledger",))
    after = files_below(bundle)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {name for name in changed if not name.startswith("ledger.sqlite")} == {".generation.json"}


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_resumed_puzzles_take_the_type_of_activations_of_now(before: str, after: str, tmp_path: Path) -> None:
    bundle, names = tmp_path / "b", {"fp32": "F32", "bf16": "BF16"}
    train(puzzle_file(tmp_path), bundle, *PUZZLE, "--activations", before, "--steps", "2")
    ran = hrm("train", "--bundle-dir", bundle, "--resume", "--activations", after, "--steps", "4")
    assert ran.code == 0, ran.err
    for step, kind in ((2, before), (4, after)):
        (slots,) = (bundle / "checkpoints" / f"step_{step}").glob("slots_*.safetensors")
        assert stored_type(slots, "carry.z_h") == stored_type(slots, "carry.z_l") == names[kind]


def stored_type(file: Path, name: str) -> str:
    with safe_open(file, "numpy") as tensors:
        stored: str = tensors.get_slice(name).get_dtype()
    return stored


def test_the_refusal_names_the_default_that_the_run_was_trained_with(tmp_path: Path) -> None:
    train(text_file(tmp_path), tmp_path / "b", *TEXT, "--steps", "1")
    resume = ("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "2")
    for words, then in {
        ("--window-size", "5"): "the default (all positions before it)",
        ("--d-ff", "64"): "the default (the width of --expansion)",
        ("--ema", "0.5"): "the default (no moving average)",
        ("--l-cycles", "3"): "2",
        ("--no-packing",): "--packing.",
        ("--use-moe",): "--no-use-moe.",
    }.items():
        message = refused(2, *resume, *words, naming=(" ".join(words), f"was trained with {then}"))
        assert "None" not in message
    train(text_file(tmp_path), tmp_path / "e", *TEXT, "--steps", "1", "--ema", "0.5")
    assert hrm("train", "--bundle-dir", tmp_path / "e", "--resume", "--steps", "2", "--ema", "0.9").code == 0


def test_a_dry_run_refuses_a_resume_on_another_corpus_as_the_run_does(tmp_path: Path) -> None:
    bundle, other = tmp_path / "b", text_file(tmp_path, rows=40, name="other.txt", seed=3)
    train(text_file(tmp_path), bundle, *TEXT, "--steps", "1")
    resume = ("train", "--bundle-dir", bundle, "--resume", "--steps", "2", "--dataset-file", other)
    naming = (other, "when the run began")
    assert refused(5, *resume, "--dry-run", naming=naming) == refused(5, *resume, naming=naming)


def test_a_preset_that_does_not_fit_the_run_to_resume_is_one_fault(tmp_path: Path) -> None:
    """Not one for each option that the preset sets and the user did not give."""
    train(text_file(tmp_path), tmp_path / "b", *TEXT, "--steps", "1")
    resume = ("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "2")
    message = refused(2, *resume, "--model-preset", "nano", naming=("error: --model-preset nano", "--hidden-size 32"))
    assert len(message) < 300
    refused(2, *resume, "--num-layers", "6", naming=("error: --num-layers 6", "--h-layers 1 --l-layers 1"))


def test_every_change_is_told_at_once(tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    train(data, bundle, *TEXT, "--steps", "2")
    ran = hrm("train", "--bundle-dir", bundle, "--resume", "--hidden-size", "64", "--seed", "5", "--h-cycles", "1")
    assert ran.code == 2
    assert len(ran.faults) == 3 and all("trained with" in fault for fault in ran.faults)


def test_other_data_under_the_same_name(tmp_path: Path) -> None:
    """Changed puzzles are noticed, and so is changed text; the run keeps its data and its tokenizer."""
    puzzles, bundle = puzzle_file(tmp_path), tmp_path / "p"
    train(puzzles, bundle, *PUZZLE, "--steps", "2")
    puzzle_file(tmp_path, seed=3)
    before = files_below(bundle)
    refused(5, "train", "--bundle-dir", bundle, "--resume", "--steps", "4", naming=(puzzles, "fingerprint"))
    assert files_below(bundle) == before

    text, bundle = text_file(tmp_path), tmp_path / "t"
    held_out = text_file(tmp_path, rows=9, name="held_out.txt", seed=1)
    train(text, bundle, *TEXT, "--steps", "2")
    with text.open("a", encoding="utf-8") as more:
        more.write(" and something else")
    before = files_below(bundle)
    words = ("train", "--bundle-dir", bundle, "--resume", "--steps", "4")
    refused(5, *words, "--eval-file", held_out, naming=(text, "not what the run was trained on"))
    refused(5, *words, naming=(text, "not what the run was trained on", "--student-init"))
    assert files_below(bundle) == before
    text_file(tmp_path)
    assert hrm(*words).code == 0


def test_held_out_data_may_come_later(tmp_path: Path) -> None:
    text, bundle = text_file(tmp_path), tmp_path / "t"
    held_out = text_file(tmp_path, rows=9, name="held_out.txt", seed=1)
    train(text, bundle, *TEXT, "--steps", "2")
    ran = hrm("train", "--bundle-dir", bundle, "--resume", "--eval-file", held_out)
    assert ran.code == 0, ran.err
    assert [record["step"] for record in records(bundle, "eval")] == [2]
    other = text_file(tmp_path, rows=9, name="other.txt", seed=2)
    assert hrm("train", "--bundle-dir", bundle, "--resume", "--eval-file", other).code == 0
    assert len(records(bundle, "eval")) == 2


def test_a_branch_in_another_bundle(tmp_path: Path) -> None:
    data, held_out = text_file(tmp_path), text_file(tmp_path, rows=9, name="held_out.txt", seed=1)
    words = (*TEXT, "--steps", "10", "--save-every", "4", "--eval-every", "2", "--eval-file", held_out)
    train(data, tmp_path / "trunk", *words)
    before = files_below(tmp_path / "trunk")
    from_4 = ("train", "--resume-from", tmp_path / "trunk" / "checkpoints" / "step_4")
    assert hrm(*from_4, "--bundle-dir", tmp_path / "branch").code == 0
    assert files_below(tmp_path / "trunk") == before
    assert (tmp_path / "branch" / "model.safetensors").read_bytes() == before["model.safetensors"]
    assert hrm("generate", tmp_path / "branch" / "best", "--prompt", "a", "--max-new-tokens", "2").code == 0
    refused(2, *from_4, "--bundle-dir", tmp_path / "branch", naming=(tmp_path / "branch", "already contains a run"))


@pytest.mark.parametrize("how", ["--resume", "--resume-from"])
def test_the_settings_of_another_run_are_refused(how: str, tmp_path: Path) -> None:
    """They were passed over without a word. Under --auto-resume they are those of the first launch."""
    data, bundle, other = text_file(tmp_path), tmp_path / "b", tmp_path / "other"
    train(data, bundle, *TEXT, "--steps", "2")
    train(data, other, *TEXT, "--steps", "4", "--config", bundle / "training_args.json")
    again = (how, bundle / "checkpoints" / "step_2") if how == "--resume-from" else (how, "--bundle-dir", bundle)
    config = other / "training_args.json"
    refused(2, "train", *again, "--config", config, naming=(f"--config {config}", "Leave --config out", how))
    launch = ("train", "--config", config, "--bundle-dir", bundle, "--auto-resume")
    assert hrm(*launch).code == 0 and records(bundle)[-1]["step"] == 2
