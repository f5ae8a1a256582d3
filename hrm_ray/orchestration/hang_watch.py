"""The driver's watch over the workers' heartbeats: it reports a stall, and ends workers that hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hrm_ray.errors import Fault
from hrm_ray.launch.hangs import UNWATCHED_S, Heartbeat, Verdict, Watched, judge, judge_start
from hrm_ray.launch.restarts import Cause
from hrm_ray.orchestration.failures import RESUME_HINT, WorkerCrash
from hrm_ray.orchestration.run_monitor import StatusUpdate, WorkerInfo
from hrm_ray.orchestration.session_folder import started_at
from hrm_ray.rundir import RunDir

STACKS_WAIT_S = 4.0
"""How long the stacks of workers that answer may take: they are asked for with the next heartbeat."""
STACKS_LOOK_S = 0.1
KILL_WAIT_S = 20.0
"""How long a task on another node may take that ends a worker there: it starts a process."""
WRITE_WAIT_S = 5.0
"""How long writing the stacks may take: the disk that the workers wait for may be the bundle's."""


@dataclass
class HangWatch:
    """Looks at the state of one worker group, from its start. `report` gets a level and a message for the user;
    `runtime_env` is that of tasks on other nodes."""

    monitor: Any
    world_size: int
    run_dir: RunDir
    hang_after_s: float | None
    runtime_env: dict[str, Any]
    report: Callable[[str, str], None]
    _watched: Watched = field(default_factory=Watched)
    _start_s: float = 0.0
    """How long workers have been starting, without pauses of the driver itself."""
    _start_reported: bool = False

    def look(self, status: StatusUpdate) -> WorkerCrash | None:
        """Report a stall. Where the group hangs, end the processes of the ranks that the others wait for, or of all
        ranks where these are not known, and return the error. Ray Train then ends the rest of the group."""
        now_s, before_s = time.monotonic(), self._watched.looked_s
        if before_s is not None:
            self._start_s += min(now_s - before_s, UNWATCHED_S)
        self._watched, verdict = judge(self._watched, status.heartbeats, now_s, self.hang_after_s)
        start = judge_start(status.workers.keys(), self.world_size, self._start_s, reported=self._start_reported)
        if start.message:
            self._start_reported, verdict = True, start
        if verdict.kind == "end":
            return self._end(status, verdict)
        if verdict.message:
            self.report("WARNING" if verdict.kind == "warning" else "INFO", verdict.message)
        return None

    def _end(self, status: StatusUpdate, verdict: Verdict) -> WorkerCrash:
        stacks = self._stacks({beat.rank for beat in status.heartbeats if not beat.silent})
        behind = verdict.culprits
        hanging = [worker for rank, worker in status.workers.items() if rank in behind]
        hanging = hanging or list(status.workers.values())
        states = kill_workers(hanging, self.runtime_env)
        written = self._write(_report(status.heartbeats, verdict, stacks, states))
        value = "workers" if not behind else "worker " + " and ".join(map(str, behind))
        first = next((beat for beat in status.heartbeats if beat.rank in behind[:1]), None)
        does = [] if behind else ["no rank is behind the others"]
        if first is not None:
            stopped = " (it was stopped)" if states.get(first.rank) == psutil.STATUS_STOPPED else ""
            does = [f"pid {first.pid} on {first.node} {first.does}{stopped}"]
        reason = "; ".join([verdict.message, *does, written])
        return WorkerCrash(Fault(value, reason, RESUME_HINT), cause=Cause.HANG)

    def _stacks(self, answering: Collection[int]) -> Mapping[int, str]:
        """The stacks of the ranks that answer, as far as they come in time."""
        stacks: Mapping[int, str] = {}
        deadline_s = time.monotonic() + STACKS_WAIT_S
        try:
            ray.get(self.monitor.ask_stacks.remote(), timeout=STACKS_WAIT_S)
            while not stacks.keys() >= set(answering) and time.monotonic() < deadline_s:
                stacks = ray.get(self.monitor.stacks.remote(), timeout=STACKS_WAIT_S)
                threading.Event().wait(STACKS_LOOK_S)
        except ray.exceptions.RayError:
            pass  # The end of the workers matters more.
        return stacks

    def _write(self, report: str) -> str:
        """Append to the bundle's file, and return what the message says of it."""
        path, problems = self.run_dir.stacks, ["not written in time"]

        def write() -> None:
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(report)
                problems.clear()
            except OSError as error:
                problems[:] = [str(error)]

        thread = threading.Thread(target=write, name="write-stacks", daemon=True)
        thread.start()
        thread.join(WRITE_WAIT_S)
        return f"{path} could not be written ({problems[0]})" if problems else f"stacks are in {path}"


def _report(
    heartbeats: Collection[Heartbeat], verdict: Verdict, stacks: Mapping[int, str], states: Mapping[int, str]
) -> str:
    """What the file of stacks says of one hang: a part for each rank."""
    parts = [f"==== {time.strftime('%Y-%m-%d %H:%M:%S')}  {verdict.message}"]
    for beat in heartbeats:
        counted = "" if beat.collectives is None else f", {beat.collectives} collectives begun"
        parts.append(
            f"---- {beat}; step {beat.step}, {beat.idle_s + beat.age_s:.0f} s without progress{counted}"
            + (f"; its process, which was {states[beat.rank]}, is ended" if beat.rank in states else "")
        )
        parts.append(stacks.get(beat.rank, "no stacks: the process did not answer\n"))
    return "\n".join(parts) + "\n"


def kill_worker(worker: WorkerInfo) -> str:
    """End a worker's process on this node; returns what the system said of it before, such as `stopped`."""
    try:
        process = psutil.Process(worker.pid)
        if not started_at(process, worker.created_s):
            return "gone"
        status = str(process.status())
        process.kill()
        return status
    except psutil.NoSuchProcess:
        return "gone"
    except psutil.AccessDenied:
        return "another user's"


def kill_workers(workers: Collection[WorkerInfo], runtime_env: dict[str, Any]) -> dict[int, str]:
    """End the processes of workers, each by a task on its node; gives the state of each before, by rank."""
    here = ray.get_runtime_context().get_node_id()
    states = {worker.rank: kill_worker(worker) for worker in workers if worker.node_id == here}
    tasks = {}
    for worker in workers:
        if worker.node_id != here:
            there = NodeAffinitySchedulingStrategy(worker.node_id, soft=False)
            remote = ray.remote(kill_worker).options(
                num_cpus=0, max_retries=0, scheduling_strategy=there, runtime_env=runtime_env
            )
            tasks[worker.rank] = remote.remote(worker)
    deadline_s = time.monotonic() + KILL_WAIT_S
    for rank, task in tasks.items():
        try:
            states[rank] = ray.get(task, timeout=max(0.1, deadline_s - time.monotonic()))
        except ray.exceptions.RayError as error:  # the node is gone, or hangs too
            states[rank] = f"on a node that does not answer ({type(error).__name__})"
    return states
