"""The signals that stop a process in order, and what they do while no training goes on.

Imports almost nothing: the command handles signals before it loads torch.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

COMMAND_STARTED_S = time.time()
"""When the command was started, in seconds since the epoch, but for the start of Python itself."""
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130

STOP_SIGNALS = {
    int(number): name
    for name, number in signal.Signals.__members__.items()
    if name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK")
}
"""Names of the signals that stop a run, by number; those that this platform has."""


class Terminated(SystemExit):
    """Raised where a signal other than Ctrl-C ends the process before it trains."""

    def __init__(self, name: str, consequence: str = "") -> None:
        super().__init__(EXIT_STOPPED)
        self.message = f"stopped by {name}{consequence}"


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install `handler` for STOP_SIGNALS; returns the handlers before, by number.

    A signal that is ignored stays ignored (nohup, a shell's background process), and so does one whose handler was not
    installed from Python. Outside the main thread nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    left_alone = (signal.SIG_IGN, None)
    return {
        number: signal.signal(number, handler) for number in STOP_SIGNALS if signal.getsignal(number) not in left_alone
    }


def exit_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """A handler for the time in which nothing is written that would have to be removed.

    It does not raise: an exception inside the import of a library may be lost, or become another error.
    """
    if number == signal.SIGINT:
        leave(EXIT_INTERRUPTED, "interrupted")
    leave(EXIT_STOPPED, f"stopped by {STOP_SIGNALS[number]}")


def unwind(number: int, frame: FrameType | None) -> NoReturn:
    """A handler that raises, so that what is half written is removed."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(STOP_SIGNALS[number])


def unwind_from_now_on() -> None:
    """Replace the handler `exit_at_once`, where the command has installed it, by `unwind`."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is exit_at_once:
                signal.signal(number, unwind)


def leave(code: int, message: str) -> NoReturn:
    """End the process without clean-up, after one line on stderr."""
    with suppress(OSError):  # it is closed, or its terminal is gone
        # Not through sys.stderr: the signal may have interrupted a write to it.
        os.write(2, f"{message}\n".encode("ascii", errors="backslashreplace"))
    os._exit(code)
