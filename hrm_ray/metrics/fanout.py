"""A sink that passes each record on to several sinks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hrm_ray.types import MetricSink, Record


class FanOut:
    """Writes each record to all sinks in their order; an error of one is raised, so that metrics are not lost
    silently."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, record: Record) -> None:
        """Take one record."""
        for sink in self._sinks:
            sink.write(record)

    def close(self, *, run_failed: bool = False) -> None:
        """Close all, the last opened first; an error of one is printed on stderr, and the others are closed.

        Where the run has failed, nothing is printed: its own error says more, such as that the disk is full.
        """
        for sink in reversed(self._sinks):
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001 - clean-up
                if not run_failed:
                    print(f"warning: the metrics could not be closed: {error}", file=sys.stderr)
