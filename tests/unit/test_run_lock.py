"""One run at a time in a bundle; nothing of before is lost, and what a killed run leaves is in nobody's way."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from hrm_ray.errors import ResourceError, SettingsError
from hrm_ray.launch.run_directory import never_trained
from hrm_ray.launch.run_lock import run_lock
from hrm_ray.rundir import DRIVER_MARKER, RunDir
from tests.support import paused_command
from tests.support.runs import TEXT, files_below, hrm, refused, text_file, train

PREPARING = "hrm_ray.launch.plan:check_resources"
LAUNCHING = "hrm_ray.launch.local:run"
BEFORE_THE_LOCK = "hrm_ray.launch.run:run_lock"


def test_a_bundle_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    train(text_file(tmp_path), bundle, *TEXT, "--steps", "2")
    before = files_below(bundle)
    again = ("train", "--bundle-dir", bundle, "--resume", "--steps", "3")
    with run_lock(RunDir(bundle)):
        refused(2, *again, naming=(bundle, f"process {os.getpid()} on", "is training in it"))
        RunDir(bundle).lock_holder.write_text("{")
        refused(2, *again, naming=(bundle, "another process is training in it"))
        copy = shutil.copytree(bundle, tmp_path / "copy")
        assert hrm("train", "--bundle-dir", copy, "--resume", "--steps", "3").code == 0
    assert files_below(bundle) == before


def test_a_new_run_in_the_folder_of_a_live_one_is_refused_with_its_process(tmp_path: Path) -> None:
    """It may neither be resumed nor deleted, before its first checkpoint and after it."""
    data, bundle = text_file(tmp_path), tmp_path / "b"
    train(data, bundle, *TEXT, "--steps", "2")
    new = ("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT)
    with run_lock(RunDir(bundle)):
        for more in ((), ("--dry-run",)):
            message = refused(2, *new, *more, naming=(bundle, f"process {os.getpid()} on", "is training in it"))
            assert "--resume" not in message
        shutil.rmtree(bundle / "checkpoints")
        assert "elete" not in refused(2, *new, naming=(f"process {os.getpid()} on", "is training in it"))
    before = files_below(bundle)
    refused(2, *new, naming=(bundle, "no checkpoint yet", "Delete the folder"))
    assert files_below(bundle) == before


def test_it_is_given_back_after_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(ValueError, match="out"), run_lock(RunDir(folder)):
            assert RunDir(folder).lock_holder.is_file()
            raise ValueError("out")
        with run_lock(RunDir(folder)):
            pass
        assert not RunDir(folder).lock_holder.exists()
    assert not (tmp_path / "new").exists()


def test_a_second_run_of_a_name_is_refused_while_the_first_prepares(tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    words = ("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, "--steps")
    first = paused_command.start(PREPARING, *words, "2")
    second = hrm(*words, "3")
    code, err = paused_command.go_on(first)
    assert (code, second.code) == (0, 2), (err, second)
    assert f"process {first.pid} on" in second.err
    assert RunDir(bundle).checkpoint_steps() == [2]


def test_a_second_run_of_a_name_is_refused_that_began_when_the_folder_was_free(tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    words = ("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, "--steps")
    second = paused_command.start(BEFORE_THE_LOCK, *words, "3")
    train(data, bundle, *TEXT, "--steps", "2")
    before = files_below(bundle)
    code, err = paused_command.go_on(second)
    assert code == 2 and "already contains a run" in err
    assert files_below(bundle) == before


def test_a_resume_that_began_before_another_one_is_refused(tmp_path: Path) -> None:
    """It would take the bundle back to the checkpoint that it knows."""
    bundle = tmp_path / "b"
    train(text_file(tmp_path), bundle, *TEXT, "--steps", "2")
    again = ("train", "--bundle-dir", bundle, "--resume", "--steps")
    second = paused_command.start(BEFORE_THE_LOCK, *again, "3")
    assert hrm(*again, "4").code == 0
    code, err = paused_command.go_on(second)
    assert code == 2 and "another run saved a checkpoint" in err
    assert RunDir(bundle).checkpoint_steps() == [2, 4]


def test_what_a_killed_launch_left_is_taken_over(tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    killed = paused_command.start(PREPARING, "train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT)
    killed.kill()
    killed.communicate()
    assert RunDir(bundle).preparing.is_dir() and RunDir(bundle).lock_holder.is_file()
    train(data, bundle, *TEXT, "--steps", "1")
    assert not RunDir(bundle).preparing.exists() and not RunDir(bundle).lock_holder.exists()


def test_what_a_killed_ray_launch_left_is_taken_over(tmp_path: Path) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"
    killed = paused_command.start(LAUNCHING, "train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT)
    killed.kill()
    killed.communicate()
    marker = bundle / f"{DRIVER_MARKER}0123456789abcdef"
    marker.touch()
    assert never_trained(RunDir(bundle))
    train(data, bundle, *TEXT, "--steps", "1")
    assert not marker.exists()
    marker.touch()
    assert hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "2").code == 0
    assert not marker.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there an open file cannot be removed")
def test_a_lock_that_is_given_back_while_another_run_takes_it_is_held_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run ends, and removes its folder, after the second has opened the lock's file."""
    import fcntl

    run_dir = RunDir(tmp_path / "new")
    first, flock = ExitStack(), fcntl.flock
    first.enter_context(run_lock(run_dir))

    def flock_after_the_first_run(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX:
            monkeypatch.undo()
            first.close()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_the_first_run)
    with run_lock(run_dir):
        assert run_dir.run_lock.exists()
        with pytest.raises(SettingsError, match="is training in it"), run_lock(run_dir):
            pass


@pytest.mark.parametrize("more", [(), ("--retrain-tokenizer",)], ids=["reused", "retrained"])
def test_a_failed_launch_leaves_a_tokenizer_that_was_there(
    more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, bundle = text_file(tmp_path, name="other.txt", seed=3), tmp_path / "b"
    train(other, tmp_path / "first", *TEXT, "--steps", "1")
    bundle.mkdir()
    shutil.copyfile(tmp_path / "first" / "tokenizer.json", bundle / "tokenizer.json")
    before = files_below(bundle)

    def failing(plan: object, link: object) -> None:
        assert RunDir(bundle).training_args.is_file()
        raise ResourceError([])

    with monkeypatch.context() as patch:
        patch.setattr("hrm_ray.launch.local.train", failing)
        ran = hrm("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", bundle, *TEXT, *more)
    assert ran.code == 4
    left = files_below(bundle)
    left.pop(RunDir(bundle).run_lock.name, None)
    assert left == before
