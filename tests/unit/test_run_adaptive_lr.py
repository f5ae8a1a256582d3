"""Runs under --adaptive-lr-config: the rate changes, a message says so, a resume gives the same bits, and options of
logging change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import PUZZLE, TEXT, computed, hrm, puzzle_file, records, refused, stopping_at, text_file, train
from tests.unit.test_run_resume import assert_same_run

RULE = "window_steps: 2\nplateau_windows: 1\nmin_improvement: 0.9\ndivergence_rise: 1000\ncooldown_windows: 0\n"
"""No loss falls by nine tenths in two steps, so every second window is a plateau: halved after steps 4, 8, 12, ..."""
STEADY = ("--lr-schedule", "constant", "--lr", "1e-3")


def rule_file(folder: Path, text: str = RULE) -> Path:
    path = folder / "adaptive.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("usual", "data"), [(TEXT, text_file), (PUZZLE, puzzle_file)], ids=["text", "puzzle"])
def test_a_plateau_lowers_the_rate_and_says_why(usual: tuple[str, ...], data: Any, tmp_path: Path) -> None:
    train(data(tmp_path), tmp_path / "b", *usual, *STEADY, "--steps", "9", "--adaptive-lr-config", rule_file(tmp_path))
    rates = [record["lr"] for record in records(tmp_path / "b")]
    assert rates == pytest.approx([1e-3] * 4 + [5e-4] * 4 + [2.5e-4])
    told = [(event["step"], event["level"], event["message"]) for event in records(tmp_path / "b", "event")]
    assert [(step, level) for step, level, _ in told] == [(4, "INFO"), (8, "INFO")]
    assert "Learning rate lowered at step 4: 1 window(s) brought nothing better than a mean loss of" in told[0][2]
    assert "0.25 of the schedule's" in told[1][2]


def test_the_window_holds_the_losses_that_are_logged(tmp_path: Path) -> None:
    """The first window's mean is the mean of its two logged losses."""
    train(
        text_file(tmp_path), tmp_path / "b", *TEXT, *STEADY, "--steps", "4", "--adaptive-lr-config", rule_file(tmp_path)
    )
    losses = [record["objective"] for record in records(tmp_path / "b")]
    (told,) = [event["message"] for event in records(tmp_path / "b", "event")]
    assert f"mean loss of {(losses[0] + losses[1]) / 2:.6g}" in told


def test_divergence_steps_back(tmp_path: Path) -> None:
    """SGD with a rate a thousand times too high: the loss jumps, and the rate goes back by the larger cut."""
    file = rule_file(tmp_path, "window_steps: 1\ndivergence_factor: 0.001\nmin_factor: 0.0001\ncooldown_windows: 2\n")
    words = ("--optimizer", "sgd", "--lr", "200", "--lr-schedule", "constant", "--grad-clip", "0")
    train(text_file(tmp_path), tmp_path / "b", *TEXT, *words, "--steps", "8", "--adaptive-lr-config", file)
    first = next(event for event in records(tmp_path / "b", "event") if event["level"] == "WARNING")
    assert "Learning rate stepped back" in first["message"] and "the mean loss rose to" in first["message"]
    rates = {record["step"]: record["lr"] for record in records(tmp_path / "b")}
    assert rates[first["step"]] == 200 and rates[first["step"] + 1] == pytest.approx(0.2)


def test_the_schedule_and_the_warm_up_stay(tmp_path: Path) -> None:
    """Windows begin after three steps of warm-up; the factor multiplies what the schedule says."""
    words = (*TEXT, "--lr", "1e-3", "--warmup-steps", "3", "--lr-schedule", "linear", "--steps", "10")
    data = text_file(tmp_path)
    train(data, tmp_path / "plain", *words)
    train(data, tmp_path / "b", *words, "--adaptive-lr-config", rule_file(tmp_path))
    plain, ours = ([record["lr"] for record in records(tmp_path / name)] for name in ("plain", "b"))
    assert [one / other for one, other in zip(ours, plain, strict=True)] == pytest.approx([1.0] * 7 + [0.5] * 3)


def test_logging_does_not_matter(tmp_path: Path) -> None:
    data, file = text_file(tmp_path), rule_file(tmp_path)
    for every in (1, 3, 10):
        train(
            data,
            tmp_path / str(every),
            *(*TEXT, *STEADY, "--steps", "10", "--adaptive-lr-config", file, "--log-every", every),
        )
    weights = {(tmp_path / str(every) / "model.safetensors").read_bytes() for every in (1, 3, 10)}
    told = [[event["message"] for event in records(tmp_path / str(every), "event")] for every in (1, 3, 10)]
    assert len(weights) == 1 and told[0] == told[1] == told[2] != []
    train(data, tmp_path / "without", *TEXT, *STEADY, "--steps", "10")
    assert (tmp_path / "without" / "model.safetensors").read_bytes() not in weights


@pytest.mark.parametrize(("usual", "data"), [(TEXT, text_file), (PUZZLE, puzzle_file)], ids=["text", "puzzle"])
def test_five_and_five_is_ten_to_the_bit(usual: tuple[str, ...], data: Any, tmp_path: Path) -> None:
    """Stopped after 5 of 10 steps, in the middle of a window, after one cut and before the next."""
    path = data(tmp_path)
    always = ("--eval-every", "3", "--eval-batches", "1", "--save-every", "4", "--keep", "9", "--eval-file", path)
    words = (*usual, *STEADY, *always, "--steps", "10", "--adaptive-lr-config", rule_file(tmp_path))
    train(path, tmp_path / "whole", *words)
    with stopping_at(5):
        train(path, tmp_path / "b", *words)
    assert records(tmp_path / "b")[-1]["step"] == 5
    assert hrm("train", "--bundle-dir", tmp_path / "b", "--resume").code == 0
    assert_same_run(tmp_path / "whole", tmp_path / "b", stopped_at=5)
    assert computed(tmp_path / "b")[-1]["lr"] == pytest.approx(2.5e-4)


@pytest.mark.parametrize(
    ("text", "naming"),
    [
        ("window_stesp: 3", ("--adaptive-lr-config", "window_stesp = 3", "window_steps")),
        ("window_steps: 60", ("--adaptive-lr-config", "cannot act before step 120", "ends at step 100")),
    ],
)
def test_a_faulty_file_is_refused_before_anything_starts(text: str, naming: tuple[str, ...], tmp_path: Path) -> None:
    words = (*TEXT, "--steps", "100", "--adaptive-lr-config", rule_file(tmp_path, text))
    data = text_file(tmp_path)
    refused(2, "train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *words, naming=naming)
    assert not (tmp_path / "b").exists()


def test_the_control_can_be_left_or_taken_up_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without one takes it up afresh; the path is stored whole, so that the run is resumed from any folder."""
    monkeypatch.chdir(tmp_path)
    train(text_file(tmp_path), tmp_path / "b", *TEXT, *STEADY, "--steps", "4")
    resume = ("train", "--bundle-dir", tmp_path / "b", "--resume")
    assert hrm(*resume, "--steps", "9", "--adaptive-lr-config", rule_file(tmp_path).name).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert hrm(*resume, "--steps", "10").code == 0
    assert [record["lr"] for record in records(tmp_path / "b")] == pytest.approx([1e-3] * 8 + [5e-4] * 2)
    rule_file(tmp_path).unlink()
    refused(2, *resume, "--steps", "12", naming=("--adaptive-lr-config", "cannot be read"))
    without = tmp_path / "without.yaml"
    without.write_text("optimizer.adaptive_lr_config: null\n", encoding="utf-8")
    assert hrm(*resume, "--steps", "12", "--config", without).code == 0
    assert records(tmp_path / "b")[-1]["lr"] == pytest.approx(1e-3)
