"""Two sets of workers in one bundle, as when the first has outlived its driver: only the later one saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hrm_ray.bundle.folder_watch import FolderWatch
from hrm_ray.errors import DataError
from hrm_ray.launch import local
from hrm_ray.launch.plan import make_plan
from hrm_ray.launch.resolve import resolve
from hrm_ray.launch.run_directory import load_run
from hrm_ray.launch.run_lock import run_lock
from hrm_ray.metrics.fanout import FanOut
from hrm_ray.rundir import RunDir, read_json, verify_checkpoint
from hrm_ray.train.loop import StepReport, TrainingLoop
from hrm_ray.train.plan import RunPlan
from tests.support.runs import PUZZLE, TEXT, files_below, last_said, puzzle_file, text_file


def plan_for(data: Path, bundle: Path, *words: object) -> RunPlan:
    said = [str(word) for word in last_said([*words, "--dataset-file", data, "--bundle-dir", bundle])]
    options = {name: value for name, value in zip(said, [*said[1:], "--"], strict=True) if name.startswith("--")}
    settings = load_run({name: True if value.startswith("--") else value for name, value in options.items()})
    resolved = resolve(settings)
    with run_lock(resolved.location.run_dir):
        return make_plan(resolved)


def run(plan: RunPlan) -> None:
    local.run(plan, sink=FanOut([]), stop=lambda: None)


def in_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Call `act` once, while a loop takes the step of this number."""
    real, done = TrainingLoop.step, list[int]()

    def stepping(loop: TrainingLoop) -> StepReport | None:
        if loop.progress.step + 1 == step and not done:
            done.append(step)
            act()
        return real(loop)

    monkeypatch.setattr(TrainingLoop, "step", stepping)


@pytest.mark.parametrize("task", ["puzzle", "text"])
@pytest.mark.parametrize("log_every", ["1", "100"])
def test_a_second_set_of_workers_shuts_the_first_out(
    task: str, log_every: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is refused at its next record, or at its next save; what the second has written stays as it is."""
    data, words = (puzzle_file(tmp_path), PUZZLE) if task == "puzzle" else (text_file(tmp_path), TEXT)
    bundle = tmp_path / "b"
    plan = plan_for(data, bundle, *words, "--steps", "6", "--save-every", "2", "--log-every", log_every)
    after_second: dict[str, bytes] = {}

    def second() -> None:
        run(plan)
        after_second.update(files_below(bundle))

    in_step(monkeypatch, 4, second)
    with pytest.raises(DataError, match="generation 2 of this run has opened the bundle since"):
        run(plan)
    assert read_json(RunDir(bundle).generation)["generation"] == 2
    unsynced = {"ledger.sqlite-wal", "ledger.sqlite-shm", "ledger.sqlite"}
    left = {name: content for name, content in files_below(bundle).items() if "tensorboard" not in name}
    for name in left.keys() - unsynced:
        assert left[name] == after_second[name], name
    for step in RunDir(bundle).checkpoint_steps():
        verify_checkpoint(RunDir(bundle).checkpoint(step))
    assert RunDir(bundle).checkpoint_steps() == [2, 4, 6]


def test_a_set_that_read_the_same_number_is_another(tmp_path: Path) -> None:
    first, second = FolderWatch(tmp_path), FolderWatch(tmp_path)
    first.take_generation()
    RunDir(tmp_path).generation.unlink()
    assert first.fault() is not None, "the bundle was prepared anew"
    second.take_generation()
    assert second.fault() is None
    first.take_generation()
    assert first.fault() is None
    fault = second.fault()
    assert fault is not None and "these workers, generation 1, save nothing more" in fault.reason
    assert len(str(fault)) - len(str(tmp_path)) < 250
    first.close()
    second.close()


def test_a_save_of_workers_that_were_shut_out_leaves_the_later_ones_files(tmp_path: Path) -> None:
    """The partial checkpoint of a set is its own, also where both save the same step at once."""
    run_dir = RunDir(tmp_path)
    ours, theirs = run_dir.partial_checkpoint(4), run_dir.partial_checkpoint(4)
    assert ours != theirs
    for partial in (ours, theirs):
        partial.mkdir(parents=True)
    run_dir.remove_partial_checkpoints()
    assert list(run_dir.checkpoints.iterdir()) == []
