"""One run at a time in a bundle.

One job: a file that says which process trains in a bundle, there as long as that process is. What a killed one leaves
is known by its number and start, and taken over, as is what came along with a copy of a bundle. It does not protect
against other programs.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from hrm_ray.errors import Fault, ResourceError, SettingsError
from hrm_ray.rundir import RunDir

STARTING_S = 10.0
"""A file that is half written for so long is not being written any more."""


@contextmanager
def run_lock(run_dir: RunDir) -> Iterator[None]:
    """Hold the bundle. Raises SettingsError where another process does, ResourceError where nothing can be written."""
    path = run_dir.run_lock
    _take(path, run_dir)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()


def _take(path: Path, run_dir: RunDir) -> None:
    holder = {"bundle": str(run_dir.root.resolve()), "host": socket.gethostname(), "pid": os.getpid()}
    # Each round ends with the file, with a refusal, or with what a process that is gone has left out of the way.
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps({**holder, "began_s": psutil.Process().create_time()}))
            return
        except FileExistsError:
            _check_gone(path, run_dir)
        except OSError as error:
            path.unlink(missing_ok=True)
            hint = "Free some space there, or give another --bundle-dir"
            raise ResourceError(Fault(str(run_dir.root), f"it cannot be written ({error})", hint)) from error


def _check_gone(path: Path, run_dir: RunDir) -> None:
    """Remove the file of a process that is gone."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        host, pid, began_s = str(holder["host"]), int(holder["pid"]), float(holder["began_s"])
        copied = holder["bundle"] != str(run_dir.root.resolve())
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        # Half written: by a process that was killed just then, unless it is still at it.
        if _age_s(path) < STARTING_S:
            reason = "another process has just begun to train in it"
            raise SettingsError(Fault(str(run_dir.root), reason, "Wait for it to end, or stop it")) from None
        path.unlink(missing_ok=True)
        return
    here = host == socket.gethostname()
    if copied or (here and not _lives(pid, began_s)):
        path.unlink(missing_ok=True)
        return
    hint = "Wait for it to end, or stop it; for another run give another --brain-name"
    if not here:
        hint = f"Wait for it to end; if it is gone, delete {path}"
    reason = f"process {pid}{'' if here else f' on {host}'} is training in it"
    raise SettingsError(Fault(str(run_dir.root), reason, hint))


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return STARTING_S


def _lives(pid: int, began_s: float) -> bool:
    """Whether the process is the one that began then, and not another that has got its number."""
    try:
        return abs(psutil.Process(pid).create_time() - began_s) < 1.0
    except psutil.NoSuchProcess:
        return False
