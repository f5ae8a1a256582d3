"""What a run prints at its end: what it took, what it has learned, where it lies, and the command to type next."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hrm_ray.cli.summary import _next, _size
from hrm_ray.settings.tree import RunSettings
from hrm_ray.types import RunResult, StopReason
from tests.benchmarks.picture import draw
from tests.support.runs import PUZZLE, TEXT, hrm, puzzle_file, records, stopping_at, text_file, train


def ending(out: str) -> dict[str, str]:
    """The lines of the summary by their first word."""
    lines = out[out.index("\nended ") :].splitlines()
    return {line.split()[0].rstrip(":"): line.split(maxsplit=1)[1] for line in lines if line}


def test_a_stopped_run_is_resumed_by_the_command_it_shows(tmp_path: Path) -> None:
    held_out = text_file(tmp_path, name="held_out.txt", seed=1)
    words = (*TEXT, "--steps", "5", "--eval-file", held_out, "--eval-every", "2")
    with stopping_at(3):
        out = train(text_file(tmp_path), tmp_path / "b c", *words).out
    found = ending(out)
    ended = r"stopped by --stop-file at step 3, epoch 0, after 0:0\d:\d\d, 12 sequences of 16 tokens$"
    assert re.match(ended, found["ended"])
    logged = [record["loss"] for record in records(tmp_path / "b c")]
    assert found["loss"] == f"{logged[0]:.4f} at step 1, {logged[-1]:.4f} at step 3"
    assert found["held"].startswith("out  loss ") and found["held"].endswith(" (step 2)")
    assert found["best"].startswith("loss ") and "at step 2, in " in found["best"]
    assert re.fullmatch(rf"{re.escape(str(tmp_path / 'b c'))} \(\d+\.\d MB\)", found["bundle"])
    program, *resume = shlex.split(found["next"])
    assert program == "hrm-ray" and resume[-1] == "--resume"
    again = ending(hrm(*resume).out)
    assert again["ended"].startswith("finished at step 5") and again["ended"].endswith(", resumed 1 time(s)")
    assert again["loss"].startswith(f"{logged[0]:.4f} at step 1, ") and again["loss"].endswith("at step 5")
    assert again["next"] == f"hrm-ray generate '{tmp_path / 'b c'}' --prompt \"...\""
    program, *generate = shlex.split(again["next"])
    assert hrm(*generate, "--max-new-tokens", "2").code == 0


def test_the_next_command_after_puzzles_solves_some(tmp_path: Path) -> None:
    data = puzzle_file(tmp_path)
    found = ending(train(data, tmp_path / "b", *PUZZLE, "--steps", "4", "--eval-file", data).out)
    assert " puzzles" in found["ended"]
    assert found["held"].startswith("out  exact ") and found["best"].startswith("exact ")
    program, *solve = shlex.split(found["next"])
    assert program == "hrm-ray" and "solved exactly" in hrm(*solve).out


def test_a_file_that_goes_while_the_size_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of another process in the bundle may."""
    real = os.lstat

    def gone(path: str) -> os.stat_result:
        if path.endswith("config.json"):
            raise FileNotFoundError(path)
        return real(path)

    (tmp_path / "config.json").write_bytes(b"x" * 10**6)
    (tmp_path / "other").write_bytes(b"x" * 10**6)
    with monkeypatch.context() as patch:
        patch.setattr("hrm_ray.launch.list_runs.os.lstat", gone)
        assert _size(tmp_path) == "1.0 MB"


def test_the_split_of_the_next_command_is_quoted() -> None:
    settings = RunSettings.model_validate({"data": {"dataset_file": "d", "val_split": "held out"}})
    resolved: Any = SimpleNamespace(settings=settings, facts=SimpleNamespace(puzzle=object()))
    words = shlex.split(_next(RunResult(StopReason.FINISHED, 1, 0, "b", {}), resolved))
    assert words[-4:] == ["--split", "held out", "--limit", "3"]


def test_the_picture_of_a_run(tmp_path: Path) -> None:
    draw(tmp_path / "docs" / "run.svg", at=2, train=100)
    picture = (tmp_path / "docs" / "run.svg").read_text(encoding="utf-8").replace("&#160;", " ")
    for text in (
        "hrm-ray train --config sudoku4",
        "step 2/2500",
        "next checkpoint at step 500",
        "sudoku4-data (puzzle, 100 puzzles",
    ):
        assert text in picture
    assert str(tmp_path.parent) not in picture and "/tmp" not in picture
