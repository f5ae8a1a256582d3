"""The local launcher: the session of a worker runs in this process, without Ray."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch

from hrm_ray.data.batches import BatchSource, LocalBatches
from hrm_ray.data.chunk_source import ChunkPipeline, EpochOrder, LocalChunks
from hrm_ray.errors import DiskError, UnreadableError
from hrm_ray.launch.hangs import BEAT_INTERVAL_S, Heartbeat, Watched, judge
from hrm_ray.launch.restarts import Ending, cause_of
from hrm_ray.launch.supervisor import Failed, WatchedSink, supervise
from hrm_ray.model.transforms.compile import recompile_limit_restored
from hrm_ray.train.activity import Activity
from hrm_ray.train.plan import RunPlan
from hrm_ray.train.session import train
from hrm_ray.types import MetricSink, Record, RunResult, StopPoll, StopReason


class _OneAtATime:
    """A sink for several threads."""

    def __init__(self, sink: MetricSink) -> None:
        self._sink = sink
        self._lock = threading.Lock()

    def write(self, record: Record) -> None:
        with self._lock:
            self._sink.write(record)

    def close(self) -> None:
        self._sink.close()


@dataclass
class LocalLink:
    """The driver is this process: records go straight to its display, and stops are read from it."""

    display: MetricSink
    stop: StopPoll
    activity: Activity = field(default_factory=Activity)
    begun: bool = False

    def sink(self) -> MetricSink:
        return self.display

    def batches(self, pipeline: Callable[[bool], ChunkPipeline], order: EpochOrder) -> BatchSource:
        return LocalBatches(LocalChunks(pipeline(True), order, self.stop))

    def stop_requested(self) -> StopReason | None:
        return self.stop()

    def begin(self) -> None:
        self.begun = True


def run(plan: RunPlan, *, sink: MetricSink, stop: StopPoll) -> RunResult:
    """Train as the plan says, with a world size of 1; after a failure of a disk again from the newest checkpoint.

    PyTorch's threads, random numbers and limit of recompilations are as before afterwards.
    """
    threads = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if plan.device == "cuda" else []
    try:
        with torch.random.fork_rng(devices), recompile_limit_restored(plan.settings, torch.device(plan.device)):
            return supervise(plan, partial(_attempt, stop=stop), sink=_OneAtATime(sink), stop=stop)
    finally:
        torch.set_num_threads(threads)


def _attempt(plan: RunPlan, records: WatchedSink, stop: StopPoll) -> RunResult | Failed:
    link = LocalLink(records, stop)
    try:
        with stalls_told(link.activity, records, plan.settings.cluster.hang_after_s):
            return train(plan, link)
    except (DiskError, UnreadableError) as error:
        # Without the frames that it was raised in: they hold the model, beside which the next attempt builds another.
        kept = type(error)(error.faults)
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    batch_size = plan.settings.optimizer.batch_size
    ending = Ending(cause_of(kept), kept, records.step, plan.attempt, plan.world_size, batch_size)
    return Failed(ending, link.begun)


@contextmanager
def stalls_told(
    activity: Activity,
    sink: MetricSink,
    hang_after_s: float | None,
    clock: Callable[[], float] = time.monotonic,
    every_s: float = BEAT_INTERVAL_S,
) -> Iterator[None]:
    """While this is open, a thread tells on `sink` when `activity` makes no progress, for example because a network
    disk does not answer, and when it goes on. Nothing is ended: a call of this process can only end with it."""
    left = threading.Event()

    def watch() -> None:
        watched = Watched()
        while not left.wait(every_s):
            beat = Heartbeat.of(activity, 0, "this machine", os.getpid())
            watched, verdict = judge(watched, [beat], clock(), hang_after_s, ends=False)
            if verdict.message:
                level = "WARNING" if verdict.kind == "warning" else "INFO"
                event = Record("event", activity.step, time.time(), {"message": verdict.message, "level": level})
                with suppress(Exception):  # the thread that trains meets the sink's error itself
                    sink.write(event)

    thread = threading.Thread(target=watch, name="stall-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join(1.0)  # longer only where the sink hangs
