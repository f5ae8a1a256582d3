"""Training in a job: the command is run again where it was ended from outside or failed by chance.

A cluster's job has one process, which nobody starts again. This one starts `hrm-ray train --auto-resume` and waits.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import hrm_ray
from hrm_ray.cli.flat_command import FlatCommand
from hrm_ray.cli.train import OWN
from hrm_ray.errors import HrmRayError
from hrm_ray.launch.run_directory import load_run, locate_run
from hrm_ray.stop_signals import EXIT_STOPPED, handle_signals

RERUN_ON = (1, EXIT_STOPPED)
"""Exit codes after which the same command may succeed: a failure, and a stop. Wrong settings, a missing library, too
little memory, damaged data and losses that are not finite (2 to 6) would end it again."""
WAIT_S = 10.0
"""Before the command is run again."""
SOURCE = Path(hrm_ray.__path__[0]).resolve().parent


def run_until_done(argv: Sequence[str], *, wait_s: float = WAIT_S) -> int:
    """Run `hrm-ray train --auto-resume` on the words until it is done; returns its last exit code.

    It is run again after the codes of RERUN_ON, unless this process was asked to stop, --max-time was given (then the
    time is over), two runs in a row have failed with the same newest checkpoint, or one with --resume-from has saved
    nothing.
    """
    arguments = FlatCommand("train [OPTIONS]", "", OWN).parse(argv)
    child = _Child()
    # A run that fails with wrong options says so itself.
    words = [word for word in argv if word != "--resume"]
    again = {name: value for name, value in arguments.options.items() if name not in ("--resume", "--resume-from")}
    branches = "--resume-from" in arguments.options
    before = _newest_saved(again, arguments.config) if branches else None
    code = child.run(words if branches else [*words, "--auto-resume"])
    failed_at: list[str] = []
    while code in RERUN_ON and not child.stopped:
        if branches and _newest_saved(again, arguments.config) == before:
            # Without a checkpoint of its own it would begin from other weights than those that were named.
            print(f"{child.ended} before the first save: --resume-from is not run again", file=sys.stderr, flush=True)
            break
        branches = False
        settings = load_run({**again, "--auto-resume": True}, arguments.config)
        newest = locate_run(settings).run_dir.newest_checkpoint()
        begins = "the start" if newest is None else newest.name
        if settings.run.max_time is not None or failed_at[-1:] == [begins]:
            break
        if code != EXIT_STOPPED:
            failed_at.append(begins)
        print(f"{child.ended}: training is run again from {begins}", file=sys.stderr, flush=True)
        child.pause(wait_s)
        if child.stopped:
            break
        code = child.run([*_words({**again, **arguments.own}), "--auto-resume"])
    return code


def _newest_saved(options: Mapping[str, str | bool], config: Path | None) -> tuple[str, int] | None:
    """Name and time of the newest checkpoint of the bundle; None where there is none, or no bundle can be named."""
    try:
        newest = locate_run(load_run({**options, "--auto-resume": True}, config)).run_dir.newest_checkpoint()
        return None if newest is None else (newest.name, newest.stat().st_mtime_ns)
    except (HrmRayError, OSError):
        return None  # The run itself says what is wrong.


def _words(options: Mapping[str, str | bool]) -> list[str]:
    return [f"{name}={value}" if isinstance(value, str) else name for name, value in options.items()]


class _Child:
    """The command as a process of its own, which gets the signals that ask this one to stop."""

    def __init__(self) -> None:
        self.stopped = False
        self.ended = ""
        """How the last run ended."""
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = threading.Event()
        handle_signals(self._signalled)

    def run(self, words: Sequence[str]) -> int:
        """Run the command to its end; returns its exit code."""
        before = os.environ.get("PYTHONPATH")
        path = str(SOURCE) if not before else os.pathsep.join([str(SOURCE), before])
        command = [sys.executable, "-m", "hrm_ray", "train", *words]
        self._process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
        code = self._process.wait()
        self.ended = f"exit code {code}" if code >= 0 else f"the command was ended by signal {-code}"
        # A process that a signal has killed is a failure like any other.
        return code if code >= 0 else 1

    def pause(self, wait_s: float) -> None:
        """Wait, until a stop is asked for."""
        deadline_s = time.monotonic() + wait_s
        while not self._asked.wait(0.2) and time.monotonic() < deadline_s:
            continue

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        self._asked.set()
        # A terminal sends Ctrl-C to both, and Windows knows no other signal that a process could pass on.
        if os.name != "nt" and number != signal.SIGINT and self._process is not None:
            self._process.send_signal(number)
