"""One run at a time in a bundle: a lock of the operating system, and a file that names the process that holds it.

The system releases the lock of a process that was killed, also on another machine that shares the folder.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from hrm_ray.bundle.folder_watch import FolderWatch
from hrm_ray.errors import Fault, ResourceError, SettingsError
from hrm_ray.rundir import DRIVER_MARKER, RunDir


@contextmanager
def run_lock(run_dir: RunDir) -> Iterator[None]:
    """Hold the bundle's folder, which is made if need be and removed at the end if nothing came into it.

    Raises SettingsError where another process holds it or the folder cannot be made, ResourceError where the lock
    cannot be taken.
    """
    root = run_dir.root
    lock = FileLock(run_dir.run_lock)
    made = not root.exists()
    while not lock.is_locked:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            hint = "Give --bundle-dir a folder that can be written"
            raise SettingsError(Fault(str(root), f"the folder cannot be created ({error.strerror})", hint)) from error
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not run_dir.run_lock.exists():
                continue  # The run that held it has ended meanwhile, and removed its folder.
            raise _in_use(run_dir) from None
        except FileNotFoundError:
            continue  # Another run that trained nothing has just removed the folder.
        except OSError as error:
            hint = "Free some space there, or give another --bundle-dir"
            raise ResourceError(Fault(str(root), f"it cannot be locked ({error})", hint)) from error
    watch = FolderWatch(root)
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid()}
        # Without it the run is as safe; only the message that refuses another run says less.
        with suppress(OSError):
            run_dir.lock_holder.write_text(json.dumps(holder), encoding="utf-8")
        for marker in root.glob(f"{DRIVER_MARKER}*"):  # of a launch that was killed
            with suppress(OSError):
                marker.unlink()
        yield
    finally:
        in_place = watch.fault() is None
        watch.close()
        if in_place:
            with suppress(OSError):
                run_dir.lock_holder.unlink()
        if os.name == "nt":
            lock.release()  # Windows cannot remove a file that is open.
        if made and in_place:
            with suppress(OSError):
                if {path.name for path in root.iterdir()} == {run_dir.run_lock.name}:
                    run_dir.run_lock.unlink()
                    root.rmdir()
        lock.release()


def check_not_in_use(run_dir: RunDir) -> None:
    """Raises SettingsError where another process is training in the bundle. Creates nothing."""
    if is_in_use(run_dir):
        raise _in_use(run_dir)


def is_in_use(run_dir: RunDir) -> bool:
    """Whether a process is training in the bundle. Creates nothing."""
    if not run_dir.run_lock.exists():
        return False
    lock = FileLock(run_dir.run_lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False  # A folder that cannot be locked is reported by the run that needs it.
    finally:
        lock.release()
    return False


def _in_use(run_dir: RunDir) -> SettingsError:
    hint = "Wait for it to end, or stop it; for another run give another --brain-name"
    return SettingsError(Fault(str(run_dir.root), f"{_holder(run_dir)} is training in it", hint))


def holder_of(run_dir: RunDir) -> tuple[str, int] | None:
    """The machine and the process that hold a bundle; None where that is not written there, or cannot be read."""
    try:
        holder = json.loads(run_dir.lock_holder.read_text(encoding="utf-8"))
        return str(holder["host"]), int(holder["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # It has not written its name yet, or cannot.


def _holder(run_dir: RunDir) -> str:
    holder = holder_of(run_dir)
    return "another process" if holder is None else f"process {holder[1]} on {holder[0]}"
