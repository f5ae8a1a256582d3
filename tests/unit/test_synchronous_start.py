"""Where independent trainers can go on from a checkpoint of a strategy, and where not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hrm_ray.errors import DataError, SettingsError
from hrm_ray.independent.claims import prepare_claims
from hrm_ray.independent.synchronous_start import check_position
from hrm_ray.launch.plan import make_plan
from hrm_ray.launch.resolve import resolve
from hrm_ray.launch.run_directory import load_run
from hrm_ray.train.plan import RunPlan
from tests.support.runs import PUZZLE, TEXT, puzzle_file, train

TEXT_HERE = [word for word in TEXT if word not in ("--launcher", "local")]
PUZZLE_HERE = [word for word in PUZZLE if word not in ("--launcher", "local")]


def resumed(bundle: Path) -> RunPlan:
    return make_plan(resolve(load_run({"--resume": True, "--bundle-dir": str(bundle), "--parallel-independent": True})))


@pytest.mark.parametrize("chunk_size", [6, 12, 4000])
def test_not_inside_a_shuffle_window_of_several_chunks(tmp_path: Path, chunk_size: int) -> None:
    shuffled = ["--no-linear-dataset", "--dataset-chunk-size", chunk_size, "--shuffle-buffer-size", 12]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"line {number} of a text"}) for number in range(40)))
    train(text, tmp_path / "b", *TEXT_HERE, "--steps", 2, *shuffled)
    plan = resumed(tmp_path / "b")
    order, _ = prepare_claims(plan, lambda message: None)
    if chunk_size < 12:
        with pytest.raises(DataError, match="inside a shuffle window of several chunks"):
            check_position(plan, order)
    else:
        check_position(plan, order)


def test_not_in_the_middle_of_segments(tmp_path: Path) -> None:
    train(puzzle_file(tmp_path), tmp_path / "b", *PUZZLE_HERE, "--steps", 2)
    with pytest.raises(SettingsError, match="in the middle of their segments"):
        resumed(tmp_path / "b")
