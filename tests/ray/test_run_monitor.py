"""The record channel, with a monitor whose failures are scripted; Ray is not started."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hrm_ray.orchestration import run_monitor
from hrm_ray.orchestration.failures import Failure
from hrm_ray.orchestration.run_monitor import MonitorSink, RunMonitor, WorkerChannel, WorkerInfo
from hrm_ray.types import Record, StopReason


class Remote:
    """`method.remote(...)` of an actor, called at once."""

    def __init__(self, work: Any) -> None:
        self.remote = work


class Monitor:
    """A RunMonitor in this process; its push number `fails_at` raises."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.monitor = RunMonitor()
        self.pushes = 0
        self.fails_at = fails_at
        self.failures: list[Failure] = []
        self.push, self.fail = Remote(self._push), Remote(self.failures.append)
        self.wait_for_stop = Remote(lambda: None)

    def _push(self, records: list[Record]) -> None:
        self.pushes += 1
        if self.pushes == self.fails_at:
            raise TypeError("cannot pickle '_thread.lock' object")
        asyncio.run(self.monitor.push(records))

    def steps(self) -> list[int]:
        return [record.step for record in asyncio.run(self.monitor.take()).records]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_monitor.ray, "get", lambda value: value)
    monkeypatch.setattr(run_monitor, "SEND_INTERVAL_S", 0.001)


def record(step: int) -> Record:
    return Record("train", step, 0.0, {"loss": 1.0})


def test_every_record_before_the_close_arrives_in_order() -> None:
    monitor = Monitor()
    sink = MonitorSink(monitor)
    for step in range(1000):
        sink.write(record(step))
    sink.close()
    sink.close()
    assert monitor.steps() == list(range(1000))
    with pytest.raises(RuntimeError, match="step 7"):
        sink.write(record(7))


def test_an_error_of_the_sending_thread_is_raised_by_the_next_write_and_by_close() -> None:
    sink = MonitorSink(Monitor(fails_at=1))
    sink.write(record(1))
    sink._thread.join(10.0)
    with pytest.raises(TypeError, match="cannot pickle"):
        sink.write(record(2))
    with pytest.raises(TypeError, match="cannot pickle"):
        sink.close()


def test_records_that_cannot_be_sent_at_the_end_are_an_error() -> None:
    channel = WorkerChannel(Monitor(fails_at=1), 0)
    channel.sink().write(record(1))
    with pytest.raises(TypeError, match="cannot pickle"):
        channel.finish(object())  # type: ignore[arg-type]


def test_a_failure_is_reported_though_records_cannot_be_sent() -> None:
    monitor = Monitor(fails_at=1)
    channel = WorkerChannel(monitor, 0)
    channel.sink().write(record(1))
    channel.fail(Failure.of(0, ValueError("odd")))
    (failure,) = monitor.failures
    assert failure.message == "odd" and "Records of the last steps could not be sent: TypeError" in failure.trace


def test_of_several_progress_records_only_the_newest_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_monitor, "SEND_INTERVAL_S", 3600.0)  # so that all go at once, when the channel is closed
    monitor = Monitor()
    sink = MonitorSink(monitor)
    for step in (1, 2, 3):
        sink.write(Record("progress", step, 0.0, {}))
        sink.write(record(step))
    sink.close()
    records = asyncio.run(monitor.monitor.take()).records
    assert [(each.kind, each.step) for each in records] == [("train", 1), ("train", 2), ("progress", 3), ("train", 3)]


def test_a_stop_goes_before_a_resize() -> None:
    """A worker that is to make way at its next checkpoint may still be asked to stop; not the other way round."""

    async def asked() -> list[StopReason | None]:
        monitor = RunMonitor()
        await monitor.announce(WorkerInfo(0, 1, "here"))
        first = asyncio.ensure_future(monitor.wait_for_stop())
        await monitor.ask_stop(StopReason.RESIZE)
        seen = [await first]
        then = asyncio.ensure_future(monitor.wait_for_stop(StopReason.RESIZE))
        await asyncio.sleep(0)
        assert not then.done()
        await monitor.ask_stop(StopReason.SIGTERM)
        await monitor.ask_stop(StopReason.RESIZE)
        return [*seen, await then, await monitor.wait_for_stop()]

    assert asyncio.run(asked()) == [StopReason.RESIZE, StopReason.SIGTERM, StopReason.SIGTERM]
