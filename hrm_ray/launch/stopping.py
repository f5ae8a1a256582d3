"""Turns signals, --stop-file and --max-time into one StopReason that training polls; a second Ctrl-C ends at once."""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from hrm_ray.stop_signals import EXIT_INTERRUPTED, STOP_SIGNALS, Terminated, handle_signals, leave
from hrm_ray.types import StopReason

_LOOK_EVERY_S = 0.2
"""How often the stop file is looked for: a look can be slow on a network file system, a step can be short."""
_LEAVE_WITHIN_S = 30.0
"""After a second Ctrl-C the process is ended without clean-up where clean-up takes longer. Ray's takes up to 20 s."""
_PRINT_WITHIN_S = 1.0
"""How long the end waits for the announcement of a stop, which a full pipe may hold up."""
_REASONS = {
    "SIGINT": StopReason.INTERRUPT,
    "SIGTERM": StopReason.SIGTERM,
    "SIGHUP": StopReason.SIGHUP,
    "SIGUSR1": StopReason.SIGUSR1,
    "SIGBREAK": StopReason.SIGTERM,  # of Windows, which delivers no SIGTERM
}
_NOTHING_TRAINED = " before training began: nothing was trained"


class StopWatch:
    """Context in which signals end the process in order.

    Until `begin` they raise (KeyboardInterrupt, or Terminated with exit code 75), so that whatever is being prepared is
    cleaned up. After it the first one is announced on stderr and remembered, for training to finish its step and save;
    Ctrl-C then ends at once. Signals are handled in the main thread only; elsewhere just the stop file counts.
    """

    def __init__(self, stop_file: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stop_file = stop_file
        self.reason: StopReason | None = None
        self._clock = clock
        self._looked_s = float("-inf")
        self._before: dict[int, Any] = {}
        self._training = False
        self._signals: list[int] = []
        self._interrupted_again = False
        # What a handler says goes through a thread: the signal may have interrupted a write of the display, whose locks
        # the main thread then holds. SimpleQueue.put may be called in a handler.
        self._announcements: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._announce, name="stop-watch", daemon=True)
        self._left = threading.Event()

    def begin(self) -> None:
        """Training starts: from now on a stop is a request."""
        self._training = True

    def __enter__(self) -> StopWatch:
        self._thread.start()
        self._before = handle_signals(self._signalled)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._left.set()
        self._announcements.put(None)
        self._thread.join(_PRINT_WITHIN_S)

    def poll(self) -> StopReason | None:
        """The stop that was asked for, if any; cheap enough for every step."""
        if self.reason is None and self.stop_file is not None and self._clock() - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = self._clock()
            if self.stop_file.exists():
                self.reason = StopReason.STOP_FILE
        return self.reason

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        name, first = STOP_SIGNALS[number], not self._signals
        self._signals.append(number)
        if first and not self._training:
            if number == signal.SIGINT:
                raise KeyboardInterrupt(_NOTHING_TRAINED)
            raise Terminated(name, _NOTHING_TRAINED)
        if first:
            self.reason = self.reason or _REASONS[name]
            by, again = ("", "Ctrl-C again") if number == signal.SIGINT else (f" ({name})", "Ctrl-C")
            self._announcements.put(f"stopping after this step{by}; {again} leaves at once")
        elif number == signal.SIGINT:
            if self._interrupted_again or not self._training:
                leave(EXIT_INTERRUPTED, "interrupted")
            self._interrupted_again = True
            self._announcements.put(None)
            raise KeyboardInterrupt

    def _announce(self) -> None:
        """Print what the handlers say; after a second Ctrl-C, end the process where it does not end itself."""
        while (message := self._announcements.get()) is not None:
            with suppress(OSError, ValueError):  # stderr is closed, or its terminal is gone
                print(message, file=sys.stderr, flush=True)
        if not self._left.wait(_LEAVE_WITHIN_S):
            leave(EXIT_INTERRUPTED, "interrupted")
