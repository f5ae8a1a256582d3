"""A run as a function: from settings to its result.

It owns neither the process nor its signals: the caller polls them and says when to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import import_module

from hrm_ray.data.corpus import CorpusReading
from hrm_ray.launch.after_trainers import after_trainers
from hrm_ray.launch.devices import visible_gpus
from hrm_ray.launch.new_bundle import removed_unless_trained
from hrm_ray.launch.plan import make_plan
from hrm_ray.launch.resolve import ResolvedRun, resolve
from hrm_ray.launch.run_directory import check_unchanged, finished_before
from hrm_ray.launch.run_lock import run_lock
from hrm_ray.metrics.fanout import FanOut
from hrm_ray.metrics.jsonl import drop_copies
from hrm_ray.settings.tree import RunSettings
from hrm_ray.types import MetricSink, Record, RunResult, StopPoll, StopReason, StopRequested

REPORT_EVERY_S = 5.0
"""Seconds between two reports of how far the data was read; shorter reading is not reported."""
_END_S = {"local": 3.0, "ray": 20.0, "subprocess": 6.0}
"""What the end takes after the last step, by launcher: Ray closes its cluster, and independent trainers are merged."""


def run(
    settings: RunSettings | ResolvedRun,
    *,
    sink: MetricSink | None = None,
    stop: StopPoll | None = None,
    on_start: Callable[[], None] | None = None,
    started_s: float | None = None,
) -> RunResult:
    """Train with these settings and return the result. Raises HrmRayError, and StopRequested for a stop before the
    first step.

    Records go to `sink` besides the files of the bundle. `stop` is polled about once per step; a reason ends the run in
    order, with a checkpoint. In a program that has called `ray.init` Ray's workers run on its cluster, with the
    defaults of --ray-address auto but for the number of workers. `on_start` is called once everything is prepared, just
    before training starts. --max-time counts from `started_s` (seconds since the epoch), or from this call. A local run
    on the CPU sets what glibc does with freed memory (--keep-freed-memory); that outlives the run.
    """
    called_s = time.time()
    sink, stop = sink or FanOut([]), stop or (lambda: None)
    resolved = resolve(settings) if isinstance(settings, RunSettings) else settings
    devices = resolved.devices
    max_time_s, stop_by_s = resolved.settings.run.max_time_s, None
    if max_time_s is not None:
        stop_by_s = (called_s if started_s is None else started_s) + max_time_s - _END_S[devices.launcher]
        stop = partial(_stop_or_time_over, stop, stop_by_s)
    finished = finished_before(resolved.settings, resolved.location)
    if finished is not None:
        message = "The run has finished: there is nothing to train. Give more --steps or --epochs to continue it."
        sink.write(Record("event", finished.step, time.time(), {"message": message, "level": "INFO"}))
        return finished
    with ExitStack() as held:
        held.enter_context(run_lock(resolved.location.run_dir))
        # Another run may have used the folder between the first check and the lock.
        resolved = replace(resolved, location=check_unchanged(resolved.settings, resolved.location))
        log = resolved.settings.run.log_file
        if log is not None and resolved.location.may_replace:
            drop_copies(log, resolved.location.run_dir.metrics, -1)
        held.enter_context(removed_unless_trained(resolved.location))
        held.enter_context(visible_gpus(devices))
        plan = replace(make_plan(resolved, _ReadingProgress(sink, stop)), stop_by_s=stop_by_s)
        plan = after_trainers(plan, devices.launcher, sink=sink, stop=stop)
        launch: Callable[..., RunResult] = import_module(devices.module).run
        if on_start is not None:
            on_start()
        return launch(plan, sink=sink, stop=stop)


def _stop_or_time_over(stop: StopPoll, stop_by_s: float) -> StopReason | None:
    return stop() or (StopReason.MAX_TIME if time.time() >= stop_by_s else None)


class _ReadingProgress:
    """Called while a corpus is read: reports how far that is, and raises StopRequested once a stop was asked for."""

    def __init__(self, sink: MetricSink, stop: StopPoll) -> None:
        self._sink, self._stop = sink, stop
        self._next_s = time.monotonic() + REPORT_EVERY_S

    def __call__(self, reading: CorpusReading) -> None:
        reason = self._stop()
        if reason is not None:
            raise StopRequested(reason)
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + REPORT_EVERY_S
        share = "" if reading.share is None else f" ({reading.share:.0%} of the data)"
        message = f"reading the data before the first step: {reading.rows_read:,} rows{share}"
        self._sink.write(Record("event", 0, time.time(), {"message": message, "level": "INFO"}))
