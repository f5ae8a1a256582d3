"""Without --profile a new run has defaults that are chosen from the data and the device, and said in one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.cli import dry_run
from hrm_ray.data.detect import DataFacts
from hrm_ray.launch import defaults, preflight
from hrm_ray.launch.defaults import with_checkpointing, with_defaults
from hrm_ray.launch.run_directory import load_run
from hrm_ray.model.config import ModelConfig, model_config
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train import time_estimate
from hrm_ray.train.time_estimate import update_s
from tests.support.runs import computed, hrm, puzzle_file, refused, text_file


@pytest.fixture(autouse=True)
def _without_traced_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs here are about the settings, and tracing an update takes seconds."""
    monkeypatch.setattr(dry_run, "describe_memory", lambda resolved: "memory  not traced")


def facts(size_bytes: int) -> DataFacts:
    return DataFacts("lm", "x.txt", "train", 1, size_bytes, 0, None, columns=False)


def chosen(*, steps: str = "200", **more: str) -> tuple[RunSettings, ModelConfig]:
    settings = resolve_task(with_defaults(load_settings({"--steps": steps, **more}), facts(10**6), "cpu"), "lm")
    return settings, model_config(settings, 4096)


def test_the_choice_is_said_in_one_line(tmp_path: Path) -> None:
    ran = hrm("train", "--dataset-file", text_file(tmp_path, rows=2000), "--dry-run", "--device", "cpu")
    assert ran.code == 0, ran.err
    (line,) = [line for line in ran.out.splitlines() if line.startswith("chosen")]
    form = r"CPU: dense model \(\d\.\d+ million parameters\), float32; about [\d.e+]+ \w+ for 200 steps; --model-preset"
    assert re.search(form, line), line
    shown = dict(re.findall(r"^  (\S+) = (.*)$", ran.out, re.MULTILINE))
    assert shown["model.hidden_size"] == "128" and shown["model.use_moe"] == "False"
    assert (shown["memory.amp"], shown["memory.gradient_checkpointing"]) == ("False", "False")
    assert (shown["data.vocab_size"], shown["optimizer.warmup_steps"]) == ("512", "20")
    assert "asked for" not in ran.out + ran.err


@pytest.mark.parametrize(
    ("size_bytes", "device", "preset", "vocab_size"),
    [
        (50_000, "cpu", None, 512),
        (10**6, "cpu", None, 1024),
        (10**9, "cpu", None, 1024),
        (10**6, "cuda", "nano", 4096),
        (10**7, "cuda", "tiny", 8192),
        (10**9, "cuda", "small", 8192),
        (0, "cuda", "small", 8192),
    ],
)
def test_the_size_follows_data_and_device(size_bytes: int, device: str, preset: str | None, vocab_size: int) -> None:
    settings = with_defaults(load_settings({}), facts(size_bytes), device)
    assert (settings.model.model_preset, settings.data.vocab_size) == (preset, vocab_size)
    assert settings.memory.amp is (device == "cuda")
    # A short run on neighbouring rows learns less; a large corpus is not read before the first step.
    assert settings.data.linear_dataset is (size_bytes == 0 or size_bytes > 64_000_000)


@given(
    small=st.integers(1, 10**12),
    more=st.integers(0, 10**12),
    width=st.sampled_from(["32", "128", "512", "2048"]),
    steps=st.integers(1, 10**6),
)
def test_the_vocabulary_grows_with_the_text_and_the_run(small: int, more: int, width: str, steps: int) -> None:
    settings = load_settings({"--hidden-size": width, "--steps": str(steps)})
    longer = load_settings({"--hidden-size": width, "--steps": str(2 * steps)})
    less, larger = (defaults._vocabulary(size, settings) for size in (small, small + more))
    assert 512 <= less <= larger <= defaults._vocabulary(small + more, longer) <= 16384


def test_what_the_user_gives_stays() -> None:
    said: dict[str, str | bool] = {"--lr": "1e-5", "--amp": True, "--vocab-size": "777", "--use-moe": True}
    settings = with_defaults(load_settings(said), facts(10**6), "cpu")
    assert (settings.optimizer.lr, settings.memory.amp, settings.data.vocab_size) == (1e-5, True, 777)
    assert settings.model.use_moe and settings.model.hidden_size == 128
    by_hand = with_defaults(load_settings({"--hidden-size": "64"}), facts(10**6), "cpu")
    assert (by_hand.model.hidden_size, by_hand.model.h_layers, by_hand.optimizer.lr) == (64, 2, 2e-4)
    assert with_defaults(load_settings({"--model-preset": "small"}), facts(10**6), "cpu").optimizer.lr == 1e-3
    assert with_defaults(load_settings({"--steps": "30"}), facts(10**6), "cpu").optimizer.warmup_steps == 3


@pytest.mark.parametrize("profile", ["hrm-hf", "train-advanced"])
def test_a_profile_leaves_nothing_to_choose(profile: str) -> None:
    settings = load_settings({"--profile": profile})
    assert with_defaults(settings, facts(10**6), "cpu") == settings
    assert settings.data.vocab_size == 16000


def test_train_actv1_has_the_older_defaults(tmp_path: Path) -> None:
    words = ("--dataset-file", text_file(tmp_path), "--dry-run", "--device", "cpu")
    shown = hrm("train-actv1", *words).out
    assert "run.profile = hrm-hf" in shown and "model.use_moe = True" in shown and "training_data" in shown
    assert "chosen " not in shown
    other = hrm("train-actv1", *words, "--profile", "train-advanced").out
    assert "run.profile = train-advanced" in other and "output_advanced" in other


def test_a_resumed_run_keeps_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    corpus = text_file(tmp_path, rows=60)
    words = ("--dataset-file", corpus, "--max-seq-len", "16", "--threads", "1", "--device", "cpu")
    assert hrm("train", *words, "--steps", "1").code == 0
    bundle = Path("artifacts", "brains", "corpus")
    stored = json.loads((bundle / "training_args.json").read_text(encoding="utf-8"))["settings"]
    assert (stored["model"]["h_layers"], stored["model"]["l_layers"]) == (1, 1) and stored["memory"]["amp"] is False
    assert stored["run"]["profile"] is None
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    assert size < 40e6, "a bundle with one checkpoint"
    for profile in (None, "hrm-hf"):
        resumed = load_run({"--bundle-dir": str(bundle), "--resume": True}, profile=profile)
        assert resumed.run.profile is None and resumed.model.hidden_size == 128
    ran = hrm("train", "--resume", "--dataset-file", corpus, "--steps", "2")
    assert ran.code == 0 and "at step 2" in ran.out and "chosen" not in ran.out


def test_puzzles_have_a_small_hrm(tmp_path: Path) -> None:
    ran = hrm("train", "--dataset-file", puzzle_file(tmp_path), "--dry-run", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert re.search(r"chosen  CPU: dense model .* for 2500 steps$", ran.out, re.MULTILINE), ran.out
    assert "optimizer.optimizer = adam-atan2" in ran.out and "model.hidden_size = 64" in ran.out
    own = hrm(
        "train", "--dataset-file", puzzle_file(tmp_path), "--dry-run", "--steps", "50", "--optimizer", "adamw"
    ).out
    assert "for 50 steps" in own and "optimizer.lr = 0.0002" in own


def test_recomputation_only_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, config = chosen()
    assert with_checkpointing(settings, config, "cpu", 1).memory.gradient_checkpointing is False
    monkeypatch.setattr(preflight, "available_memory_bytes", lambda: 10**7)
    assert with_checkpointing(settings, config, "cpu", 1).memory.gradient_checkpointing is True
    given_off = load_settings({"--no-gradient-checkpointing": True})
    assert with_checkpointing(given_off, config, "cpu", 1) == given_off


def test_the_time_of_a_run_grows_with_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Any] = []

    def one_second(settings: RunSettings, config: ModelConfig, rows: int, threads: int) -> float:
        timed.append((config.h_layers, config.halt_max_steps, rows, threads))
        return 1.0

    monkeypatch.setattr(time_estimate, "_timed", one_second)
    settings, config = chosen()
    once = update_s(settings, config, 2)
    accumulated, _ = chosen(**{"--gradient-accumulation-steps": "4"})
    assert once is not None and update_s(accumulated, config, 2) == pytest.approx(4 * once)
    deeper = update_s(settings, replace(config, h_layers=2, l_layers=2), 2)
    assert deeper is not None and 1.3 * once < deeper < 2 * once
    assert {(layers, halts, threads) for layers, halts, _, threads in timed} == {(1, 1, 2)}
    assert defaults.expected_time(settings, config, "cpu", 2) == f"about {defaults._duration(200 * once)} for 200 steps"
    assert defaults.expected_time(settings, config, "cuda", 2) is None
    assert update_s(settings, replace(config, hidden_size=8192, intermediate_size=22016), 2) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 seconds"), (60, "60 seconds"), (100, "1.7 minutes"), (9000, "2.5 hours")]
)
def test_durations(seconds: float, text: str) -> None:
    assert defaults._duration(seconds) == text


def test_the_settings_of_a_bundle_are_a_settings_file(tmp_path: Path) -> None:
    """training_args.json, or the same as YAML, gives the same run, in another bundle; options override it."""
    words = ("--max-seq-len", "16", "--batch-size", "2", "--threads", "1", "--device", "cpu", "--steps", "3")
    ran = hrm(
        "train", "--dataset-file", text_file(tmp_path), *words, "--log-every", "1", "--bundle-dir", tmp_path / "a"
    )
    assert ran.code == 0, ran.err
    args = tmp_path / "a" / "training_args.json"
    as_yaml = tmp_path / "run.yaml"
    as_yaml.write_text(yaml.safe_dump(json.loads(args.read_text())), encoding="utf-8")
    for name, config in (("b", args), ("c", as_yaml)):
        again = hrm("train", "--config", config, "--bundle-dir", tmp_path / name)
        assert again.code == 0 and "no effect" not in again.out and "chosen " not in again.out, again
        assert computed(tmp_path / name) == computed(tmp_path / "a")
    other = hrm("train", "--config", args, "--bundle-dir", tmp_path / "d", "--lr", "1e-5", "--dry-run")
    assert "optimizer.lr = 1e-05" in other.out and "model.hidden_size = 128" in other.out
    stored = json.loads(args.read_text())
    stored["settings"]["model"]["of_tomorrow"] = 1
    args.write_text(json.dumps(stored))
    refused(2, "train", "--config", args, "--bundle-dir", tmp_path / "d", naming=("model.of_tomorrow", "not a setting"))
