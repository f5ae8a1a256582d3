"""--max-time: the run saves and ends before it, and the next launch has the whole time again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from hrm_ray.rundir import RunDir
from hrm_ray.settings.duration import LONGEST_S, seconds_of
from hrm_ray.train.evaluator import Sampler
from hrm_ray.train.loop import StepReport, TrainingLoop
from hrm_ray.train.time_limit import TimeLimit
from hrm_ray.types import StopReason
from tests.support.runs import TEXT, computed, hrm, refused, text_file, train


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1:30:00", 5400), ("1D12H", 129600)],
)
def test_durations(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0:00:00", "1:30", "30 m", "m", "-5m", "1.5h", "1m2h", "1:60:00", "99999999d"]
)
def test_no_durations(text: str) -> None:
    assert seconds_of(text) is None


@given(some.integers(1, LONGEST_S))
def test_any_number_of_seconds(total: int) -> None:
    minutes, second = divmod(total, 60)
    hours, minute = divmod(minutes, 60)
    spelt = (f"{total}", f"{hours}h{minute}m{second}s", f"{hours}:{minute:02d}:{second:02d}", f"{minutes}m{second}s")
    assert {seconds_of(text) for text in spelt} == {total}


@given(some.text("0123456789dhmsx:. -", max_size=12))
def test_any_text(text: str) -> None:
    found = seconds_of(text)
    assert found is None or 0 < found <= LONGEST_S


def test_a_wrong_duration_is_refused(tmp_path: Path) -> None:
    words = ("train", "--dataset-file", text_file(tmp_path), *TEXT, "--max-time")
    refused(2, *words, "soon", naming=("--max-time soon", "is not a duration", "1h30m"))


def test_room_is_left_for_what_comes() -> None:
    """A step of 10 s, an evaluation of 20 s, a save of 4 s, of 200 s."""
    now_s = [0.0]
    limit = TimeLimit(200.0, clock=lambda: now_s[0])

    def take(part: str, took_s: float) -> None:
        with limit.measuring(part):  # type: ignore[arg-type]
            now_s[0] += took_s

    assert limit.poll() is None
    take("step", 10)
    take("evaluation", 20)
    take("save", 4)
    stops = {}
    for due in ((0, 0), (1, 0), (2, 1)):
        limit.due = due
        stops[due] = next(tenth / 10 for tenth in range(2000) if _reached(limit, now_s, tenth / 10))
    # Two steps, one and a half saves; an evaluation more; two of them, and a save.
    assert stops == {(0, 0): 174.0, (1, 0): 154.0, (2, 1): 130.0}


def _reached(limit: TimeLimit, now_s: list[float], at_s: float) -> bool:
    now_s[0] = at_s
    return limit.poll() is StopReason.MAX_TIME


def test_without_a_limit_it_never_stops() -> None:
    assert TimeLimit(None, clock=lambda: float("inf")).poll() is None


def test_a_run_that_is_ended_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is scripted: ten seconds pass in each step of a run of 52 s."""
    data, now_s = text_file(tmp_path), [1000.0]
    train(data, tmp_path / "whole", *TEXT, "--steps", "6", "--max-time", "1h")
    real = TrainingLoop.step

    def stepping(loop: TrainingLoop) -> StepReport | None:
        now_s[0] += 10.0
        return real(loop)

    words = ("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *TEXT, "--steps", "6", "--auto-resume")
    with monkeypatch.context() as patch:
        patch.setattr("hrm_ray.cli.run.COMMAND_STARTED_S", 1000.0)
        patch.setattr("time.time", lambda: now_s[0])
        patch.setattr(TrainingLoop, "step", stepping)
        ran = hrm(*words, "--max-time", "52s")
    assert ran.code == 75 and "ended   stopped by --max-time at step 3" in ran.out, ran
    assert "--max-time 52s is nearly over: the run saves and ends" in ran.out
    assert RunDir(tmp_path / "b").checkpoint_steps() == [3]
    assert hrm(*words).code == 0
    assert computed(tmp_path / "b") == computed(tmp_path / "whole")


def test_the_sample_counts_as_part_of_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is scripted: a sample takes 30 s, all else nothing; after the first one no other fits into 70 s."""
    data, now_s = text_file(tmp_path), [1000.0]

    def sampling(sampler: Sampler) -> str:
        now_s[0] += 30.0
        return "text"

    monkeypatch.setattr("hrm_ray.cli.run.COMMAND_STARTED_S", 1000.0)
    monkeypatch.setattr("time.time", lambda: now_s[0])
    monkeypatch.setattr(Sampler, "sample", sampling)
    words = ("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *TEXT, "--steps", "9", "--sample-prompt")
    ran = hrm(*words, "a", "--eval-file", data, "--eval-every", "2", "--max-time", "70s")
    assert ran.code == 75 and "ended   stopped by --max-time at step 3" in ran.out, ran
    assert now_s[0] == 1030.0


def test_the_time_is_over_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm_ray.cli.run.COMMAND_STARTED_S", time.time() - 60)
    words = ("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *TEXT, "--steps", "6")
    ran = hrm(*words, "--max-time", "1m")
    assert ran.code == 75 and "stopped by --max-time before the first step" in ran.out, ran
