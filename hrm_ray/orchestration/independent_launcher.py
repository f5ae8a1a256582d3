"""The launcher of independent trainers on Ray: the driver starts the coordinator's actor, passes on records and stop
requests, and starts it again where it is lost."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hrm_ray.errors import DiskError, Fault, HrmRayError, UnavailableError
from hrm_ray.independent.wire import unpacked
from hrm_ray.launch.hangs import Timeouts
from hrm_ray.launch.restarts import WAITING, Cause, Ending
from hrm_ray.launch.supervisor import Failed, WatchedSink, supervise
from hrm_ray.orchestration.attempts import Attempts
from hrm_ray.orchestration.cluster_room import StartTurn
from hrm_ray.orchestration.failures import RESUME_HINT, WorkerCrash, actor_lost, cause_of, death_reason
from hrm_ray.orchestration.hang_watch import kill_worker, kill_workers
from hrm_ray.orchestration.independent_actors import ActorTask
from hrm_ray.orchestration.independent_coordinator import CoordinatorActor, CoordinatorStatus, Ended
from hrm_ray.orchestration.run_monitor import WorkerInfo
from hrm_ray.orchestration.session import POLL_INTERVAL_S, Session, worker_environment
from hrm_ray.rundir import DRIVER_MARKER
from hrm_ray.train.plan import RunPlan
from hrm_ray.types import MetricSink, RestartRecord, RunResult, StopPoll, StopReason, StopRequested

COORDINATOR = "the coordinator of the trainers"
_CALLS_OF_A_TRAINER = 3
"""At most: its own, that of the thread that renews leases, and that of the thread that reads ahead."""
_OTHER_CALLS = 4
"""Of the driver, and the run itself."""


def run(plan: RunPlan, *, sink: MetricSink, stop: StopPoll) -> RunResult:
    """Train with independent trainers that are Ray actors. Raises as launch.independent_run.run, and what a Ray session
    raises before anything has started."""
    restarts: list[RestartRecord] = []
    attempts = Attempts(plan, stop, CoordinatorRun)
    keep_logs = False
    try:
        result = supervise(plan, attempts.run, sink=_Restarts(sink, restarts), stop=stop)
        return replace(result, restarts=tuple(restarts))
    except (WorkerCrash, UnavailableError) as error:
        keep_logs = isinstance(error, WorkerCrash) or not attempts.opened
        raise
    finally:
        attempts.close(keep_logs)


class _Restarts:
    """A MetricSink that passes records on, and keeps the restarts of trainers and coordinators that they tell of."""

    def __init__(self, sink: MetricSink, restarts: list[RestartRecord]) -> None:
        self._sink, self._restarts = sink, restarts

    def write(self, record: Any) -> None:
        restart = RestartRecord.of(record)
        if restart is not None:
            self._restarts.append(replace(restart, number=len(self._restarts) + 1))
        self._sink.write(record)

    def close(self) -> None:
        """The sink belongs to the caller."""


class CoordinatorRun:
    """One attempt, from the start of the coordinator's actor to its end."""

    def __init__(
        self, session: Session, plan: RunPlan, sink: WatchedSink, stop: StopPoll, number: int, turn: StartTurn
    ) -> None:
        """`turn` is closed once the trainers have their resources."""
        self._session, self._plan, self._sink, self._stop, self._turn = session, plan, sink, stop, turn
        self._marker = plan.bundle / f"{DRIVER_MARKER}{secrets.token_hex(8)}"
        self._timeouts = Timeouts.of(plan.settings.cluster.hang_after_s)
        self._status = CoordinatorStatus((), False, ())
        self._asked: Any = None
        self._asked_s = 0.0
        self._stop_sent = False
        self._actor: Any = None
        self._here: WorkerInfo | None = None
        self.has_more_room: Callable[[], bool] | None = None

    def run(self) -> RunResult | Failed:
        """Pass on records and stop requests until the run has ended; return how. Nothing of the attempt lives on then.

        Raises the error that the run ended with, and StopRequested.
        """
        token = secrets.token_hex(16)
        try:
            try:
                self._marker.write_text(token, encoding="utf-8")
            except OSError as error:
                hint = "Check its free space and permissions"
                raise DiskError(Fault(str(self._plan.bundle), f"cannot be written ({error})", hint)) from error
            task = ActorTask(self._plan.to_plain(), str(self._marker), token)
            ended = self._follow(task)
        except (WorkerCrash, DiskError) as error:
            return self._failed(error)
        finally:
            self._end_actors()
            with suppress(OSError):
                self._marker.unlink(missing_ok=True)
        if ended.stopped is not None:
            raise StopRequested(ended.stopped)
        if ended.error is not None:
            told = unpacked(ended.error)
            if cause_of(told) in WAITING:
                return self._failed(told)
            raise told  # it would come again, or all trainers had their restarts
        if ended.result is None:
            raise RuntimeError("the coordinator ended without a result")
        return ended.result

    def _failed(self, error: HrmRayError) -> Failed:
        step, rows = self._sink.step, self._plan.settings.optimizer.batch_size
        ending = Ending(cause_of(error), error, step, self._plan.attempt, self._plan.world_size, rows)
        return Failed(ending, self._status.begun)

    def _follow(self, task: ActorTask) -> Ended:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        calls = _CALLS_OF_A_TRAINER * self._plan.world_size + _OTHER_CALLS
        actor = ray.remote(CoordinatorActor).options(
            num_cpus=0,
            scheduling_strategy=here,
            max_concurrency=calls,
            max_restarts=0,
            runtime_env=task.environment(1),
        )
        self._actor = actor.remote(task)
        running = self._actor.run.remote()
        pid = self._actor.worker_info.remote()
        while True:
            done, _ = ray.wait([running], timeout=POLL_INTERVAL_S)
            if self._session.lost():
                raise WorkerCrash(Fault("the Ray cluster", "is lost", RESUME_HINT), cause=Cause.CLUSTER_LOST)
            if done:
                break
            if self._here is None and ray.wait([pid], timeout=0)[0]:
                self._here = self._get(pid)
            self._update()
        ended: Ended = self._get(running)
        # A call that is on its way has the records before those of the last one.
        for asked in (self._asked, self._actor.take_status.remote()):
            if asked is not None:
                self._receive(asked, wait_s=self._timeouts.monitor_s)
        return ended

    def _update(self) -> None:
        """Send a stop request if there is one, and take the records that have come."""
        reason: StopReason | None = None if self._stop_sent else self._stop()
        if reason is not None:
            self._stop_sent = True
            self._actor.ask_stop.remote(reason)
        if self._asked is None:
            self._asked, self._asked_s = self._actor.take_status.remote(), time.monotonic()
        if ray.wait([self._asked], timeout=0)[0]:
            asked, self._asked = self._asked, None
            self._receive(asked)
        elif time.monotonic() - self._asked_s > self._timeouts.monitor_s:
            raise actor_lost(COORDINATOR, "", self._timeouts.monitor_s)

    def _receive(self, asked: Any, wait_s: float = 0.0) -> None:
        if not ray.wait([asked], timeout=wait_s)[0]:
            return
        self._status = self._get(asked)
        if sum(worker.rank >= 0 for worker in self._status.workers) >= self._plan.world_size:
            self._turn.close()
        for record in self._status.records:
            self._sink.write(record)

    def _get(self, asked: Any) -> Any:
        """An answer that is there. Raises WorkerCrash where the actor is lost."""
        try:
            return ray.get(asked)
        except ray.exceptions.RayError as error:
            raise actor_lost(COORDINATOR, death_reason(str(error))) from error

    def _end_actors(self) -> None:
        """End what is left, so that nothing writes into the bundle any more."""
        if self._actor is None:
            return
        left = [each for each in (self._here, *self._status.workers) if each is not None]
        if self._session.lost():
            # They end with the cluster, which answers no call; what writes into the bundle is ended now.
            for worker in left:
                kill_worker(worker)
            return
        with suppress(ray.exceptions.RayError):
            ray.kill(self._actor)
        with suppress(ray.exceptions.RayError):
            kill_workers(left, {"env_vars": {"PYTHONPATH": worker_environment(1)["PYTHONPATH"]}})
