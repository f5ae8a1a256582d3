"""The traceback of a worker that fails in an unforeseen way is shown once, by the command line."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from hrm_ray.orchestration import worker_group
from hrm_ray.train.plan import RunPlan
from hrm_ray.types import DriverLink
from tests.support.ray_bodies import value_error_after_records
from tests.support.runs import TEXT, Ran, hrm, last_said, text_file


def crashed(tmp_path: Path, launcher: str) -> Ran:
    words = (*TEXT, "--steps", "4", "--launcher", launcher)
    return hrm("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *last_said(words))


def test_of_the_local_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(plan: RunPlan, link: DriverLink) -> None:
        raise ValueError("unforeseen")

    monkeypatch.setattr("hrm_ray.launch.local.train", failing)
    ran = crashed(tmp_path, "local")
    assert ran.code == 1
    assert ran.err.count("Traceback") == 1 and ran.err.count("ValueError: unforeseen") == 1
    assert "in failing" in ran.err and "Traceback" not in ran.out


@pytest.mark.ray
def test_of_a_ray_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "run", partial(worker_group.run, body=value_error_after_records))
    ran = crashed(tmp_path, "ray")
    assert ran.code == 1
    first, _, detail = ran.err.partition("\n")
    assert first.startswith("error: worker 0: ended with ValueError: unforeseen in rank 0")
    assert detail.startswith("Traceback") and ran.err.count("Traceback") == 1
    assert "in value_error_after_records" in detail
    assert "Traceback" not in ran.out
