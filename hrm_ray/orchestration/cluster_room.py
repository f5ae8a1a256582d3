"""Waits until a running cluster has room for a run.

Runs that start on one cluster at once take turns, so that what one has seen free is not taken by another. A turn is a
named actor: of two runs one gets the name. It ends with its driver, whatever happens to that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from hrm_ray.errors import Fault, ResourceError
from hrm_ray.launch.resources import ResourceRequest, check_cluster, check_free
from hrm_ray.orchestration.session import NAMESPACE, Session
from hrm_ray.types import MetricSink, Record, StopPoll, StopRequested

FREE_WAIT_S = 10.0
"""A run that has just ended may hold its resources a little longer."""
TURN_WAIT_S = 60.0
"""The workers of another run start within that time, or never."""
LOOK_EVERY_S = 0.5
REPORT_EVERY_S = 30.0
"""Seconds between two records of what is waited for."""

NAME = "hrm_ray-starts"
RESERVE_WAIT_S = 10.0
"""How long free CPUs may take to be reserved."""


class _Holder:
    """The actor; that it lives is all it does."""


class StartTurn:
    """The turn of this run to take resources of the cluster."""

    def __init__(self) -> None:
        self._holder: Any = None

    def try_take(self) -> bool:
        """Whether the turn is this run's; False while another run starts."""
        if self._holder is None:
            options = {"name": NAME, "namespace": NAMESPACE, "num_cpus": 0}
            try:
                self._holder = ray.remote(_Holder).options(**options).remote()
            except ValueError:  # The name is taken.
                return False
        return True

    def close(self) -> None:
        """Let the next run start; a second call does nothing."""
        holder, self._holder = self._holder, None
        if holder is not None:
            with suppress(Exception):  # The cluster may be gone, and the turn with it.
                ray.kill(holder)


def reserve_cpus(nodes: Sequence[Mapping[str, float]]) -> PlacementGroup | None:
    """A CPU of each of the nodes (free resources; a node may be named more than once) that no other run gets; None
    where they are not free after all."""
    group = placement_group([{"CPU": 1.0, **_place(node)} for node in nodes])
    if group.wait(RESERVE_WAIT_S):
        return group
    remove_placement_group(group)
    return None


def _place(node: Mapping[str, float]) -> dict[str, float]:
    """A share of the resource that only this node has."""
    return {name: 0.001 for name in node if name.startswith("node:") and name != "node:__internal_head__"}


def wait_for_room(
    session: Session, request: ResourceRequest, *, wait_s: float | None, sink: MetricSink, stop: StopPoll
) -> StartTurn:
    """Return when the running cluster has room for the workers, with the turn to take it; close that once they have
    it.

    Waits `wait_s`; without it not at all for a cluster that is too small, and FREE_WAIT_S for one in use. Raises
    ResourceError, and StopRequested where `stop` says so meanwhile.
    """
    turn, begin_s, reported_s = StartTurn(), time.monotonic(), float("-inf")
    try:
        while True:
            short = _shortage(session, request, turn)
            if short is None:
                return turn
            error, longest_s = short
            longest_s = longest_s if wait_s is None else wait_s
            waited_s = time.monotonic() - begin_s
            if waited_s >= longest_s:
                raise error
            stopped = stop()
            if stopped is not None:
                raise StopRequested(stopped)
            # What passes at once is not reported: a run that has just ended, or started.
            if waited_s > 0.0 and time.monotonic() - reported_s >= REPORT_EVERY_S:
                reported_s = time.monotonic()
                message = f"{error.faults[0].reason}; waiting {longest_s - waited_s:.0f} s more at most"
                sink.write(Record("event", 0, time.time(), {"message": message, "level": "WARNING"}))
            # While this run waits for another to end, a third that needs less may start.
            turn.close()
            threading.Event().wait(LOOK_EVERY_S)
    except BaseException:
        turn.close()
        raise


def _shortage(session: Session, request: ResourceRequest, turn: StartTurn) -> tuple[ResourceError, float] | None:
    """Why the run cannot start now, and how long it waits for that by default; with None it has the turn."""
    try:
        check_cluster(request, session.nodes(), session.where)
    except ResourceError as error:
        return error, 0.0
    try:
        # Once without the turn, which costs a process, and again with it.
        _check_free(session, request)
        if not turn.try_take():
            hint = "Give --wait-for-resources 10m, or start this run when that one trains"
            reason = f"another run is just starting on the cluster at {session.where}"
            return ResourceError(Fault(f"--world-size {request.world_size}", reason, hint)), TURN_WAIT_S
        _check_free(session, request)
    except ResourceError as error:
        return error, FREE_WAIT_S
    return None


def _check_free(session: Session, request: ResourceRequest) -> None:
    check_free(request, ray.available_resources(), ray.cluster_resources(), session.where)
