"""The channel between training workers and the driver: an actor that holds records, failures and the stop request.

`ray.train.report` is no such channel: it is a barrier of all ranks, and its queue is emptied once per health check, so
that a report per step costs hundreds of milliseconds. A push to this actor costs well under one.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import ray

from hrm_ray.data.batch_server import ServedBatches
from hrm_ray.data.batches import BatchSource, LocalBatches
from hrm_ray.data.chunk_source import ChunkPipeline, EpochOrder, LocalChunks
from hrm_ray.launch.hangs import Heartbeat
from hrm_ray.orchestration.chunk_server import ActorCalls
from hrm_ray.orchestration.failures import Failure
from hrm_ray.train.activity import Activity
from hrm_ray.types import MetricSink, Record, RunResult, StopReason

SEND_INTERVAL_S = 0.1
"""Records are sent at most ten times a second."""
PROGRESS_INTERVAL_S = 0.4
"""Progress alone is sent less often: each call costs up to a millisecond."""
STOP_CHECK_INTERVAL_S = 0.1
"""`stop_requested` looks for a request at most this often, so that it costs nothing in a loop of fast steps."""


@dataclass(frozen=True)
class WorkerInfo:
    """The process and node of a rank, for messages, and the placement group of all ranks."""

    rank: int
    pid: int
    node_ip: str
    node_id: str = ""
    created_s: float = 0.0
    """When the process was started: another one may have its number later."""
    placement_group: Any = None

    @classmethod
    def here(cls, rank: int) -> WorkerInfo:
        """This process."""
        context, address = ray.get_runtime_context(), ray.util.get_node_ip_address()
        created_s, group = psutil.Process().create_time(), ray.util.get_current_placement_group()
        return cls(rank, os.getpid(), address, context.get_node_id(), created_s, group)


@dataclass(frozen=True)
class StatusUpdate:
    """Records that the driver has not received yet, and the state of the worker group."""

    records: tuple[Record, ...] = ()
    failures: tuple[Failure, ...] = ()
    workers: Mapping[int, WorkerInfo] = field(default_factory=dict)
    finished: frozenset[int] = frozenset()
    begun: bool = False
    result: RunResult | None = None
    heartbeats: tuple[Heartbeat, ...] = ()
    """The newest of each rank that has begun and not ended."""


class RunMonitor:
    """An actor on the driver's node."""

    def __init__(self) -> None:
        # Replaced, never changed in place: what `take` has returned may not be pickled yet.
        self._status = StatusUpdate()
        self._stop: StopReason | None = None
        self._stop_changed = asyncio.Event()
        self._cancelled = False
        self._beats: dict[int, tuple[float, Heartbeat]] = {}
        self._stacks_wanted: set[int] = set()
        self._stacks: dict[int, str] = {}

    async def announce(self, worker: WorkerInfo) -> bool:
        """Register a worker; False: it must not begin, because the run was stopped before."""
        if not self._cancelled:
            self._status = replace(self._status, workers={**self._status.workers, worker.rank: worker})
        return not self._cancelled

    async def begin(self) -> None:
        """The files of the run are open."""
        self._status = replace(self._status, begun=True)

    async def push(self, records: list[Record]) -> None:
        """Add records. The sender waits for each call, so they stay in order."""
        self._status = replace(self._status, records=(*self._status.records, *records))

    async def beat(self, heartbeat: Heartbeat) -> bool:
        """Keep a heartbeat; returns whether this rank is to send its stacks."""
        rank = heartbeat.rank
        self._beats[rank] = time.monotonic(), heartbeat
        wanted = rank in self._stacks_wanted
        self._stacks_wanted.discard(rank)
        return wanted

    async def ask_stacks(self) -> None:
        """Let every rank send its stacks with its next heartbeat."""
        self._stacks_wanted = set(self._status.workers)

    async def add_stacks(self, rank: int, stacks: str) -> None:
        self._stacks[rank] = stacks

    async def stacks(self) -> Mapping[int, str]:
        """The stacks that ranks have sent."""
        return dict(self._stacks)

    async def fail(self, failure: Failure) -> None:
        self._status = replace(self._status, failures=(*self._status.failures, failure))

    async def finish(self, rank: int, result: RunResult) -> None:
        """A rank has ended; the run's result is that of rank 0."""
        status = replace(self._status, finished=self._status.finished | {rank})
        self._status = status if rank else replace(status, result=result)

    async def ask_stop(self, reason: StopReason) -> bool:
        """Request a stop; False where no worker has begun, and then none will."""
        self._cancelled = not self._status.workers
        if self._stop in (None, StopReason.RESIZE):
            self._stop, changed, self._stop_changed = reason, self._stop_changed, asyncio.Event()
            changed.set()
        return not self._cancelled

    async def wait_for_stop(self, known: StopReason | None = None) -> StopReason | None:
        """Return when a stop is requested, another than `known`. Workers keep the pending result, so that a look needs
        no call."""
        while self._stop in (None, known):
            await self._stop_changed.wait()
        return self._stop

    async def take(self) -> StatusUpdate:
        """The state of the worker group, and the records since the last call."""
        now_s = time.monotonic()
        taken, self._status = self._status, replace(self._status, records=())
        ended = taken.finished | {failure.rank for failure in taken.failures}
        beats = sorted(self._beats.items())
        heartbeats = tuple(replace(beat, age_s=now_s - at_s) for rank, (at_s, beat) in beats if rank not in ended)
        return replace(taken, heartbeats=heartbeats)


class MonitorSink:
    """A MetricSink whose thread sends records to the monitor, so that a training step does not wait.

    An error in the thread is raised by the next `write` and by `close`: records are not lost silently.
    """

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._records: queue.SimpleQueue[Record] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._send_until_closed, name="monitor-sink", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Queue one record; costs microseconds."""
        if self._error is not None:
            raise self._error
        if self._closing.is_set():
            raise RuntimeError(f"a record of step {record.step} was written after the channel was closed")
        self._records.put(record)

    def close(self) -> None:
        """Return when the monitor has every record."""
        self._closing.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _send_until_closed(self) -> None:
        try:
            closing, batch, sent_s = False, list[Record](), 0.0
            while not closing:
                closing = self._closing.wait(SEND_INTERVAL_S)
                batch += [self._records.get() for _ in range(self._records.qsize())]
                newest = max((index for index, each in enumerate(batch) if each.kind == "progress"), default=-1)
                batch = [each for index, each in enumerate(batch) if each.kind != "progress" or index == newest]
                waits = newest >= 0 and len(batch) == 1 and time.monotonic() - sent_s < PROGRESS_INTERVAL_S
                if batch and (closing or not waits):
                    ray.get(self._monitor.push.remote(batch))
                    batch, sent_s = [], time.monotonic()
        except BaseException as error:  # noqa: BLE001 - raised again by write and close
            self._error = error


class WorkerChannel:
    """A worker's end of the channel (`DriverLink`)."""

    def __init__(self, monitor: Any, rank: int, chunk_server: Any = None) -> None:
        self._monitor = monitor
        self._chunk_server = chunk_server
        self._rank = rank
        self._sink: MonitorSink | None = None
        self._stop = monitor.wait_for_stop.remote()
        self._next_look_s = 0.0
        self._reason: StopReason | None = None
        self.activity = Activity()

    def sink(self) -> MetricSink:
        """The channel for the leading rank's records; one per worker."""
        if self._sink is None:
            self._sink = MonitorSink(self._monitor)
        return self._sink

    def stop_requested(self) -> StopReason | None:
        """The driver's stop request, at most STOP_CHECK_INTERVAL_S old."""
        now = time.monotonic()
        if self._reason in (None, StopReason.RESIZE) and now >= self._next_look_s:
            self._next_look_s = now + STOP_CHECK_INTERVAL_S
            ready, _ = ray.wait([self._stop], timeout=0)
            if ready:
                self._reason = ray.get(self._stop)
                if self._reason is StopReason.RESIZE:
                    # The run may still be asked to stop before its next checkpoint.
                    self._stop = self._monitor.wait_for_stop.remote(self._reason)
        return self._reason

    def batches(self, pipeline: Callable[[bool], ChunkPipeline], order: EpochOrder) -> BatchSource:
        """The ChunkServer's batches; without a ChunkServer this worker reads and tokenises for itself."""
        if self._chunk_server is not None:
            return ServedBatches(ActorCalls(self._chunk_server), self._rank)
        return LocalBatches(LocalChunks(pipeline(True), order))

    def begin(self) -> None:
        """Tell the driver that the files of the run are open."""
        ray.get(self._monitor.begin.remote())

    def announce(self, worker: WorkerInfo) -> bool:
        """Register this worker; False: it must not begin."""
        return bool(ray.get(self._monitor.announce.remote(worker)))

    def finish(self, result: RunResult) -> None:
        """Send all records, then the result."""
        if self._sink is not None:
            self._sink.close()
        ray.get(self._monitor.finish.remote(self._rank, result))

    def fail(self, failure: Failure) -> None:
        """Send all records, then the failure; the failure too where records cannot be sent."""
        try:
            if self._sink is not None:
                self._sink.close()
        except Exception as error:  # noqa: BLE001 - the failure is what must arrive
            lost = f"Records of the last steps could not be sent: {type(error).__name__}: {error}"
            failure = replace(failure, trace=f"{failure.trace}\n{lost}")
        ray.get(self._monitor.fail.remote(failure))
