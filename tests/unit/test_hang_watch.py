"""What the driver does about a group that hangs: a scripted monitor and clock, real processes, no Ray cluster."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.exceptions

from hrm_ray.launch.hangs import Heartbeat, judge_start
from hrm_ray.orchestration import hang_watch, heartbeats, run_monitor
from hrm_ray.orchestration.failures import Failure
from hrm_ray.orchestration.hang_watch import HangWatch, kill_worker
from hrm_ray.orchestration.heartbeats import HeartbeatThread
from hrm_ray.orchestration.run_monitor import RunMonitor, StatusUpdate, WorkerInfo
from hrm_ray.rundir import RunDir
from hrm_ray.train.activity import Activity
from hrm_ray.types import RunResult, StopReason

ON_POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")


class Remote:
    """`method.remote(...)` of an actor, called at once."""

    def __init__(self, work: Any) -> None:
        self.remote = work


class Monitor:
    """A RunMonitor in this process; `gone` lets every call fail."""

    def __init__(self) -> None:
        self.monitor, self.gone, self.came = RunMonitor(), False, threading.Semaphore(0)

    def __getattr__(self, name: str) -> Remote:
        def call(*arguments: Any) -> Any:
            if self.gone:
                raise ray.exceptions.GetTimeoutError("no answer")
            answer = asyncio.run(getattr(self.monitor, name)(*arguments))
            self.came.release()
            return answer

        return Remote(call)

    def take(self) -> StatusUpdate:
        return asyncio.run(self.monitor.take())


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that stand for workers."""
    children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2)]
    yield children
    for child in children:
        child.kill()
        child.wait()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of watch and monitor, in seconds."""
    now_s = [0.0]
    for module in (hang_watch, run_monitor):
        monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])
    return now_s


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(hang_watch, "kill_workers", lambda workers, env: {w.rank: kill_worker(w) for w in workers})
    monkeypatch.setattr(hang_watch, "STACKS_LOOK_S", 0.001)


def info(rank: int, pid: int) -> WorkerInfo:
    return WorkerInfo(rank, pid, "10.0.0.2", "node", psutil.Process(pid).create_time())


def told_and_ended(monitor: Monitor, folder: Path, now: list[float], pids: list[int]) -> tuple[list[str], Any]:
    """What a watch tells and returns while rank 0 waits in a collective and rank 1 sends no heartbeat any more."""
    told: list[str] = []
    watch = HangWatch(monitor, 2, RunDir(folder), None, {}, lambda level, message: told.append(f"{level} {message}"))
    workers = {rank: info(rank, pid) for rank, pid in enumerate(pids)}
    error = None
    while error is None and now[0] < 500:
        for rank in (0, 1) if now[0] == 0 else (0,):
            beat = Heartbeat(rank, "10.0.0.2", pids[rank], "step", 7, 3, now[0], step_s=0.1, collectives=9 - rank)
            monitor.beat.remote(beat)
        error = watch.look(StatusUpdate(workers=workers, heartbeats=monitor.take().heartbeats))
        now[0] += 1
    return told, error


@ON_POSIX
def test_a_stopped_process_is_named_its_stacks_are_asked_for_and_it_is_ended(
    tmp_path: Path, now: list[float], processes: list[subprocess.Popen[bytes]]
) -> None:
    monitor = Monitor()
    asyncio.run(monitor.monitor.announce(info(0, os.getpid())))
    asyncio.run(monitor.monitor.add_stacks(0, "thread MainThread:\n  File world.py, in sum\n"))
    os.kill(processes[1].pid, signal.SIGSTOP)
    told, error = told_and_ended(monitor, tmp_path, now, [child.pid for child in processes])
    assert processes[1].wait(10) == -signal.SIGKILL and processes[0].poll() is None
    assert len(told) == 1 and told[0].startswith("WARNING no progress for 30 s in step 7: rank 1")
    assert error.exit_code == 1 and len(str(error)) - len(str(tmp_path)) < 280
    for part in (
        "worker 1: no progress for 120 s in step 7",
        "does not answer",
        "(it was stopped)",
        "stacks.txt",
        "--resume",
    ):
        assert part in str(error)
    report = (tmp_path / "stacks.txt").read_text(encoding="utf-8")
    assert "in sum" in report and "9 collectives begun" in report and "no stacks: the process did not answer" in report


@ON_POSIX
def test_a_monitor_and_a_disk_that_do_not_answer_hold_nothing_up(
    tmp_path: Path, now: list[float], processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipe that stands for the file has no reader, so opening it waits for ever."""
    monkeypatch.setattr(hang_watch, "WRITE_WAIT_S", 0.05)
    os.mkfifo(tmp_path / "stacks.txt")
    monitor = Monitor()
    asked = HangWatch._stacks

    def unanswered(watch: HangWatch, answering: Any) -> Any:
        monitor.gone = True
        return asked(watch, answering)

    monkeypatch.setattr(HangWatch, "_stacks", unanswered)
    _, error = told_and_ended(monitor, tmp_path, now, [child.pid for child in processes])
    assert processes[1].wait(10) == -signal.SIGKILL
    assert "could not be written (not written in time)" in str(error)
    os.close(os.open(tmp_path / "stacks.txt", os.O_RDONLY | os.O_NONBLOCK))


def test_workers_that_never_begin_are_told_and_ended(tmp_path: Path, now: list[float]) -> None:
    """They load libraries from a dead disk, or do not find each other: then there are no heartbeats."""
    told: list[str] = []
    watch = HangWatch(
        Monitor(), 3, RunDir(tmp_path), None, {}, lambda level, message: told.append(f"{level} {message}")
    )
    error = None
    while error is None:
        error = watch.look(StatusUpdate())
        now[0] += 1
    assert told == ["INFO no worker has begun after 60 s"]
    assert now[0] > 1800 and str(error).startswith("worker 0 and 1 and 2: no worker has begun after 1800 s")
    verdict = judge_start({0, 2}, 3, 1800.0, reported=True)
    assert (verdict.message, verdict.culprits) == ("only 2 of 3 workers have begun after 1800 s", (1,))
    assert judge_start({0, 1, 2}, 3, 1e6, reported=True).kind == "nothing"


def test_another_process_with_the_number_of_a_worker_is_left_alone(processes: list[subprocess.Popen[bytes]]) -> None:
    process = processes[0]
    worker = info(1, process.pid)
    assert kill_worker(WorkerInfo(1, process.pid, "", "", worker.created_s - 100)) == "gone"
    assert process.poll() is None
    # The system's clock may have been set since.
    assert kill_worker(WorkerInfo(1, process.pid, "", "", worker.created_s - 1)) != "gone"
    assert process.wait(10) != 0
    assert kill_worker(worker) == "gone"


def test_a_worker_sends_what_it_does_and_its_stacks_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "BEAT_INTERVAL_S", 0.001)
    monitor, activity = Monitor(), Activity()
    activity.step = 12
    activity.enter("evaluation")
    worker = info(1, os.getpid())
    asyncio.run(monitor.monitor.announce(worker))
    monitor.gone = True
    thread = HeartbeatThread(monitor, worker, activity)
    monitor.gone = False  # what failed once is tried again
    assert monitor.came.acquire(timeout=20)
    (beat,) = monitor.take().heartbeats
    assert (beat.rank, beat.step, beat.phase, beat.pid) == (1, 12, "evaluation", os.getpid())
    asyncio.run(monitor.monitor.ask_stacks())
    for _ in range(10_000):
        sent = asyncio.run(monitor.monitor.stacks())
        if sent:
            break
        assert monitor.came.acquire(timeout=20)
    assert "test_a_worker_sends_what_it_does" in sent[1] and sent[1].startswith("thread MainThread")
    thread.close()
    thread._thread.join(20)
    assert not thread._thread.is_alive()


def test_a_rank_that_has_ended_is_not_waited_for() -> None:
    monitor = RunMonitor()
    for rank in range(3):
        asyncio.run(monitor.beat(Heartbeat(rank, "n", 1, "step", 7, 3, 0.0)))
    asyncio.run(monitor.finish(0, RunResult(StopReason.FINISHED, 7, 1, "b")))
    asyncio.run(monitor.fail(Failure.of(2, ValueError("odd"))))
    assert [beat.rank for beat in asyncio.run(monitor.take()).heartbeats] == [1]
