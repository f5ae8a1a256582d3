"""Checkpoints that a thread writes while training goes on: the same files, whole or absent whatever happens then."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from hrm_ray.bundle.weights_file import unwritable
from hrm_ray.launch import supervisor
from hrm_ray.rundir import RunDir, verify_checkpoint, write_json
from hrm_ray.train import checkpoint_write, host_memory
from hrm_ray.train.checkpoint import Checkpointer
from hrm_ray.train.loop import StepReport, TrainingLoop
from hrm_ray.types import StopReason
from tests.support.runs import (
    PUZZLE,
    TEXT,
    computed,
    failing_at,
    files_below,
    hrm,
    puzzle_file,
    records,
    stop_at,
    text_file,
    train,
)
from tests.unit.test_trainer import settings_of, trainer_of

FULL = OSError(errno.ENOSPC, "No space left on device")
WORDS = (*TEXT, "--steps", "7", "--save-every", "2", "--keep", "9", "--ema", "0.9")
WAIT_S = 60.0


class Writing:
    """Lets a thread write a checkpoint only when the step after it is done, or when training waits for it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.may_write = threading.Event()
        self.begun = 0
        """Checkpoints of which a thread has begun to write."""
        self.steps: list[tuple[int, list[int]]] = []
        """After each step that was made while a thread wrote: its number, and the steps of whole checkpoints."""
        patch.setattr(checkpoint_write, "AT_ONCE_BYTES", 0)
        real_save, real_finish, real_step = checkpoint_write.save_tensors, Checkpointer.finish, TrainingLoop.step
        real_start, run_dirs = checkpoint_write.CheckpointWrite.start, list[RunDir]()

        def start(write: checkpoint_write.CheckpointWrite, *words: Any, **named: Any) -> None:
            self.may_write.clear()
            run_dirs.append(RunDir(write.folder.parent.parent))
            real_start(write, *words, **named)
            self.begun += write.in_background

        def save(tensors: Mapping[str, Tensor], path: Path) -> None:
            if threading.current_thread() is not threading.main_thread():
                assert self.may_write.wait(WAIT_S)
            real_save(tensors, path)

        def finish(checkpointer: Checkpointer) -> None:
            self.may_write.set()
            real_finish(checkpointer)

        def step(loop: TrainingLoop) -> StepReport | None:
            report = real_step(loop)
            if self.begun and not self.may_write.is_set():
                self.steps.append((loop.progress.step, run_dirs[-1].checkpoint_steps()))
                self.may_write.set()
            return report

        patch.setattr(checkpoint_write.CheckpointWrite, "start", start)
        patch.setattr(checkpoint_write, "save_tensors", save)
        patch.setattr(Checkpointer, "finish", finish)
        patch.setattr(TrainingLoop, "step", step)


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Writing:
    return Writing(monkeypatch)


@pytest.mark.parametrize("task", ["text", "puzzle"])
def test_the_files_are_those_of_a_save_at_once(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, though the next step is made before the first file is written."""
    words = WORDS if task == "text" else (*PUZZLE, *WORDS[-8:])
    data = text_file(tmp_path, 40) if task == "text" else puzzle_file(tmp_path)
    train(data, tmp_path / "once", *words)
    with monkeypatch.context() as patch:
        writing = Writing(patch)
        train(data, tmp_path / "b", *words)
    assert writing.begun == 3 and writing.steps == [(3, []), (5, [2]), (7, [2, 4])]
    assert files_below(tmp_path / "b" / "checkpoints") == files_below(tmp_path / "once" / "checkpoints")
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "once" / "model.safetensors").read_bytes()
    assert computed(tmp_path / "b") == computed(tmp_path / "once")
    if task == "text":
        assert hrm("ledger", "verify", tmp_path / "b").code == 0


def test_the_one_before_is_kept_until_it_is_whole(tmp_path: Path, writing: Writing) -> None:
    train(puzzle_file(tmp_path), tmp_path / "b", *PUZZLE, "--steps", "6", "--save-every", "2", "--keep", "1")
    assert writing.steps == [(3, []), (5, [2])]
    assert [path.name for path in (tmp_path / "b" / "checkpoints").iterdir()] == ["step_6"]


KILLED = """
import os, sys, threading
from hrm_ray.cli import main
from hrm_ray.train import checkpoint_write
real, calls = checkpoint_write.save_tensors, []
def save(tensors, path):
    real(tensors, path)
    calls.append(path)
    if len(calls) == 5:
        assert threading.current_thread() is not threading.main_thread()
        os._exit(9)
checkpoint_write.save_tensors, checkpoint_write.AT_ONCE_BYTES = save, 0
main.main(sys.argv[1:])
"""


def test_a_run_that_is_killed_while_a_thread_writes(tmp_path: Path) -> None:
    """In the second file of the second checkpoint: the first is gone on from, and what is left is removed."""
    data, bundle = text_file(tmp_path, 40), tmp_path / "b"
    train(data, tmp_path / "whole", *WORDS)
    words = ["train", "--dataset-file", data, "--bundle-dir", bundle, *WORDS]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], check=False, capture_output=True)
    assert killed.returncode == 9, killed.stderr
    assert RunDir(bundle).checkpoint_steps() == [2]
    assert [path.name for path in bundle.glob("checkpoints/*.partial/*.safetensors")]
    assert hrm("train", "--bundle-dir", bundle, "--resume").code == 0
    assert not list(bundle.glob("checkpoints/*.partial"))
    assert files_below(bundle / "checkpoints") == files_below(tmp_path / "whole" / "checkpoints")
    assert hrm("ledger", "verify", bundle).code == 0


@pytest.mark.parametrize("call", range(1, 12, 3))
def test_a_disk_that_is_full_while_a_thread_writes(
    call: int, tmp_path: Path, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever file: the run ends with one message, as after a save at once, and earlier checkpoints are whole."""
    real = checkpoint_write.save_tensors
    full = unwritable(Path("model.safetensors"), FULL)
    monkeypatch.setattr(checkpoint_write, "save_tensors", failing_at(call, real, full))
    data, bundle = text_file(tmp_path, 40), tmp_path / "b"
    ran = hrm("train", "--dataset-file", data, "--bundle-dir", bundle, *WORDS, "--max-failures", "0")
    assert (ran.code, len(ran.faults)) == (4, 1) and "Traceback" not in ran.err, ran.err
    assert "No space left" in ran.faults[0] and "--resume" in ran.faults[0] and len(ran.faults[0]) < 300
    whole = [2, 4, 6][: (call - 1) // 3]
    assert RunDir(bundle).checkpoint_steps() == whole
    for step in whole:
        verify_checkpoint(RunDir(bundle).checkpoint(step))
    assert not list(tmp_path.rglob("*.partial")) + list(tmp_path.rglob("*.tmp"))


def test_a_stop_while_a_thread_writes(tmp_path: Path, writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both checkpoints are whole when the run ends, and it goes on to the same weights."""
    data, bundle = text_file(tmp_path, 40), tmp_path / "b"
    train(data, tmp_path / "whole", *WORDS)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        train(data, bundle, *WORDS)
    assert RunDir(bundle).checkpoint_steps() == [2, 3] and writing.steps[-1] == (3, [])
    assert hrm("train", "--bundle-dir", bundle, "--resume").code == 0
    assert (bundle / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert hrm("ledger", "verify", bundle).code == 0


def test_an_error_while_a_thread_writes(tmp_path: Path, writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint becomes whole, and the run goes on from it."""
    monkeypatch.setattr(supervisor, "wait_for", lambda wait_s, stop: None)
    monkeypatch.setattr(TrainingLoop, "step", failing_at(3, TrainingLoop.step, FULL))
    close = Checkpointer.close

    def closing(checkpointer: Checkpointer) -> None:
        for state in tmp_path.glob("b/checkpoints/*.partial/state.json"):
            os.utime(state, (time.time() - 500, time.time() - 500))
        writing.may_write.set()
        close(checkpointer)

    monkeypatch.setattr(Checkpointer, "close", closing)
    train(text_file(tmp_path, 40), tmp_path / "b", *WORDS)
    (restart,) = (entry for entry in records(tmp_path / "b", "event") if "restart" in entry)
    assert restart["resumed_step"] == 2
    assert restart["lost_s"] >= 500, "training goes on while a checkpoint is written"
    assert RunDir(tmp_path / "b").checkpoint_steps() == [2, 4, 6, 7]


def test_an_error_is_told_though_the_disk_hangs(
    tmp_path: Path, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training does not wait without end for a thread that does not come back."""
    trainer = trainer_of(settings_of(steps=6, save_every=2), tmp_path / "b", None, None)
    loop, hangs = trainer.loop, threading.Event()
    monkeypatch.setattr(checkpoint_write, "save_tensors", lambda tensors, path: hangs.wait(WAIT_S))
    monkeypatch.setattr(checkpoint_write, "AFTER_ERROR_S", 0.0)
    monkeypatch.setattr(loop, "step", failing_at(3, loop.step, FULL))
    with pytest.raises(OSError, match="No space left"):
        trainer.run()
    trainer.checkpointer.close()
    assert loop.activity.phase == "ending" and not trainer.checkpointer.writing
    assert [path.name.endswith(".partial") for path in (tmp_path / "b" / "checkpoints").iterdir()] == [True]
    hangs.set()


def test_others_who_opened_the_bundle_meanwhile(
    tmp_path: Path, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a thread has written does not take its place once another set of workers has begun."""
    bundle, real = tmp_path / "b", Checkpointer.finish

    def finish(checkpointer: Checkpointer) -> None:
        if checkpointer.writing:
            write_json(RunDir(bundle).generation, {"generation": 9, "token": "other"})
        real(checkpointer)

    monkeypatch.setattr(Checkpointer, "finish", finish)
    ran = hrm("train", "--dataset-file", text_file(tmp_path, 40), "--bundle-dir", bundle, *WORDS)
    assert (ran.code, len(ran.faults)) == (5, 1) and "generation 9" in ran.faults[0], ran.err
    assert not list((bundle / "checkpoints").iterdir())


def test_a_resize_waits_until_the_checkpoint_is_whole(tmp_path: Path, writing: Writing) -> None:
    trainer = trainer_of(settings_of(steps=6, save_every=2), tmp_path / "b", None, None)
    trainer.loop.stop_poll = lambda: StopReason.RESIZE if trainer.loop.progress.step >= 1 else None
    result = trainer.run()
    assert (result.reason, result.step, writing.begun, writing.steps) == (StopReason.RESIZE, 2, 1, [])
    verify_checkpoint(RunDir(tmp_path / "b").checkpoint(2))


def test_the_usual_times_are_those_of_whole_saves(
    tmp_path: Path, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For --max-time, and for what is a hang: with the writing, and the wait for one that is under way."""
    trainer = trainer_of(settings_of(steps=5, save_every=2), tmp_path / "b", None, None)
    dues, saves, longest = list[int](), list[float](), list[float | None]()
    real_step, measured = trainer.loop.step, trainer.time_limit.measured

    def step() -> StepReport | None:
        dues.append(trainer.time_limit.due[1])
        longest.append(trainer.loop.activity.longest_s.get("checkpoint"))
        return real_step()

    def noted(part: Any, took_s: float) -> None:
        saves.extend([took_s] if part == "save" else [])
        measured(part, took_s)

    monkeypatch.setattr(trainer.loop, "step", step)
    monkeypatch.setattr(trainer.time_limit, "measured", noted)
    trainer.run()
    assert dues == [0, 1, 1, 2, 1]
    assert longest[:3] == [None, None, None] and longest[4] is not None and longest[4] >= saves[0]
    assert len(saves) == 3 and all(took_s > 0 for took_s in saves)


def test_without_room_for_a_copy_training_waits(
    tmp_path: Path, writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user is told once."""
    monkeypatch.setattr(checkpoint_write, "room_for_copy", lambda size_bytes, workers: False)
    train(text_file(tmp_path, 40), tmp_path / "b", *WORDS)
    told = [entry["message"] for entry in records(tmp_path / "b", "event") if "no room" in entry["message"]]
    assert len(told) == 1 and "0.0 GB" in told[0]
    assert writing.begun == 0 and RunDir(tmp_path / "b").checkpoint_steps() == [2, 4, 6, 7]


def test_room_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a quarter to spare, and what each worker takes again of the memory that it has given back."""
    resident = host_memory.psutil.Process().memory_info().rss
    monkeypatch.setattr(host_memory, "available_memory_bytes", lambda: 10**9)
    monkeypatch.setattr(host_memory, "peak_resident_bytes", lambda: resident)
    assert host_memory.room_for_copy(790 * 10**6, 2)
    assert not host_memory.room_for_copy(810 * 10**6, 2)
    monkeypatch.setattr(host_memory, "peak_resident_bytes", lambda: resident + 400 * 10**6)
    assert host_memory.room_for_copy(100 * 10**6, 2)
    assert not host_memory.room_for_copy(200 * 10**6, 2)


def test_no_copy_is_made_of_small_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(tensor: Tensor) -> Tensor:
        raise AssertionError("a small checkpoint is written at once")

    monkeypatch.setattr(checkpoint_write, "_copy", copied)
    train(puzzle_file(tmp_path), tmp_path / "b", *PUZZLE, "--steps", "2", "--save-every", "1")
