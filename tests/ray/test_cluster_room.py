"""Waiting for room on a cluster: the decisions, with a cluster that is numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from hrm_ray.errors import ResourceError
from hrm_ray.launch.resources import ResourceRequest
from hrm_ray.orchestration import cluster_room
from hrm_ray.orchestration.cluster_room import StartTurn, wait_for_room
from hrm_ray.types import Record, StopReason, StopRequested

TWO_CPUS = ResourceRequest(2, 1, 0)


class Cluster:
    """A cluster that changes with time: `at` gives, for a second, its CPUs, those that are free, and who starts."""

    where = "10.0.0.1:6379"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: Callable[[float], tuple[float, float, bool]]) -> None:
        self.now_s, self.at, self.records = 0.0, at, list[Record]()
        self.turns: list[str] = []
        monkeypatch.setattr(cluster_room.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(cluster_room.threading, "Event", lambda: SimpleNamespace(wait=self.pass_time))
        monkeypatch.setattr(cluster_room.ray, "available_resources", lambda: {"CPU": at(self.now_s)[1]})
        monkeypatch.setattr(cluster_room.ray, "cluster_resources", lambda: {"CPU": at(self.now_s)[0]})
        monkeypatch.setattr(StartTurn, "try_take", lambda turn: self.take())
        monkeypatch.setattr(StartTurn, "close", lambda turn: self.turns.append("closed"))

    def take(self) -> bool:
        if not self.at(self.now_s)[2]:
            self.turns.append("taken")
        return not self.at(self.now_s)[2]

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    def nodes(self) -> list[Mapping[str, float]]:
        return [{"CPU": self.at(self.now_s)[0]}]

    def wait(self, wait_s: float | None, stop: Callable[[], StopReason | None] = lambda: None) -> StartTurn:
        sink: Any = SimpleNamespace(write=self.records.append)
        session: Any = self
        return wait_for_room(session, TWO_CPUS, wait_s=wait_s, sink=sink, stop=stop)

    @property
    def said(self) -> Iterator[str]:
        return (str(record.values["message"]) for record in self.records)


def test_a_free_cluster_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, lambda now_s: (2.0, 2.0, False))
    cluster.wait(None)
    assert cluster.now_s == 0.0 and cluster.records == [] and cluster.turns == ["taken"]


@pytest.mark.parametrize(
    ("at", "wait_s", "ends_s"),
    [
        (lambda now_s: (1.0, 1.0, False), None, 0.0),
        (lambda now_s: (1.0, 1.0, False), 600, 600.0),
        (lambda now_s: (2.0, 1.0, False), None, 10.0),
        (lambda now_s: (2.0, 1.0, False), 90, 90.0),
        (lambda now_s: (2.0, 2.0, True), None, 60.0),
        (lambda now_s: (2.0, 2.0, True), 5, 5.0),
    ],
    ids=["small", "small, waits", "busy", "busy, waits", "another starts", "another starts, waits"],
)
def test_a_cluster_without_room_is_refused_after_that_time(
    at: Callable[[float], tuple[float, float, bool]],
    wait_s: float | None,
    ends_s: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(monkeypatch, at)
    with pytest.raises(ResourceError) as caught:
        cluster.wait(wait_s)
    assert cluster.now_s == ends_s and "--wait-for-resources 10m" in str(caught.value) and len(str(caught.value)) < 300
    assert len(cluster.records) == -(-ends_s // 30), "it says what it waits for every 30 s"
    assert cluster.turns.count("closed") >= cluster.turns.count("taken")


def test_nodes_that_come_and_runs_that_end_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, lambda now_s: (1.0 if now_s < 20 else 2.0, 1.0 if now_s < 40 else 2.0, now_s < 45))
    cluster.wait(600)
    assert cluster.now_s == 45.0 and cluster.turns[-1] == "taken"
    small, busy = cluster.said
    assert "has room for 1" in small and "waiting 600 s more at most" in small
    assert "busy: 1 of 2 CPUs free" in busy


def test_a_stop_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, lambda now_s: (2.0, 1.0, False))
    with pytest.raises(StopRequested):
        cluster.wait(600, lambda: StopReason.SIGTERM if cluster.now_s >= 3 else None)
    assert cluster.now_s == 3.0 and "taken" not in cluster.turns, "a turn costs a process"


def test_what_another_run_has_taken_before_the_turn_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, lambda now_s: (2.0, 2.0 if "taken" not in cluster.turns else 0.0, False))
    with pytest.raises(ResourceError, match="busy: 0 of 2 CPUs free"):
        cluster.wait(None)
    assert cluster.turns[:2] == ["taken", "closed"]
