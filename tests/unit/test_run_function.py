"""A run from another Python program: two lines, and the process stays the program's own."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from hrm_ray.data.prepare import PuzzlePlan
from hrm_ray.errors import SettingsError
from hrm_ray.launch.plan import make_plan
from hrm_ray.launch.resolve import resolve
from hrm_ray.launch.run import run
from hrm_ray.rundir import RunDir
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.plan import RunPlan, TextData
from hrm_ray.types import Record, RunResult, StopReason
from tests.support.runs import puzzle_file, text_file


def settings_for(data: Path, bundle: Path, **more: str | bool) -> RunSettings:
    options: dict[str, str | bool] = {
        **{"--dataset-file": str(data), "--bundle-dir": str(bundle), "--device": "cpu", "--threads": "1"},
        **{"--hidden-size": "32", "--num-heads": "2", "--num-layers": "2", "--no-use-moe": True},
        **{"--vocab-size": "300", "--max-seq-len": "16", "--batch-size": "4", "--log-every": "1"},
    }
    return load_settings({**options, **more})


@pytest.mark.parametrize("task", ["lm", "puzzle"])
def test_a_plan_travels_as_json(task: str, tmp_path: Path) -> None:
    data = text_file(tmp_path) if task == "lm" else puzzle_file(tmp_path)
    options: dict[str, str | bool] = {"--dataset-file": str(data), "--bundle-dir": str(tmp_path / "b")}
    more: dict[str, str | bool] = {"--vocab-size": "300", "--epochs": "1"} if task == "lm" else {}
    plan = make_plan(resolve(load_settings({**options, **more, "--hidden-size": "32", "--num-heads": "2"})))
    assert isinstance(plan.data, TextData if task == "lm" else PuzzlePlan)
    assert RunPlan.from_plain(json.loads(json.dumps(plan.to_plain()))) == plan


class Kept:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


def test_a_run_of_another_program(tmp_path: Path) -> None:
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    results: list[RunResult] = []
    settings = settings_for(text_file(tmp_path), tmp_path / "b", **{"--steps": "2"})
    program = threading.Thread(target=lambda: results.append(run(settings)))
    program.start()
    program.join()
    assert (results[0].reason, results[0].step, results[0].bundle) == (StopReason.FINISHED, 2, str(tmp_path / "b"))
    changed = {name for name in environment.keys() | os.environ.keys() if environment.get(name) != os.environ.get(name)}
    assert changed <= {"TORCHINDUCTOR_CACHE_DIR"}, "torch sets this one when it is imported"
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_records_stops_and_the_start_reach_the_program(tmp_path: Path) -> None:
    kept, begun = Kept(), list[bool]()
    resolved = resolve(settings_for(text_file(tmp_path), tmp_path / "b"))
    assert not (tmp_path / "b").exists()

    def stop() -> StopReason | None:
        return StopReason.SIGTERM if any(record.kind == "train" for record in kept.records) else None

    result = run(resolved, sink=kept, stop=stop, on_start=lambda: begun.append((tmp_path / "b").is_dir()))
    assert (result.reason, result.step, begun) == (StopReason.SIGTERM, 2, [True])
    assert RunDir(tmp_path / "b").checkpoint_steps() == [2]
    with pytest.raises(SettingsError, match="already contains a run"):
        run(resolved)


def test_every_step_is_reported_and_only_logged_ones_are_stored(tmp_path: Path) -> None:
    """Also the estimated end of a run by epochs."""
    kept = Kept()
    options = {"--epochs": "2", "--log-every": "3", "--batch-size": "1"}
    result = run(settings_for(text_file(tmp_path), tmp_path / "b", **options), sink=kept)
    progress = [record for record in kept.records if record.kind == "progress"]
    assert [record.step for record in progress] == list(range(1, result.step + 1)) and result.step >= 4
    assert progress[-1].values == {"epoch": 1, "total_steps": result.step}
    stored = [json.loads(line) for line in RunDir(tmp_path / "b").metrics.read_text().splitlines()]
    assert {line["kind"] for line in stored} <= {"train", "eval", "event"}
