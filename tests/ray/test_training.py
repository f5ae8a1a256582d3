"""Real training through Ray: the same loop, files and numbers as in one process.

What Ray itself does at failures and stops is in test_worker_group.py and test_signals.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hrm_ray.cli.main import main

pytestmark = pytest.mark.ray

MODEL = (
    *("--hidden-size", "32", "--num-heads", "2", "--num-layers", "2", "--pos-encodings", "learned"),
    *("--no-moe", "--no-amp"),
)
RUN = ("--halt-max-steps", "4", "--halt-exploration-prob", "0.5", "--no-linear-dataset", "--threads", "1")
LENGTH = ("--steps", "12", "--log-every", "1", "--save-every", "6", "--ema", "0.9", "--lr", "1e-3")


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "sudoku4"
    assert run("data", "build", "sudoku", "--size", "4", "--train", "90", "--test", "20", "--out", str(out)) == 0
    return out


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def train(puzzles: Path, bundle: Path, *more: str) -> int:
    return run(
        *("train", "--dataset-file", str(puzzles), "--val-split", "test", "--bundle-dir", str(bundle)),
        *(MODEL + RUN + LENGTH + more),
    )


def records(bundle: Path, kind: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (bundle / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def files(bundle: Path) -> set[str]:
    """Names of what is in a bundle; TensorBoard's files carry the host and the time."""
    return {str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file() and "tfevents" not in p.name}


def test_one_ray_worker_gives_the_files_and_numbers_of_the_local_launcher(puzzles: Path, tmp_path: Path) -> None:
    local, through_ray = tmp_path / "local", tmp_path / "ray"
    assert train(puzzles, local, "--launcher", "local") == 0
    assert train(puzzles, through_ray, "--launcher", "ray") == 0
    assert files(local) == files(through_ray)
    ours, theirs = load_file(through_ray / "model.safetensors"), load_file(local / "model.safetensors")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    for kind in ("train", "eval"):
        for mine, other in zip(records(through_ray, kind), records(local, kind), strict=True):
            for name in ("step", "loss", "objective"):
                assert mine.get(name) == other.get(name)


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero3"))]
)
def test_two_workers_give_one_workers_losses_and_resume_on_one(
    puzzles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    """2 workers x 4 against one process with 8: float32 sums in another order, 1e-4 after twelve updates. A checkpoint
    of two ranks goes on in one process, carries, average and place in the data included."""
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert train(puzzles, whole, "--launcher", "local", "--batch-size", "8") == 0
    assert (
        train(puzzles, split, "--launcher", "ray", "--world-size", "2", "--strategy", strategy, "--batch-size", "4")
        == 0
    )
    losses = [record["objective"] for record in records(whole, "train")]
    assert [record["objective"] for record in records(split, "train")] == pytest.approx(losses, rel=1e-4)
    assert capsys.readouterr().err == ""
    again = tmp_path / "again"
    checkpoint = split / "checkpoints" / "step_6"
    code = run(
        *("train", "--resume-from", str(checkpoint), "--bundle-dir", str(again), "--launcher", "local"),
        *("--world-size", "1", "--strategy", "single", "--batch-size", "8"),
    )
    assert code == 0
    resumed = records(again, "train")
    assert [record["step"] for record in resumed] == list(range(7, 13))
    assert [record["objective"] for record in resumed] == pytest.approx(losses[6:], rel=1e-4)
