"""What the command decides about trainers' processes that fail, with a ledger and without processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from hrm_ray.bundle.folder_watch import FolderWatch
from hrm_ray.errors import DivergedError, Fault, NoRoomError
from hrm_ray.independent.calls import AnchorRef, Claimed, Joined, Report, Reported
from hrm_ray.independent.coordinator import LedgerCoordinator, Merged, Rules
from hrm_ray.independent.processes import ChildProcess
from hrm_ray.launch.independent_run import IndependentRun
from hrm_ray.ledger import BlockLength, Lease, Refused, Span, open_ledger
from hrm_ray.rundir import RunDir
from hrm_ray.types import Record, StopReason
from tests.support.block_trainers import plan_of
from tests.support.runs import TEXT, text_file


class Started:
    """Processes that are only listed."""

    def __init__(self) -> None:
        self.trainers: dict[str, ChildProcess] = {}
        self.again: list[str] = []

    def start_trainer(self, name: str, number: int) -> None:
        self.again.append(name)

    def serve(self, coordinator: LedgerCoordinator) -> None:
        pass

    def take_ended(self) -> list[ChildProcess]:
        return []

    def end(self, child: ChildProcess) -> None:
        del self.trainers[child.name]


class TooLate(Exception):
    """A report was refused."""


class Shell:
    """A run of two trainers, up to the point where their processes are looked after."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        plan = plan_of(text_file(folder), folder / "b", *TEXT, "--epochs", 1)
        self.events: list[Record] = []
        ledger = opened.enter_context(closing(open_ledger(RunDir(plan.bundle).ledger, durable=False)))
        ledger.add_blocks([BlockLength(0, 9)])
        ledger.end_data()
        watch = opened.enter_context(closing(FolderWatch(plan.bundle)))
        self.children = Started()
        self.run = IndependentRun(plan, self, lambda: None, watch, ledger, self.children, opened)  # type: ignore[arg-type]
        rules = Rules(1, 1, merge_every="end", epochs=1)
        start = AnchorRef(0, "a", "a", 0)
        self.coordinator = LedgerCoordinator(ledger, start, rules, lambda epoch, place: place % 9, lambda: 0.0)
        self.run._lead(self.coordinator)
        for number in range(2):
            name = f"trainer-{number}"
            process = subprocess.Popen([sys.executable, "-S", "-c", ""])
            process.wait()
            self.children.trainers[name] = ChildProcess(name, number, process, 0.0)

    def write(self, record: Record) -> None:
        self.events.append(record)

    def close(self) -> None:
        pass

    def report(self, name: str, number: int, base: AnchorRef | None = None) -> str:
        """A trainer joins, if it has not, and reports a sample; returns the report's name."""
        state = self.coordinator.trainers.get(name)
        if state is None:
            joined = self.coordinator.join(name)
            assert isinstance(joined, Joined)
        generation = self.coordinator.trainers[name].generation
        claimed = self.coordinator.claim(name, generation, f"{name}{number}", "a")
        assert isinstance(claimed, Claimed)
        lease = self.coordinator.measure(claimed.lease, 1) if claimed.lease.end is None else claimed.lease
        assert isinstance(lease, Lease)
        said = f"{name}-{generation}-{number}"
        span = Span(lease.epoch, lease.chunk, lease.start, lease.start + 1, False)
        path = f"independent/contributions/{said}.0.safetensors"
        base = base or self.coordinator.anchor
        report = Report(said, name, generation, base, path, "x", (lease,), (span,), 1, 1, 1.0, 1.0)
        answer = self.coordinator.report(report)
        if isinstance(answer, Refused):
            raise TooLate(answer.reason)
        assert isinstance(answer, Reported)
        return said

    def fails(self, name: str, error: DivergedError | None) -> None:
        child = self.children.trainers.pop(name)
        child.failure = error
        self.run.trainers._take_end(child)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with ExitStack() as opened:
        yield Shell(tmp_path, opened)


def test_a_round_at_the_end_waits_for_a_trainer_that_is_started_again(shell: Shell) -> None:
    shell.report("trainer-0", 1)
    shell.coordinator.lost("trainer-0", "it was killed")
    assert shell.coordinator.due() is None
    shell.coordinator.stop = StopReason.SIGTERM
    assert shell.coordinator.due() is not None


def test_one_trainer_that_diverges_ends_and_the_run_goes_on(shell: Shell) -> None:
    kept = shell.report("trainer-0", 1)
    folder = shell.run.run_dir.independent.contributions
    folder.mkdir(parents=True)
    for name in (kept, "trainer-0-1-2", "trainer-1-1-1"):
        (folder / f"{name}.0.safetensors").write_text("")
    shell.fails("trainer-0", DivergedError(Fault("loss", "is nan", "")))
    assert shell.coordinator.stop is None and shell.run.trainers.fatal is None and shell.children.again == []
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == {kept, "trainer-1-1-1"}
    shell.fails("trainer-1", None)
    assert shell.children.again == ["trainer-1"]


def test_the_run_fails_with_the_error_of_the_first_when_no_trainer_is_left(shell: Shell) -> None:
    for name in ("trainer-0", "trainer-1"):
        shell.fails(name, DivergedError(Fault(name, "has a loss of nan", "")))
    shell.run._train()
    assert str(shell.run.trainers.fatal).startswith("trainer-0")


def test_a_trainer_that_is_rejected_again_and_again_is_ended(shell: Shell) -> None:
    for number in range(1, 4):
        assert set(shell.children.trainers) == {"trainer-0", "trainer-1"}
        said = shell.report("trainer-0", number)
        good = shell.report("trainer-1", number)
        shell.coordinator.stop = None
        shell.coordinator.rules = Rules(1, 1, merge_every=1, epochs=1)
        request = shell.coordinator.due()
        assert request is not None
        merged = Merged((good,), {said: "its change is not finite"}, {}, f"r{number}", f"r{number}", {}, 0.1)
        shell.coordinator._origins.add("a")
        shell.coordinator.commit(request, merged)
        shell.run.trainers._end_rejected(merged)
    assert set(shell.children.trainers) == {"trainer-1"} == set(shell.coordinator.trainers)
    assert isinstance(shell.run.trainers.failure, DivergedError)


def test_a_report_from_an_anchor_of_many_rounds_ago_is_refused(shell: Shell) -> None:
    coordinator = shell.coordinator
    coordinator.rules = Rules(1, 1, merge_every=1, epochs=1)
    shell.report("trainer-1", 1)
    for number in range(1, 5):
        said = shell.report("trainer-0", number)
        request = coordinator.due()
        assert request is not None
        names = tuple(member.name for member in request.members)
        assert said in names
        anchor = f"r{number}"
        coordinator.commit(request, Merged(names, {}, {}, anchor, anchor, {}, 0.1))
        coordinator._origins.add("a")
        if number < 4:
            shell.report("trainer-1", number + 1, base=AnchorRef(0, "a", "a", 0))
    with pytest.raises(TooLate, match="4 rounds old"):
        shell.report("trainer-1", 9, base=AnchorRef(0, "a", "a", 0))


class Unplaced(ChildProcess):
    """A trainer for which there is no room."""

    @property
    def code(self) -> int | None:
        return None

    @property
    def placed(self) -> bool:
        return False


def test_a_trainer_without_room_is_told_of_once_and_costs_neither_a_failure_nor_the_end(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hrm_ray.launch.trainer_watch.UNPLACED_S", 0.0)
    child = shell.children.trainers["trainer-1"]
    shell.children.trainers = {"trainer-1": Unplaced("trainer-1", 1, child.process, 0.0)}
    for _ in range(3):
        shell.run.trainers._end_hung()
    told = [str(record.values["message"]) for record in shell.events]
    assert told == ["trainer-1 has not started yet: no room on the cluster, or slow libraries; the run goes on"]
    shell.coordinator.stop = StopReason.INTERRUPT
    shell.run._train()
    assert shell.children.trainers == {} and shell.run.trainers.restarts == []
    assert len([record for record in shell.events if record.kind == "event"]) == 1


def test_a_run_none_of_whose_trainers_finds_room_ends(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    child = shell.children.trainers["trainer-1"]
    shell.children.trainers = {"trainer-0": child, "trainer-1": Unplaced("trainer-1", 1, child.process, 0.0)}
    monkeypatch.setattr("hrm_ray.launch.trainer_watch.NO_ROOM_S", 0.0)
    shell.run.trainers._end_without_room()
    assert shell.run.trainers.fatal is None and shell.coordinator.stop is None, "one has its place"
    del shell.children.trainers["trainer-0"]
    monkeypatch.setattr("hrm_ray.launch.trainer_watch.NO_ROOM_S", 1e9)
    shell.run.trainers._end_without_room()
    assert shell.run.trainers.fatal is None
    monkeypatch.setattr("hrm_ray.launch.trainer_watch.NO_ROOM_S", 0.0)
    shell.run.trainers._end_without_room()
    assert isinstance(shell.run.trainers.fatal, NoRoomError) and "no trainer has found room" in str(
        shell.run.trainers.fatal
    )
    shell.run._train()
    assert shell.children.trainers == {}


def test_a_trainer_that_makes_merges_worse_is_named_once_with_its_figures(shell: Shell) -> None:
    shell.coordinator.rules = Rules(1, 1, merge_every=1, epochs=1)
    shell.children.trainers["trainer-1"].device = "cuda 5"
    for number in range(1, 5):
        bad, good = shell.report("trainer-1", number), shell.report("trainer-0", number)
        request = shell.coordinator.due()
        assert request is not None
        why = f"without it the held-out loss is {number}.0, with it 9.0"
        # Now and then a report of it is taken, so that it is not ended.
        rejected = {} if number == 3 else {bad: why}
        taken = tuple(member.name for member in request.members if member.name not in rejected)
        merged = Merged(taken, rejected, {}, f"r{number}", f"r{number}", {}, 0.1)
        shell.coordinator._origins.add("a")
        shell.coordinator.commit(request, merged)
        shell.run.trainers._name_worse(merged, {good: "trainer-0", bad: "trainer-1"})
        shell.run.trainers._name_worse(merged, {good: "trainer-0", bad: "trainer-1"})
    (said,) = [str(record.values["message"]) for record in shell.events]
    assert "trainer-1 on cuda 5 makes merges worse: 3 of its 4 reports" in said and "the held-out loss is 4.0" in said
    assert len(said) < 300
