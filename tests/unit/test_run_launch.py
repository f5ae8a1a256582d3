"""What a launch that is refused or stopped leaves behind (nothing), and what several GPUs, splits and cuts decide."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hrm_ray.bundle.store import step_of_best
from hrm_ray.errors import ResourceError
from hrm_ray.launch.devices import choose_devices
from hrm_ray.launch.run_lock import run_lock
from hrm_ray.orchestration import worker_group
from hrm_ray.orchestration.failures import WorkerCrash
from hrm_ray.rundir import RunDir
from hrm_ray.settings.cluster import ClusterSettings
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.plan import RunPlan
from hrm_ray.types import StopReason, StopRequested
from tests.support.runs import (
    PUZZLE,
    TEXT,
    files_below,
    hrm,
    last_said,
    puzzle_file,
    records,
    refused,
    stopping_at,
    train,
)

NO_LAUNCHER = tuple(word for word in TEXT if word not in ("--launcher", "local"))


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm_ray.launch.devices._COUNT", {"cuda": lambda: 4, "cpu": lambda: 1})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("said", "world_size", "launcher"),
    [
        ({}, 4, "ray"),
        ({"strategy": "single"}, 1, "local"),
        ({"launcher": "local"}, 1, "local"),
        ({"world_size": 2}, 2, "ray"),
        ({"strategy": "ddp", "device": "cpu"}, 1, "ray"),
        ({"ddp": True, "device": "cpu"}, 1, "ray"),
        ({"ddp": False}, 1, "local"),
        ({"ddp": None}, 4, "ray"),
        ({"device": "cpu"}, 1, "local"),
    ],
)
def test_workers_and_launcher_on_a_machine_of_four_gpus(
    said: dict[str, Any], world_size: int, launcher: str, four_gpus: None
) -> None:
    devices = choose_devices(ClusterSettings.model_validate(said))
    assert (devices.world_size, devices.launcher) == (world_size, launcher)


def test_the_local_launcher_needs_no_cluster(four_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    alone = choose_devices(ClusterSettings(launcher="local", device="cpu"))
    assert alone.ray_address is None and alone.threads >= 1
    monkeypatch.setattr("hrm_ray.orchestration.worker_group.cluster_nodes", lambda address: [])
    assert choose_devices(ClusterSettings()).ray_address == "10.0.0.1:6379"
    assert choose_devices(ClusterSettings(ray_address="local")).ray_address is None


def text_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in ("a", "b", "test"):
        (folder / f"{name}.txt").write_text(f"{name} has words of its own, many of them. " * 40)
    return folder


def test_a_held_out_file_is_not_trained_on(tmp_path: Path) -> None:
    """A folder without a split "train": everything but the split that is held out."""
    data = text_folder(tmp_path / "data")
    train(data, tmp_path / "b", *TEXT, "--val-split", "test", "--steps", "1")
    assert len((tmp_path / "b" / "data" / "parts.jsonl").read_text().splitlines()) == 2
    train(data, tmp_path / "all", *TEXT, "--steps", "1")
    assert len((tmp_path / "all" / "data" / "parts.jsonl").read_text().splitlines()) == 3


def test_an_evaluation_file_inside_the_training_data_is_said(tmp_path: Path) -> None:
    data = text_folder(tmp_path / "data")
    words = (*TEXT, "--eval-file", data / "b.txt", "--steps", "1")
    train(data, tmp_path / "b", *words)
    told = [event["message"] for event in records(tmp_path / "b", "event") if event["level"] == "WARNING"]
    assert any("b.txt" in message and "held-out" in message for message in told)
    refused(2, "train", "--dataset-file", data, *words, "--strict", naming=("b.txt", "held-out"))


def test_a_note_on_the_evaluation_data_names_it_under_strict(tmp_path: Path) -> None:
    data, held_out = text_folder(tmp_path / "data"), text_folder(tmp_path / "held_out")
    (held_out / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    words = ("--dataset-file", data, "--eval-file", held_out, *TEXT, "--strict")
    message = refused(5, "train", *words, naming=(held_out,))
    assert str(data) not in message


def test_what_ray_cannot_hold_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    data = text_folder(tmp_path / "data")
    words = ("--dataset-file", data, "--bundle-dir", tmp_path / "b", *NO_LAUNCHER, "--launcher", "ray")
    asked = last_said([*words, "--world-size", "2", "--threads", "500"])
    for more in ((), ("--dry-run",)):
        refused(4, "train", *asked, *more, naming=("1000 CPUs",))
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "error",
    [
        StopRequested(StopReason.SIGTERM),
        ResourceError([]),
        KeyboardInterrupt(),
    ],
    ids=["stopped", "busy cluster", "interrupt"],
)
def test_a_launch_that_ends_before_the_first_step_leaves_no_bundle(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same command can be given again."""
    data, bundle = text_folder(tmp_path / "data"), tmp_path / "b"

    def failing(plan: RunPlan, **named: Any) -> None:
        assert bundle.is_dir(), "the bundle was there when the launch failed"
        raise error

    words = ("train", "--dataset-file", data, "--bundle-dir", bundle, *NO_LAUNCHER, "--launcher", "ray")
    with monkeypatch.context() as patch:
        patch.setattr(worker_group, "run", failing)
        assert hrm(*words).code != 0
        assert not bundle.exists()
    train(data, bundle, *TEXT, "--steps", "1")


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_in_this_process_leaves_pytorch_as_it_was(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads and random numbers belong to the program that a run is part of, also after a run that fails."""
    data, before = text_folder(tmp_path / "data"), torch.get_num_threads()
    if fails:
        monkeypatch.setattr(TrainingLoop, "step", lambda self: 1 / 0)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    try:
        words = ("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *TEXT, "--steps", "1")
        assert (hrm(*words).code == 0) != fails
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_bundle_that_was_only_prepared_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a killed driver leaves it; one that has a record does not."""
    data, bundle = text_folder(tmp_path / "data"), tmp_path / "b"
    monkeypatch.setattr("hrm_ray.launch.new_bundle.never_trained", lambda run_dir: False)
    monkeypatch.setattr("hrm_ray.launch.local.train", lambda plan, link: (_ for _ in ()).throw(KeyboardInterrupt))
    assert hrm("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT).code == 130
    assert (bundle / "training_args.json").is_file()
    monkeypatch.undo()
    train(data, bundle, *TEXT, "--steps", "1")
    refused(2, "train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, naming=("already contains a run",))


def test_a_run_that_fails_at_its_first_step_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are no reason to keep one: the same command can be given again."""
    data, bundle = text_folder(tmp_path / "data"), tmp_path / "b"
    words = ("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, "--vocab-size", "4000", "--steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "step", lambda self: 1 / 0)
        assert hrm(*words).code == 1
    assert not bundle.exists()
    assert hrm(*words).code == 0


def test_a_run_that_diverged_before_its_first_checkpoint_gives_way(tmp_path: Path) -> None:
    """Its metrics stay until --auto-resume starts again: they show what happened."""
    data, bundle = text_folder(tmp_path / "data"), tmp_path / "b"
    words = ("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, "--steps", "40")
    ran = hrm(*words, "--lr", "1e30")
    assert ran.code == 6 and len(ran.faults[0]) < 300, ran.err
    assert len(records(bundle)) >= 1 and not RunDir(bundle).checkpoint_steps()
    refused(2, *words, naming=("no checkpoint yet", "Give --auto-resume to start again"))
    train(data, bundle, *TEXT, "--steps", "2", "--auto-resume")
    assert [record["step"] for record in records(bundle)] == [1, 2]


@pytest.mark.parametrize("kept", ["golden_step_4", "step_4.superseded-2"])
def test_a_checkpoint_under_another_name_is_never_deleted(kept: str, tmp_path: Path) -> None:
    data, bundle = text_folder(tmp_path / "data"), tmp_path / "b"
    train(data, bundle, *TEXT, "--steps", "6", "--save-every", "2")
    checkpoints = bundle / "checkpoints"
    (checkpoints / "step_4").rename(checkpoints / kept)
    for gone in (checkpoints / "step_2", checkpoints / "step_6", bundle / "model.safetensors"):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    for more in ((), ("--auto-resume",)):
        refused(2, "train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, *more, naming=("contains a run",))
    assert (checkpoints / kept / "model.safetensors").is_file()


@pytest.mark.parametrize("where", ["preflight", "cluster"])
def test_a_resume_that_is_refused_changes_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, bundle = text_folder(tmp_path / "data"), tmp_path / "b"
    train(data, bundle, *TEXT, "--steps", "6", "--save-every", "2")
    before = files_below(bundle)
    back = ("train", "--resume-from", bundle / "checkpoints" / "step_4", "--launcher", "ray")
    if where == "preflight":
        refused(4, *back, "--world-size", "4", "--threads", "500", "--batch-size", "1", naming=("2000 CPUs",))
    else:

        def crashing(plan: RunPlan, **named: Any) -> None:
            raise WorkerCrash([], "no room on the cluster")

        monkeypatch.setattr(worker_group, "run", crashing)
        assert hrm(*back).code == 1
    assert files_below(bundle) == before


def test_going_on_from_a_checkpoint_of_another_name(tmp_path: Path) -> None:
    """The step is in the checkpoint, not in the name of its folder."""
    data, bundle = text_folder(tmp_path / "data"), tmp_path / "b"
    train(data, bundle, *TEXT, "--steps", "6", "--save-every", "2")
    (bundle / "checkpoints" / "step_4").rename(bundle / "checkpoints" / "good")
    assert hrm("train", "--resume-from", bundle / "checkpoints" / "good").code == 0
    assert [record["step"] for record in records(bundle)] == [1, 2, 3, 4, 5, 6]
    assert (bundle / "checkpoints" / "step_6.superseded-1").is_dir()


def test_best_stays_when_the_batch_is_cut_otherwise(tmp_path: Path) -> None:
    """The same samples are evaluated, so the best of before still counts: a ruined model does not take its place."""
    data, bundle = puzzle_file(tmp_path, count=40), tmp_path / "b"
    held = puzzle_file(tmp_path, count=20, name="held.safetensors", seed=1)
    words = [*PUZZLE, "--eval-file", held, "--eval-batches", "2", "--optimizer", "sgd", "--lr-schedule", "constant"]
    train(data, bundle, *words, "--batch-size", "8", "--lr", "0.01", "--steps", "4")
    best = step_of_best(RunDir(bundle))
    cut = ("--batch-size", "4", "--gradient-accumulation-steps", "2")
    assert hrm("train", "--bundle-dir", bundle, "--resume", *cut, "--lr", "1000", "--steps", "6").code == 0
    assert records(bundle, "eval")[-1]["best"] is False
    assert step_of_best(RunDir(bundle)) == best


def test_the_last_steps_are_recorded_whatever_log_every_says(tmp_path: Path) -> None:
    data = text_folder(tmp_path / "data")
    words = [*TEXT, "--steps", "7"]
    words[words.index("--log-every") + 1] = "5"
    train(data, tmp_path / "b", *words)
    assert [record["step"] for record in records(tmp_path / "b")] == [1, 5, 7]


def test_what_an_interrupted_replacement_moved_aside_comes_back(tmp_path: Path) -> None:
    """A kill between the two renames: of the only checkpoint, saved again, and of best/."""
    data, bundle = text_folder(tmp_path / "data"), tmp_path / "b"
    with stopping_at(3):
        hrm("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, "--val-split", "test", "--eval-every", "2")
    run_dir = RunDir(bundle)
    checkpoints = bundle / "checkpoints"
    (checkpoints / "step_3").rename(checkpoints / "step_3.old.partial")
    (bundle / "best").rename(bundle / ".best.replaced-0a1b")
    (bundle / ".best.building-0a1b").mkdir()
    assert run_dir.checkpoint_steps() == []
    again = ("train", "--bundle-dir", bundle, "--resume", "--steps", "4")
    # Another process may be in the middle of the replacement: nothing is touched without the lock.
    before = files_below(bundle)
    assert hrm(*again, "--dry-run").code == 0
    with run_lock(run_dir):
        refused(2, *again, naming=("is training in it",))
    assert files_below(bundle) == before and (bundle / ".best.building-0a1b").is_dir()
    assert hrm(*again).code == 0
    assert run_dir.checkpoint_steps() == [3, 4]
    assert (bundle / "best" / "model.safetensors").is_file()
    assert not list(bundle.glob(".best.*"))
