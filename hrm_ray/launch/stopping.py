"""Turns SIGTERM, Ctrl-C and --stop-file into one StopReason that training polls; a second Ctrl-C ends at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from hrm_ray.types import StopReason

_LOOK_EVERY_S = 0.2
"""How often the stop file is looked for: a look can be slow on a network file system, a step can be short."""


class StopWatch:
    """Context in which SIGTERM and Ctrl-C end the process in order.

    Until `begin` they raise (KeyboardInterrupt, or SystemExit with SIGTERM's exit code), so that whatever is being
    prepared is cleaned up. After it the first one is remembered, for training to finish its step and save. Signals are
    handled in the main thread only; elsewhere just the stop file counts.
    """

    def __init__(self, stop_file: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stop_file = stop_file
        self.reason: StopReason | None = None
        self._clock = clock
        self._looked_s = float("-inf")
        self._before: dict[int, Any] = {}
        self._training = False

    def begin(self) -> None:
        """Training starts: from now on a stop is a request."""
        self._training = True

    def __enter__(self) -> StopWatch:
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupted)
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminated)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self) -> StopReason | None:
        """The stop that was asked for, if any; cheap enough for every step."""
        if self.reason is None and self.stop_file is not None and self._clock() - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = self._clock()
            if self.stop_file.exists():
                self.reason = StopReason.STOP_FILE
        return self.reason

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self.reason is StopReason.INTERRUPT or not self._training:
            raise KeyboardInterrupt
        self.reason = StopReason.INTERRUPT

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        if not self._training:
            raise SystemExit(StopReason.SIGTERM.exit_code)
        self.reason = self.reason or StopReason.SIGTERM
