"""A profile is another set of defaults: exactly those of its script, and under everything that anybody says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hrm_ray.errors import SettingsError
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.options import options
from hrm_ray.settings.profiles import PROFILES
from hrm_ray.settings.resolve import fit_warmup, resolve_task
from hrm_ray.settings.tree import leaf_keys, to_dotted
from tests.support.runs import PUZZLE, TEXT, computed, hrm, last_said, puzzle_file, records, refused, text_file, train

TRAIN_ADVANCED: dict[str, Any] = {
    "adapt.lora_r": 8,
    "data.linear_dataset": False,
    "data.max_seq_len": 256,
    "data.shuffle_buffer_size": 10000,
    "data.vocab_size": 16000,
    "memory.amp": False,
    "model.activation": "gelu",
    "model.d_ff": 2048,
    "model.dropout_rate": 0.1,
    "model.h_layers": 3,
    "model.hidden_size": 512,
    "model.l_layers": 3,
    "model.num_heads": 8,
    "model.use_moe": False,
    "optimizer.batch_size": 32,
    "optimizer.lr": 5e-4,
    "optimizer.warmup_steps": 500,
    "run.epochs": 3,
    "run.eval_every": 500,
    "run.log_every": 10,
    "run.profile": "train-advanced",
    "run.save_every": 1000,
}
"""The script's own defaults, word for word as FEATURES.md lists them."""
HRM_HF: dict[str, Any] = {
    "data.max_seq_len": None,
    "data.text_rows": "line",
    "data.vocab_size": 16000,
    "memory.amp": True,
    "memory.gradient_checkpointing": True,
    "model.h_layers": 2,
    "model.hidden_size": 512,
    "model.num_experts": 8,
    "model.use_moe": True,
    "optimizer.batch_size": 8,
    "optimizer.grad_clip": 0.5,
    "optimizer.lr": 2e-4,
    "run.profile": "hrm-hf",
    "run.save_every": 200,
}
"""Those of HRM-HF, some of them the sections' own."""


def test_the_profiles_are_the_choices() -> None:
    assert set(PROFILES) == set(options()["run.profile"].choices)
    assert {key for leaves in PROFILES.values() for key in leaves} <= set(leaf_keys())


@pytest.mark.parametrize("expected", [TRAIN_ADVANCED, HRM_HF], ids=["train-advanced", "hrm-hf"])
def test_the_script_s_defaults_and_no_others(expected: dict[str, Any]) -> None:
    plain, profile = to_dotted(load_settings({})), to_dotted(load_settings({"--profile": expected["run.profile"]}))
    assert {key: profile[key] for key in expected} == expected
    others = set(plain) - set(expected)
    assert {key: profile[key] for key in others} == {key: plain[key] for key in others}


def test_everything_said_lies_over_a_profile(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: {profile: train-advanced, epochs: 7}\noptimizer.batch_size: 16\n", encoding="utf-8")
    settings = load_settings({"--batch-size": "4"}, file, None, {"optimizer.lr": 1e-3})
    assert (settings.optimizer.batch_size, settings.run.epochs, settings.optimizer.lr) == (4, 7, 1e-3)
    assert (settings.optimizer.warmup_steps, settings.run.save_every) == (500, 1000)
    assert settings.given == {"run.profile", "run.epochs", "optimizer.batch_size", "optimizer.lr"}


def test_a_resumed_run_lies_over_a_profile() -> None:
    stored = to_dotted(load_settings({"--profile": "train-advanced", "--lr": "1e-2"}))
    again = load_settings({"--profile": "train-advanced"}, base=stored)
    assert (again.optimizer.lr, again.optimizer.batch_size, again.given) == (1e-2, 32, frozenset({"run.profile"}))
    # A run that an older version stored without some leaf gets the default of its own profile for it.
    del stored["optimizer.warmup_steps"]
    assert load_settings({}, base=stored).optimizer.warmup_steps == 500


def test_an_unknown_profile_is_one_fault() -> None:
    with pytest.raises(SettingsError, match="train-advanced") as caught:
        load_settings({"--profile": "train-advance", "--warmup-steps": "500"})
    assert [fault.value for fault in caught.value.faults] == ["--profile train-advance"]


def test_what_a_profile_fills_is_not_held_against_the_user() -> None:
    """Its evaluation waits for held-out data, and its length is one for text."""
    settings = load_settings({"--profile": "train-advanced"})
    assert settings.run.eval_every == 500 and settings.data.eval_file is None
    assert resolve_task(settings, "puzzle", 81).data.max_seq_len == 81
    assert resolve_task(settings, "lm").data.max_seq_len == 256
    with pytest.raises(SettingsError, match="81 tokens"):
        resolve_task(load_settings({"--profile": "train-advanced", "--seq-len": "256"}), "puzzle", 81)


def test_a_default_gives_way_and_a_typed_value_does_not() -> None:
    short = {"--profile": "train-advanced", "--steps": "300"}
    settings, notes = fit_warmup(load_settings(short), 300)
    assert settings.optimizer.warmup_steps == 30
    assert notes == ["--warmup-steps 500 (default) is lowered to 30: the run has 300 steps."]
    with pytest.raises(SettingsError, match="--warmup-steps 500 with --steps 300"):
        load_settings({**short, "--warmup-steps": "500"})
    # A run without an end has no step at which the warm-up would be too long.
    assert fit_warmup(settings, 0) == (settings, [])


@pytest.mark.parametrize(("usual", "data"), [(TEXT, text_file), (PUZZLE, puzzle_file)])
def test_a_run_under_the_profile(usual: tuple[str, ...], data: Any, tmp_path: Path) -> None:
    """Three epochs of batches of 32, with evaluation only at the end, where there is something to evaluate on."""
    words = [*usual, "--halt-exploration-prob", "0", "--halt-max-steps", "1", "--profile", "train-advanced"]
    del words[words.index("--batch-size") : words.index("--batch-size") + 2]
    file = data(tmp_path)
    naming = ("--warmup-steps 3", "the run has 3 steps", "--warmup-steps 2")
    long = ("train", "--dataset-file", file, "--bundle-dir", tmp_path / "b", *last_said(words), "--warmup-steps", "3")
    refused(2, *long, naming=naming)
    assert not (tmp_path / "b").exists()
    train(file, tmp_path / "b", *words)
    assert "--warmup-steps 500 (default) is lowered to 0" in (tmp_path / "b" / "metrics.jsonl").read_text()
    last = records(tmp_path / "b")[-1]
    assert (last["effective_batch_size"], last["epoch"], last["step"]) == (32, 2, 3)
    assert last["lr"] == pytest.approx(5e-5)


def test_a_resumed_run_keeps_its_profile(tmp_path: Path) -> None:
    words = [*TEXT, "--warmup-steps", "0", "--profile", "train-advanced"]
    train(text_file(tmp_path), tmp_path / "b", *words, "--steps", "2")
    resume = ("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", "4")
    refused(2, *resume, "--profile", "hrm-hf", naming=("--profile hrm-hf", "train-advanced"))
    assert hrm(*resume, "--profile", "train-advanced").code == 0
    assert [record["step"] for record in computed(tmp_path / "b")] == [1, 2, 3, 4]
