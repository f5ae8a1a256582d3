"""Progress of what is read before the first step, and the stop that ends it."""

from __future__ import annotations

import time
from collections.abc import Callable

from hrm_ray.data.corpus import CorpusReading
from hrm_ray.types import MetricSink, Record, StopPoll, StopRequested

REPORT_EVERY_S = 5.0
"""Short preparation says nothing; a long one a line every few seconds."""


class ReadingProgress:
    """Called while a corpus is read: reports how far that is, and raises StopRequested once a stop was asked for."""

    def __init__(self, sink: MetricSink, stop: StopPoll, clock: Callable[[], float] = time.monotonic) -> None:
        self._sink, self._stop, self._clock = sink, stop, clock
        self._next_s = clock() + REPORT_EVERY_S

    def __call__(self, reading: CorpusReading) -> None:
        reason = self._stop()
        if reason is not None:
            raise StopRequested(reason)
        now_s = self._clock()
        if now_s < self._next_s:
            return
        self._next_s = now_s + REPORT_EVERY_S
        share = "" if reading.share is None else f" ({reading.share:.0%} of the data)"
        message = f"reading the data before the first step: {reading.rows_read:,} rows{share}"
        self._sink.write(Record("event", 0, time.time(), {"message": message, "level": "INFO"}))
