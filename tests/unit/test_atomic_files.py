"""Atomic writing: the order of sync and rename, and what is left after a failure."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hrm_ray.atomic_files import atomic_path, atomic_write
from hrm_ray.bundle.weights_file import save_tensors
from hrm_ray.data.text_data import TextDataDir
from hrm_ray.rundir import RunDir, read_json, write_json


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def test_the_file_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    writers: dict[str, Callable[[Path], None]] = {
        "plain": lambda path: write(path, b"x"),
        "json": lambda path: write_json(path, {"a": 1}),
        "weights": lambda path: save_tensors({"w": torch.zeros(2)}, path),
        "parts": lambda path: TextDataDir(path.parent).write_parts(()),
    }
    for name, writer in writers.items():
        calls.clear()
        writer(tmp_path / name)
        assert calls == ["file", "rename", "folder"], name


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write(path, b"old")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails != "write":
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space"), atomic_write(path) as file:
        file.write(b"new")
        if fails == "write":
            full()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refused(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    write_json(tmp_path / "file", [1])
    assert read_json(tmp_path / "file") == [1]


def test_two_writers_of_one_file_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file") as one, atomic_path(tmp_path / "file") as other:
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert (tmp_path / "file").read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1


def test_sealing_a_checkpoint_syncs_the_folder_of_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, synced = RunDir(tmp_path), []
    partial = run_dir.partial_checkpoint(1)
    partial.mkdir(parents=True)
    monkeypatch.setattr("hrm_ray.rundir.sync_folder", synced.append)
    run_dir.seal_checkpoint(1, partial)
    assert synced == [run_dir.checkpoints]
