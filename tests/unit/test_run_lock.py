"""One run at a time in a bundle; what a killed one leaves is in nobody's way."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from hrm_ray.launch.run_lock import run_lock
from hrm_ray.rundir import RunDir
from tests.support.runs import TEXT, hrm, refused, text_file, train


def holder(bundle: Path, **changes: Any) -> str:
    own = {"host": socket.gethostname(), "pid": os.getpid(), "began_s": psutil.Process().create_time()}
    return json.dumps({"bundle": str(bundle.resolve().with_name(changes.pop("of", bundle.name))), **own, **changes})


def test_a_bundle_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    train(text_file(tmp_path), bundle, *TEXT, "--steps", "2")
    assert not RunDir(bundle).run_lock.exists()
    again = ("train", "--bundle-dir", bundle, "--resume", "--steps", "3")
    RunDir(bundle).run_lock.write_text(holder(bundle))
    refused(2, *again, naming=(bundle, f"process {os.getpid()} is training in it"))
    RunDir(bundle).run_lock.write_text("{")
    refused(2, *again, naming=(bundle, "just begun"))
    RunDir(bundle).run_lock.write_text(holder(bundle, host="elsewhere"))
    refused(2, *again, naming=(bundle, "on elsewhere", RunDir(bundle).run_lock))
    assert RunDir(bundle).checkpoint_steps() == [2]


@pytest.mark.parametrize("left", [{"began_s": 1.0}, {"pid": 2**30}, {"of": "another"}, "", "{"])
def test_what_a_killed_run_left_is_taken_over(tmp_path: Path, left: dict[str, Any] | str) -> None:
    bundle = tmp_path / "b"
    train(text_file(tmp_path), bundle, *TEXT, "--steps", "2")
    RunDir(bundle).run_lock.write_text(left if isinstance(left, str) else holder(bundle, **left))
    os.utime(RunDir(bundle).run_lock, (0, 0))
    assert hrm("train", "--bundle-dir", bundle, "--resume", "--steps", "3").code == 0
    assert not RunDir(bundle).run_lock.exists()


def test_it_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out"), run_lock(RunDir(tmp_path)):
        assert RunDir(tmp_path).run_lock.is_file()
        raise ValueError("out")
    assert not RunDir(tmp_path).run_lock.exists()
