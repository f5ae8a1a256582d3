"""What is removed of the folders that other drivers have below the temporary folder, and what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hrm_ray.orchestration import session_folder
from hrm_ray.orchestration.session_folder import DRIVER, keep_logs_for_a_while, make_session_folder


def left_by(root: Path, name: str, **changed: Any) -> Path:
    """The folder of a driver that a signal has ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ended:
        start_s = psutil.Process(ended.pid).create_time()
        ended.kill()
    folder = make_session_folder(root).rename(root / name)
    driver = json.loads((folder / DRIVER).read_text())
    (folder / DRIVER).write_text(json.dumps({**driver, "pid": ended.pid, "start_s": start_s, **changed}))
    (folder / "session_1" / "logs").mkdir(parents=True)
    return folder


def test_only_what_this_machines_ended_drivers_have_left_is_removed(tmp_path: Path) -> None:
    living = make_session_folder(tmp_path)
    others = {
        "hrm-elsewhere": {"host": "another-machine"},
        "hrm-living": {"pid": os.getpid(), "start_s": psutil.Process().create_time()},
        "hrm-logs": {"logs_named": True},
    }
    kept = {left_by(tmp_path, name, **changed) for name, changed in others.items()} | {living}
    for name, content in (("hrm-unknown", None), ("hrm-torn", "{"), ("hrm-list", "[]"), ("hrm-number", "1")):
        folder = tmp_path / name
        folder.mkdir()
        if content is not None:
            (folder / DRIVER).write_text(content)
        kept.add(folder)
    (tmp_path / "hrm-file").write_text("of somebody")
    kept.add(tmp_path / "hrm-file")
    # Last, because each folder that is made removes those that were left before.
    abandoned = left_by(tmp_path, "hrm-abandoned")
    reused = left_by(tmp_path, "hrm-reused", pid=os.getpid())
    mine = make_session_folder(tmp_path)
    assert not abandoned.exists() and not reused.exists(), "a number of a process that is used again is another"
    assert set(tmp_path.iterdir()) == kept | {mine}


def test_logs_that_a_message_has_named_are_kept_for_a_day(tmp_path: Path) -> None:
    folder = left_by(tmp_path, "hrm-crashed")
    driver = json.loads((folder / DRIVER).read_text())
    keep_logs_for_a_while(folder)
    assert json.loads((folder / DRIVER).read_text())["logs_named"]
    (folder / DRIVER).write_text(json.dumps({**driver, "logs_named": True}))
    session_folder.remove_abandoned_folders(tmp_path, time.time() + 23 * 3600)
    assert folder.exists()
    session_folder.remove_abandoned_folders(tmp_path, time.time() + 25 * 3600)
    assert not folder.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there a temporary folder is one user's")
def test_folders_of_another_user_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = left_by(tmp_path, "hrm-theirs")
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    session_folder.remove_abandoned_folders(tmp_path)
    assert folder.exists()
