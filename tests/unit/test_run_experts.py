"""Whole runs of models with experts: they learn, say how their experts are used, and are used like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import MOE_LR, moderate_lr
from tests.support.runs import EXPERTS, PUZZLE, TEXT, hrm, last_said, puzzle_file, records, text_file, train

RUNS: dict[str, tuple[str, ...]] = {
    "text": TEXT,
    "transformer": (*TEXT, "--arch", "transformer"),
    "carried": PUZZLE,
    "rollout": (*PUZZLE, "--supervision", "rollout"),
}


@pytest.fixture(scope="module", params=RUNS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The kind of run, and the folder with its data and its bundle b."""
    folder = tmp_path_factory.mktemp("experts")
    data = puzzle_file(folder) if request.param in ("carried", "rollout") else text_file(folder)
    train(data, folder / "b", *RUNS[request.param], *EXPERTS, "--steps", "24", "--lr", "1e-3", "--eval-file", data)
    return request.param, folder


def test_the_loss_falls(trained: tuple[str, Path]) -> None:
    # A transformer has one segment, whose loss is `loss`.
    name = "loss" if trained[0] == "transformer" else "segment_loss"
    losses = [record[name] for record in records(trained[1] / "b")]
    assert sum(losses[-6:]) < 0.97 * sum(losses[:6])


def test_usage_is_told(trained: tuple[str, Path]) -> None:
    """Shares and probabilities of four experts add up to 1; even use has a balance loss of 1."""
    for record in records(trained[1] / "b"):
        for what in ("share", "probability"):
            numbers = [record[f"expert_usage_{what}_{expert}"] for expert in range(4)]
            assert all(0 <= number <= 1 for number in numbers)
            assert sum(numbers) == pytest.approx(1, rel=1e-4)
        assert 0 <= record["expert_usage_dropped"] < 1
        assert 0.5 < record["moe_balance_loss"] < 4
        assert record["router_z_loss"] > 0
    assert any(record["expert_usage_dropped"] > 0 for record in records(trained[1] / "b"))


def test_the_bundle_is_used(trained: tuple[str, Path]) -> None:
    kind, folder = trained
    config = json.loads((folder / "b" / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"]) == (4, 2)
    assert records(folder / "b", "eval")[-1]["loss"] > 0
    if kind in ("carried", "rollout"):
        ran = hrm("solve", folder / "b", "--file", folder / "puzzles.safetensors", "--split", "train", "--stop-by-q")
        assert ran.code == 0 and "solved exactly" in ran.out, ran.err
    else:
        adaptive = () if kind == "transformer" else ("--adaptive",)
        ran = hrm("generate", folder / "b", "--prompt", "abc", "--max-new-tokens", "4", *adaptive)
        assert ran.code == 0 and ran.out.startswith("abc"), ran.err


def test_experts_are_the_default_of_the_older_trainer(tmp_path: Path) -> None:
    words = [word for word in last_said((*TEXT, "--steps", "1", "--d-ff", "32")) if word != "--no-use-moe"]
    ran = hrm("train-actv1", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *words)
    assert ran.code == 0, ran.err
    assert "active per token" in ran.out
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"], config["moe_capacity_factor"]) == (8, 2, 1.25)


def test_a_preset_is_dense_unless_told() -> None:
    assert not load_settings({"--model-preset": "nano"}).model.use_moe
    assert load_settings({"--model-preset": "nano", "--use-moe": True}).model.use_moe
    assert not load_settings({}).model.use_moe
    assert load_settings({"--profile": "hrm-hf"}).model.use_moe


def test_the_losses_count(tmp_path: Path) -> None:
    """With a large coefficient the balance loss comes down to its least, 1; without one it stays where it was."""
    data, found = text_file(tmp_path), {}
    for coefficient in ("0", "5"):
        bundle = tmp_path / coefficient
        words = (*TEXT, *EXPERTS, "--steps", "30", "--lr", "1e-3", "--no-amp", "--moe-load-balance-coef", coefficient)
        train(data, bundle, *words)
        found[coefficient] = records(bundle)
    assert found["0"][0]["moe_balance_loss"] == found["5"][0]["moe_balance_loss"]
    assert found["5"][-1]["moe_balance_loss"] < found["0"][-1]["moe_balance_loss"] - 0.005
    first = [found[coefficient][0] for coefficient in ("0", "5")]
    assert first[1]["objective"] - first[0]["objective"] == pytest.approx(5 * first[0]["moe_balance_loss"], rel=1e-4)


def test_a_high_learning_rate_is_lowered(tmp_path: Path) -> None:
    """Said once, and no error under --strict: it is what the option does."""
    words = (*TEXT, *EXPERTS, "--steps", "1", "--lr", "0.01", "--strict", "--lr-schedule", "constant")
    train(text_file(tmp_path), tmp_path / "b", *words)
    told = [event for event in records(tmp_path / "b", "event") if "--lr" in event["message"]]
    assert len(told) == 1 and told[0]["level"] == "WARNING"
    assert "0.01 is lowered to 0.001" in told[0]["message"] and "--no-auto-adjust-lr" in told[0]["message"]
    assert records(tmp_path / "b")[0]["lr"] == 1e-3
    # A resumed run has the lowered rate already.
    ran = hrm("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "2")
    assert ran.code == 0, ran.err
    assert len([event for event in records(tmp_path / "b", "event") if "--lr" in event["message"]]) == 1


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"--lr": "0.01"}, MOE_LR),
        ({"--lr": "0.01", "--no-auto-adjust-lr": True}, 0.01),
        ({"--lr": "0.01", "--no-moe": True}, 0.01),
        ({"--lr": "0.001"}, 1e-3),
        ({"--lr": "5e-4"}, 5e-4),
    ],
)
def test_it_is_never_raised(options: dict[str, str | bool], rate: float) -> None:
    with_experts: dict[str, str | bool] = {} if "--no-moe" in options else {"--use-moe": True}
    settings, notes = moderate_lr(load_settings({**options, **with_experts}))
    assert settings.optimizer.lr == rate
    assert len(notes) == (1 if rate == MOE_LR and options["--lr"] == "0.01" else 0)


def test_an_older_run_goes_on_without_experts(tmp_path: Path) -> None:
    """Its stored settings say nothing of them, and neither does its configuration."""
    train(text_file(tmp_path), tmp_path / "b", *TEXT, "--steps", "2")
    for name in ("training_args.json", "config.json"):
        path = tmp_path / "b" / name
        stored = json.loads(path.read_text())
        leaves = stored["settings"]["model"] if "settings" in stored else stored
        for leaf in [leaf for leaf in leaves if "moe" in leaf or "expert" in leaf]:
            del leaves[leaf]
        path.write_text(json.dumps(stored))
    ran = hrm("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "3")
    assert ran.code == 0, ran.err
    assert len(records(tmp_path / "b")) == 3


def test_arch_summary_tells_total_and_active() -> None:
    words = ("arch-summary", "--hidden-size", "32", "--num-heads", "2", "--num-layers", "2", "--d-ff", "32")
    dense, sparse = (
        json.loads(hrm(*words, *more, "--json").out) for more in (("--no-moe",), ("--use-moe", "--num-experts", "4"))
    )
    ffn = 2 * 3 * 32 * 32
    assert dense["active_parameters"] == dense["total_parameters"]
    assert sparse["total_parameters"] == dense["total_parameters"] + 3 * ffn + 2 * 4 * 32
    assert sparse["active_parameters"] == sparse["total_parameters"] - 2 * ffn
    assert "active" in hrm(*words, "--use-moe").out and "active" not in hrm(*words, "--no-moe").out


def test_more_chosen_than_there_are() -> None:
    ran = hrm("arch-summary", "--use-moe", "--num-experts", "2", "--num-experts-per-tok", "3")
    assert ran.code == 2 and "--num-experts-per-tok 3 with --num-experts 2" in ran.err
