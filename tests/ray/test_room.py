"""Room for workers on a cluster as Ray describes it; Ray is not started."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hrm_ray.errors import Fault, NoRoomError
from hrm_ray.launch.resources import ResourceRequest
from hrm_ray.launch.restarts import Cause
from hrm_ray.launch.supervisor import Failed, WatchedSink
from hrm_ray.metrics.fanout import FanOut
from hrm_ray.orchestration import attempts as attempts_module
from hrm_ray.orchestration import session as sessions
from hrm_ray.orchestration.attempts import Attempts
from hrm_ray.orchestration.session import Session
from hrm_ray.orchestration.worker_group import WorkerGroupRun
from hrm_ray.types import StopReason
from tests.ray.test_worker_group import never
from tests.support.ray_bodies import plan_of

ONE_CPU = ResourceRequest(1, 1, 0)


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session("198.51.100.1:6379", ONE_CPU)
    yield made
    made.close()


def test_a_node_that_does_not_answer_has_no_room(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray goes on to list a node that is gone, and what was free there."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as gone:
        ports = [each.getsockname()[1] for each in (server, gone, server)]
        gone.close()
        alive = [True, True, False]
        listed = [
            {"NodeID": str(number), "Alive": lives, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
            for number, (lives, port) in enumerate(zip(alive, ports, strict=True))
        ]
        monkeypatch.setattr(sessions.ray, "nodes", lambda: listed)
        free = {str(number): {"CPU": 2.0 + number} for number in range(3)}
        monkeypatch.setattr(sessions, "available_resources_per_node", lambda: free)
        assert session.free_nodes() == [{"CPU": 2.0}]


class Freeing:
    """A session on a cluster whose free CPUs, a node each, are scripted: one number a look, then the last again."""

    private = False

    def __init__(self, *cpus: int) -> None:
        self.cpus = list(cpus)
        self.looks = 0

    def lost(self) -> bool:
        return False

    def free_nodes(self) -> list[Mapping[str, float]]:
        self.looks += 1
        return [{"CPU": 1.0}] * (self.cpus.pop(0) if len(self.cpus) > 1 else self.cpus[0])


def attempts_on(session: Any, bundle: Path, stop: StopReason | None = None) -> Attempts:
    attempts = Attempts(plan_of(bundle, world_size=4), (lambda: stop) if stop else never, partial(WorkerGroupRun, None))
    attempts._session = session
    return attempts


def test_a_lost_worker_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts_module, "POLL_INTERVAL_S", 0.0)
    session = Freeing(2, 3, 3, 4)
    assert attempts_on(session, tmp_path).room(plan_of(tmp_path, world_size=4)) == 4
    assert session.looks == 4


def test_without_a_replacement_the_others_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts_module, "REPLACEMENT_WAIT_S", -1.0)
    assert attempts_on(Freeing(2), tmp_path).room(plan_of(tmp_path, world_size=4)) == 2


def test_a_stop_is_not_kept_waiting_for_a_replacement(tmp_path: Path) -> None:
    session = Freeing(2)
    attempts_on(session, tmp_path, StopReason.SIGTERM).room(plan_of(tmp_path, world_size=4))
    assert session.looks == 1


def test_a_restart_without_room_says_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(*arguments: Any, **options: Any) -> None:
        raise NoRoomError(Fault("--world-size 4", "the cluster has room for 3", "Start again"))

    session: Any = Freeing(3)
    attempts = attempts_on(session, tmp_path)
    monkeypatch.setattr(attempts, "_count", 1)
    monkeypatch.setattr(attempts, "_turn", turn)
    failed = attempts.run(plan_of(tmp_path, world_size=4), WatchedSink(FanOut([])))
    assert isinstance(failed, Failed) and not failed.begun and failed.ending.cause is Cause.NO_ROOM
    assert type(failed.ending.error) is NoRoomError and "--resume" in str(failed.ending.error)
