"""The folder of a session's files below the temporary folder, and the removal of those that killed drivers have left.

A file in each names the driver: its machine, its process, and when that process started, since numbers of processes are
used again.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

PREFIX = "hrm-"
DRIVER = "driver.json"
KEPT_LOGS_S = 24 * 3600.0
"""How long logs that a message has named are kept after the driver has ended."""
_SAME_START_S = 2.0
"""Start times of one process differ by less: they count from the boot, whose time moves with the system's clock."""


def make_session_folder(root: Path) -> Path:
    """A new folder for this process below `root`; removes there what drivers have left that are gone."""
    remove_abandoned_folders(root)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    _write_driver(folder, logs_named=False)
    return folder


def keep_logs_for_a_while(folder: Path) -> None:
    """A message names the logs in the folder: they outlive this process for KEPT_LOGS_S."""
    with suppress(OSError):  # The disk may be full; then the next start removes them.
        _write_driver(folder, logs_named=True)


def remove_abandoned_folders(root: Path, now_s: float | None = None) -> None:
    """Remove the folders of this user's drivers on this machine that are gone. All others stay, also those whose
    driver is not known."""
    for folder in root.glob(f"{PREFIX}*"):
        # Another process may remove it too, or it is nobody's that we know.
        with suppress(OSError, ValueError, KeyError, TypeError):
            if _is_abandoned(folder, time.time() if now_s is None else now_s):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path, now_s: float) -> bool:
    if sys.platform != "win32" and folder.lstat().st_uid != os.getuid():
        return False
    written = folder / DRIVER
    driver = json.loads(written.read_text(encoding="utf-8"))
    if driver["host"] != socket.gethostname() or _is_alive(driver["pid"], driver["start_s"]):
        return False
    return not driver["logs_named"] or now_s - written.stat().st_mtime >= KEPT_LOGS_S


def _write_driver(folder: Path, *, logs_named: bool) -> None:
    start_s = psutil.Process().create_time()
    driver = {"host": socket.gethostname(), "pid": os.getpid(), "start_s": start_s, "logs_named": logs_named}
    (folder / DRIVER).write_text(json.dumps(driver), encoding="utf-8")


def started_at(process: psutil.Process, start_s: float) -> bool:
    """Whether the process started at that time (seconds since the epoch), and is no later one with its number."""
    return abs(process.create_time() - start_s) < _SAME_START_S


def _is_alive(pid: int, start_s: float) -> bool:
    try:
        return started_at(psutil.Process(pid), start_s)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
