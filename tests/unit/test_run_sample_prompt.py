"""Text that a run shows of its model while it trains; training itself is the same to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import TEXT, computed, files_below, hrm, puzzle_file, records, text_file, train


def samples(bundle: Path) -> list[tuple[int, str, str]]:
    found = [record for record in records(bundle, "event") if "sample" in record]
    return [(record["step"], record["prompt"], record["sample"]) for record in found]


@pytest.mark.parametrize("evaluates", [True, False])
def test_training_is_the_same_with_and_without_samples(evaluates: bool, tmp_path: Path) -> None:
    data, prompt = text_file(tmp_path), ("--sample-prompt", "to be")
    words = (*TEXT, "--steps", "5", "--eval-every", "2", "--save-every", "2", "--ema", "0.9", "--use-peft", "--no-amp")
    words = (*words, "--lora-dropout", "0.3", *(("--eval-file", data) if evaluates else ()))
    ran = train(data, tmp_path / "with", *words, *prompt)
    train(data, tmp_path / "without", *words)
    found = samples(tmp_path / "with")
    assert [(step, said) for step, said, _ in found] == [(2, "to be"), (4, "to be"), (5, "to be")]
    assert "step 5: sample: to be" in ran.out
    one, other = (files_below(tmp_path / name / "checkpoints" / "step_4") for name in ("with", "without"))
    states = [name for name in one if name.endswith(".safetensors")]
    assert len(states) >= 2 and [name for name in states if one[name] != other[name]] == []
    for kind in ("train", "eval"):
        assert computed(tmp_path / "with", kind) == computed(tmp_path / "without", kind)
    generated = hrm("generate", tmp_path / "with", "--prompt", "to be", "--temperature", "0", "--max-new-tokens", "64")
    assert generated.code == 0 and found[-1][2].strip() in generated.out


def test_a_prompt_for_puzzles_is_without_effect(tmp_path: Path) -> None:
    ran = hrm("train", "--dataset-file", puzzle_file(tmp_path), "--sample-prompt", "a", "--dry-run")
    assert ran.code == 0 and "--sample-prompt a (it applies to text" in ran.out + ran.err


def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path) -> None:
    ran = hrm("train", "--dataset-file", text_file(tmp_path), "--sample-prompt", "a\udcff", "--dry-run")
    assert ran.code == 2 and "not UTF-8" in ran.err
