"""What the driver of independent trainers takes from their coordinator, with a Ray that is scripted: no cluster."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hrm_ray.errors import DataError, DiskError, Fault, HrmRayError
from hrm_ray.independent.wire import packed
from hrm_ray.launch.restarts import Cause
from hrm_ray.launch.supervisor import Failed, WatchedSink
from hrm_ray.orchestration import independent_coordinator, independent_launcher
from hrm_ray.orchestration.independent_coordinator import ActorTrainer, CoordinatorStatus, Ended, _Silence
from hrm_ray.orchestration.independent_launcher import CoordinatorRun
from hrm_ray.types import Record, RunResult, StopReason
from tests.support.ray_bodies import plan_of


@dataclass
class Asked:
    """A call: its answer is there at the second look."""

    answer: Any
    looks: int = 0
    after: int = 1

    def ready(self) -> bool:
        self.looks += 1
        return self.looks > self.after


@dataclass
class Coordinator:
    """A coordinator that writes a record in every look at its run, and ends after eight."""

    ended: Ended
    records: list[Record] = field(default_factory=list)
    written: int = 0

    def take(self) -> CoordinatorStatus:
        taken, self.records = tuple(self.records), []
        return CoordinatorStatus(taken, True, ())

    def write(self) -> bool:
        self.written += 1
        self.records.append(Record("train", self.written, 0.0, {}))
        return self.written >= 8


class Running(Asked):
    coordinator: Coordinator

    def ready(self) -> bool:
        return self.coordinator.write()


def scripted(monkeypatch: pytest.MonkeyPatch, coordinator: Coordinator, module: Any) -> None:
    """Put a Ray in place whose one actor is the coordinator."""

    def calls(answer: Any) -> Any:
        return SimpleNamespace(remote=lambda *given: Asked(answer() if callable(answer) else answer))

    running = Running(coordinator.ended)
    running.coordinator = coordinator
    actor = SimpleNamespace(
        take_status=calls(coordinator.take),
        worker_info=calls(None),
        ask_stop=calls(None),
        run=SimpleNamespace(remote=lambda: running),
    )

    def wait(asked: list[Asked], timeout: float | None = None) -> tuple[list[Asked], list[Asked]]:
        ready = [each for each in asked if each.ready()]
        if not ready and timeout and timeout > 1:
            ready = asked
        return ready, []

    fake = SimpleNamespace(
        exceptions=module.ray.exceptions,
        remote=lambda kind: SimpleNamespace(options=lambda **said: SimpleNamespace(remote=lambda task: actor)),
        wait=wait,
        get=lambda asked: asked.answer,
        kill=lambda actor: None,
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "n"),
    )
    monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(module, "NodeAffinitySchedulingStrategy", lambda *said, **more: None)
    monkeypatch.setattr(module, "kill_workers", lambda workers, environment: {}, raising=False)


class Kept:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, record: Record) -> None:
        self.steps.append(record.step)

    def close(self) -> None:
        pass


def attempt(folder: Path, kept: Kept) -> CoordinatorRun:
    session: Any = SimpleNamespace(lost=lambda: False, private=True)
    turn: Any = SimpleNamespace(close=lambda: None)
    folder.mkdir()
    return CoordinatorRun(session, plan_of(folder, world_size=2), WatchedSink(kept), lambda: None, 1, turn)


def test_every_record_reaches_the_display_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    result = RunResult(StopReason.FINISHED, 8, 1, "b")
    scripted(monkeypatch, Coordinator(Ended(result)), independent_launcher)
    assert attempt(tmp_path / "b", kept).run() == result
    assert kept.steps == list(range(1, 9))


def error_of(kind: type[HrmRayError]) -> Ended:
    return Ended(error=packed(kind(Fault("a folder", "cannot be written", "Free some space"))))


def test_a_full_disk_is_waited_for_and_wrong_data_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, Coordinator(error_of(DiskError)), independent_launcher)
    failed = attempt(tmp_path / "b", Kept()).run()
    assert isinstance(failed, Failed) and failed.ending.cause is Cause.DISK and failed.begun
    scripted(monkeypatch, Coordinator(error_of(DataError)), independent_launcher)
    with pytest.raises(DataError, match="cannot be written"):
        attempt(tmp_path / "c", Kept()).run()


def test_a_keeper_that_is_stopped_is_found_by_its_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, Coordinator(Ended()), independent_coordinator)
    now_s = [0.0]
    monkeypatch.setattr(independent_coordinator, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    answers = [0, 0, 10**9]  # the third call is never answered
    keeper = SimpleNamespace(ping=SimpleNamespace(remote=lambda: Asked(None, after=answers.pop(0))))
    silence = _Silence(keeper, Asked(None, after=0))
    found = []
    for now in range(0, 70, 2):
        now_s[0] = float(now)
        found.append(silence.too_long())
    assert found.index(True) * 2 == 4 + independent_coordinator.SILENT_S
    starting = _Silence(
        SimpleNamespace(ping=SimpleNamespace(remote=lambda: Asked(None, after=10**9))), Asked(None, after=10**9)
    )
    now_s[0] += 300.0
    assert not starting.too_long(), "it imports its libraries"


def test_an_actor_without_room_has_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, Coordinator(Ended()), independent_coordinator)
    never = SimpleNamespace(remote=lambda: Asked(None, after=10**9))
    handle = ActorTrainer("trainer-0", 0, SimpleNamespace(worker_info=never, load=never))
    assert not handle.placed and handle.info is None and handle.code is None


def test_an_actor_whose_libraries_hang_has_its_process() -> None:
    """Ray imports the class's file before the actor answers: nothing in it may take long, so that what follows is
    watched as the start of a trainer is."""
    words = "import sys, hrm_ray.orchestration.independent_actors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0
