"""The channel between training workers and the driver: an actor that holds records, failures and the stop.

One job: carry values. The monitor keeps them in order and hands them out once; `WorkerChannel` is a worker's end of it
(`DriverLink` of hrm_ray.types). Does not decide what a failure means and writes nothing to a screen or a file.

Why an actor and not ray.train.report: a report is a barrier of all ranks and its queue is emptied once per health
check, so one report per step costs hundreds of milliseconds per step; a push here costs well under one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from hrm_ray.data.chunk_source import ChunkPipeline, ChunkSource, EpochOrder, LocalChunks
from hrm_ray.orchestration.chunk_server import RemoteChunks
from hrm_ray.orchestration.failures import Failure
from hrm_ray.types import MetricSink, Record, RunResult, StopReason

SEND_INTERVAL_S = 0.1
"""At most ten pushes a second, whatever the rate of records."""
STOP_CHECK_INTERVAL_S = 0.1
"""`stop_requested` looks at the channel at most this often, so that it costs nothing in a loop of fast steps."""


@dataclass(frozen=True)
class WorkerPlace:
    """Where a rank runs, for messages to a person."""

    rank: int
    pid: int
    node_ip: str


@dataclass(frozen=True)
class StatusUpdate:
    """What the driver has not seen yet, and the state of the worker group."""

    records: list[Record] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    workers: dict[int, WorkerPlace] = field(default_factory=dict)
    finished: frozenset[int] = frozenset()
    outcome: RunResult | None = None


class RunMonitor:
    """Runs as an actor next to the driver; all state is small and lives as long as the run."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self._failures: list[Failure] = []
        self._workers: dict[int, WorkerPlace] = {}
        self._finished: set[int] = set()
        self._outcome: RunResult | None = None
        self._stop: StopReason | None = None
        self._stop_set = asyncio.Event()
        self._called_off = False

    async def announce(self, place: WorkerPlace) -> bool:
        """A worker says that it is there; False tells it not to begin, because the driver has given up."""
        if not self._called_off:
            self._workers[place.rank] = place
        return not self._called_off

    async def push(self, first: int, records: list[Record]) -> None:
        """Records numbered from `first`; numbered because an actor may run concurrent calls in any order."""
        for offset, record in enumerate(records):
            self._records[first + offset] = record

    async def fail(self, failure: Failure) -> None:
        self._failures.append(failure)

    async def finish(self, rank: int, outcome: RunResult) -> None:
        self._finished.add(rank)
        if rank == 0:
            self._outcome = outcome

    async def ask_stop(self, reason: StopReason) -> bool:
        """Tell the workers to stop; False if none has begun, and then none will."""
        self._called_off = not self._workers
        if self._stop is None:
            self._stop = reason
            self._stop_set.set()
        return not self._called_off

    async def wait_for_stop(self) -> StopReason | None:
        """Answered when a stop is asked for: the workers hold the promise and look at it, so polling needs no call."""
        await self._stop_set.wait()
        return self._stop

    async def take(self, seen: int) -> StatusUpdate:
        """Everything after the first `seen` records, without gaps; those seen are forgotten."""
        for index in [index for index in self._records if index < seen]:
            del self._records[index]
        records: list[Record] = []
        while seen + len(records) in self._records:
            records.append(self._records[seen + len(records)])
        return StatusUpdate(
            records, list(self._failures), dict(self._workers), frozenset(self._finished), self._outcome
        )


class MonitorSink:
    """A MetricSink that hands records to the monitor from a thread of its own; a training step never waits."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._pending: list[Record] = []
        self._sent = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_until_closed, name="monitor-sink", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Take one record; costs microseconds."""
        with self._lock:
            self._pending.append(record)
        self._wake.set()

    def close(self) -> None:
        """Return when the monitor has every record."""
        self._closing.set()
        self._wake.set()
        self._thread.join()

    def _send_until_closed(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            with self._lock:
                batch, self._pending = self._pending, []
            if batch:
                first, self._sent = self._sent, self._sent + len(batch)
                ray.get(self._monitor.push.remote(first, batch))
            if closing:
                return
            self._closing.wait(SEND_INTERVAL_S)


class WorkerChannel:
    """A worker's end of the channel (`DriverLink`)."""

    def __init__(self, monitor: Any, rank: int, chunk_server: Any = None) -> None:
        self._monitor = monitor
        self._chunk_server = chunk_server
        self._rank = rank
        self._sink: MonitorSink | None = None
        self._promise = monitor.wait_for_stop.remote()
        self._next_look_s = 0.0
        self._reason: StopReason | None = None

    def sink(self) -> MetricSink:
        """The channel for the leading rank's records; one per worker."""
        if self._sink is None:
            self._sink = MonitorSink(self._monitor)
        return self._sink

    def stop_requested(self) -> StopReason | None:
        """The driver's stop, at most STOP_CHECK_INTERVAL_S old; a local look, no call to another process."""
        now = time.monotonic()
        if self._reason is None and now >= self._next_look_s:
            self._next_look_s = now + STOP_CHECK_INTERVAL_S
            ready, _ = ray.wait([self._promise], timeout=0)
            if ready:
                self._reason = ray.get(self._promise)
        return self._reason

    def chunks(self, pipeline: Callable[[bool], ChunkPipeline], order: EpochOrder) -> ChunkSource:
        """The chunks that the ChunkServer hands out; where there is none, this worker makes its own."""
        if self._chunk_server is not None:
            return RemoteChunks(self._chunk_server, self._rank)
        return LocalChunks(pipeline(True), order)

    def announce(self, place: WorkerPlace) -> bool:
        """Say that this worker is there; False means: do not begin."""
        return bool(ray.get(self._monitor.announce.remote(place)))

    def flush(self) -> None:
        """Return when every record written so far is with the monitor."""
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def finish(self, outcome: RunResult) -> None:
        """Hand over all records, then the outcome."""
        self.flush()
        ray.get(self._monitor.finish.remote(self._rank, outcome))

    def fail(self, failure: Failure) -> None:
        """Hand over all records, then the failure."""
        self.flush()
        ray.get(self._monitor.fail.remote(failure))
