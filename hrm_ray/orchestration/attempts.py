"""The attempts of one run on Ray, in one session: each gets room, starts its workers, and says how it ended.

`launch/supervisor` decides what follows on its end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Protocol

import ray.exceptions

from hrm_ray.errors import Fault, ResourceError, UnavailableError
from hrm_ray.launch import resources
from hrm_ray.launch.cluster_address import check_address
from hrm_ray.launch.hangs import Timeouts
from hrm_ray.launch.node_report import check_nodes, disk_shortage, measure
from hrm_ray.launch.resources import ResourceRequest, places, usable_cpus
from hrm_ray.launch.restarts import Cause, Ending
from hrm_ray.launch.supervisor import Failed, WatchedSink
from hrm_ray.orchestration.cluster_look import ask_nodes
from hrm_ray.orchestration.cluster_room import StartTurn, wait_for_room
from hrm_ray.orchestration.failures import RESUME_HINT, WorkerCrash
from hrm_ray.orchestration.session import POLL_INTERVAL_S, Session, restore_signal_handlers
from hrm_ray.train.host_memory import available_memory_bytes
from hrm_ray.train.plan import RunPlan, TextData, effective_batch, largest_divisor
from hrm_ray.types import MetricSink, RunResult, StopPoll

REPLACEMENT_WAIT_S = 10.0
"""How long a run that can continue with fewer workers waits for as many as it had. With the time that it takes to
notice a lost node it has to stay below 30 s."""


def reads_text(plan: RunPlan) -> bool:
    """Whether Ray Data tokenises text while the run trains."""
    if plan.settings.cluster.parallel_independent:
        return False
    return isinstance(plan.data, TextData) and plan.data.text.chunking_config.streaming and not plan.data.text.kept


def request_of(plan: RunPlan) -> ResourceRequest:
    """What the workers of the plan need."""
    gpus = plan.settings.cluster.gpus_per_worker if plan.device == "cuda" else 0
    return ResourceRequest(plan.world_size, plan.threads, gpus)


class Group(Protocol):
    """The workers of one attempt, as their driver sees them."""

    has_more_room: Callable[[], bool] | None
    """Whether the run could continue with more workers; asked every few seconds while it trains."""

    def run(self) -> RunResult | Failed:
        """Pass on records and stop requests until the workers have ended; return how."""


class Attempts:
    """Runs the attempts of one run in one Ray session; in a new one where a private cluster is lost."""

    def __init__(self, plan: RunPlan, stop: StopPoll, make: Callable[..., Group]) -> None:
        """`plan` is the one that the run begins with. `make` gets session, plan, sink, stop, the number of the attempt
        in this process, and the turn to take resources, which it closes once the workers have theirs."""
        self._stop, self._make = stop, make
        self._first = plan
        self._most = plan.settings.cluster.max_workers or plan.world_size
        self._elastic = self._most > (plan.settings.cluster.min_workers or plan.world_size)
        self._wanted = plan.world_size
        self._session: Session | None = None
        self.opened = False
        """Whether a session was opened."""
        self._count = 0

    def run(self, plan: RunPlan, records: WatchedSink) -> RunResult | Failed:
        """One attempt, from its actors to their end."""
        request = request_of(plan)
        self._wanted = plan.world_size
        session = self._session
        if session is not None and session.lost():
            self.close(keep_logs=False)
            session = None
        if session is None:
            try:
                session = self._open(plan, request)
            except UnavailableError:
                if not self._count or plan.ray_address is not None:
                    raise
                self.close(keep_logs=False)
                session = self._open(plan, request)  # A machine that has just lost a cluster may be overloaded.
        try:
            return self._attempt(session, plan, records)
        except ray.exceptions.RayError as error:
            # Ray was asked for something while the cluster went.
            fault = Fault(session.where, f"Ray does not answer any more ({type(error).__name__})", RESUME_HINT)
            if not session.private:
                raise UnavailableError(fault) from error
            self.close(keep_logs=False)
            lost, rows = WorkerCrash(fault, cause=Cause.CLUSTER_LOST), plan.settings.optimizer.batch_size
            return Failed(Ending(lost.cause, lost, records.step, plan.attempt, plan.world_size, rows))

    def _attempt(self, session: Session, plan: RunPlan, records: WatchedSink) -> RunResult | Failed:
        request = request_of(plan)
        try:
            turn = self._turn(session, request, plan, records)
        except ResourceError as busy:
            if not self._count:
                raise
            # A replacement of what was lost may come, or the run may continue with fewer workers.
            rows = plan.settings.optimizer.batch_size
            missing = busy.faults[0]
            hint = "Continue with --resume when there is room again, or with fewer workers as --world-size"
            busy = type(busy)(Fault(missing.value, missing.reason, hint))
            return Failed(Ending(Cause.NO_ROOM, busy, records.step, plan.attempt, plan.world_size, rows), begun=False)
        self._count += 1
        with closing(turn):
            group = self._make(session, plan, records, self._stop, self._count, turn)
            if plan.world_size < self._most and not session.private:
                group.has_more_room = partial(self._has_more_room, session, plan)
            outcome = group.run()
        if isinstance(outcome, Failed) and session.private and outcome.ending.cause is Cause.NO_ROOM:
            self.close(keep_logs=False)  # Nobody else is there: processes of an earlier attempt are in the way.
        elif isinstance(outcome, Failed) and session.lost():
            # Whatever was noticed first follows from it.
            error = WorkerCrash(
                Fault("the local Ray cluster", "one of its processes was ended from outside", RESUME_HINT),
                cause=Cause.CLUSTER_LOST,
            )
            return replace(outcome, ending=replace(outcome.ending, cause=error.cause, error=error))
        return outcome

    def room(self, plan: RunPlan) -> int:
        """How many workers there is room for after an attempt with this plan has ended; waits for a while for a
        replacement of what was lost."""
        session = self._session
        if session is None or session.private or session.lost():
            return self._first.world_size  # This machine has what the run began with.
        deadline_s = time.monotonic() + REPLACEMENT_WAIT_S
        while True:
            found = places(request_of(plan), session.free_nodes())
            if found >= self._wanted or time.monotonic() > deadline_s or self._stop() is not None:
                return found
            threading.Event().wait(POLL_INTERVAL_S)

    def _has_more_room(self, session: Session, plan: RunPlan) -> bool:
        """Whether the run could continue with more workers than it has now."""
        try:
            free = places(request_of(plan), session.free_nodes())
        except ray.exceptions.RayError:
            return False  # The next look may be answered.
        wanted = largest_divisor(effective_batch(plan), min(plan.world_size + free, self._most))
        if wanted > plan.world_size:
            self._wanted = wanted
        return wanted > plan.world_size

    def _open(self, plan: RunPlan, request: ResourceRequest) -> Session:
        timeouts = Timeouts.of(plan.settings.cluster.hang_after_s)
        session = Session(plan.ray_address, request, data=reads_text(plan), timeouts=timeouts)
        self._session = session
        if session.private:
            cpus = request.cpus if plan.settings.cluster.parallel_independent else usable_cpus()
            resources.check_machine(request, cpus, available_memory_bytes())
        elif plan.ray_address is not None and not session.attached:
            check_address(plan.ray_address)
        session.open(self._stop)
        self.opened = True
        restore_signal_handlers()
        return session

    def _turn(self, session: Session, request: ResourceRequest, plan: RunPlan, sink: MetricSink) -> StartTurn:
        """Return when there is room for the workers, with the turn to take it. Raises HrmRayError where there is not,
        or where nodes lack memory, disk or libraries, and StopRequested."""
        if session.private:
            if request.gpus:
                import torch

                resources.check_local_gpus(request, torch.cuda.device_count())
            return StartTurn()
        # A run that can continue with fewer workers does that, rather than wait for those that it has lost.
        wait_s = None if self._count and self._elastic else plan.settings.cluster.wait_s
        turn = wait_for_room(session, request, wait_s=wait_s, sink=sink, stop=self._stop)
        try:
            if not self._count:
                _check_nodes(session, request, plan)
        except BaseException:
            turn.close()
            raise
        return turn

    def close(self, keep_logs: bool) -> None:
        """Close the session, if there is one."""
        session, self._session = self._session, None
        if session is not None:
            session.close(keep_logs and session.private)


def _check_nodes(session: Session, request: ResourceRequest, plan: RunPlan) -> None:
    from hrm_ray.launch.preflight import need_of  # It loads torch.

    strategy = plan.settings.cluster.strategy_for(request.world_size)
    need = need_of(plan.settings, plan.config, request, strategy, plan.device, plan.bundle)
    if plan.settings.cluster.parallel_independent:
        # Only this machine needs the bundle's disk: trainers elsewhere send what they save.
        error = disk_shortage(need, measure(str(plan.bundle), []), "disk of this machine")
        if error is not None:
            raise error
        need = replace(need, disk_bytes=0)
    check_nodes(need, ask_nodes(plan.bundle, list(need.versions)), session.where)
