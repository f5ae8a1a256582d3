"""The worker group on a real local cluster: every way a run can end. Each of these starts and ends Ray."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from hrm_ray.errors import DataError, ResourceError, UnavailableError
from hrm_ray.launch.resources import ResourceRequest, usable_cpus
from hrm_ray.orchestration import session, worker, worker_group
from hrm_ray.orchestration.failures import WorkerCrash
from hrm_ray.orchestration.worker import Body
from hrm_ray.types import Record, RunResult, StopReason, StopRequested
from tests.support import ray_bodies
from tests.support.ray_bodies import counts, plan_of, until_stopped

needs_two_cpus = pytest.mark.skipif(usable_cpus() < 2, reason="two workers need two CPUs")


class Received:
    """A display that remembers, and how late each record came."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.lags_s: list[float] = []

    def write(self, record: Record) -> None:
        self.records.append(record)
        self.lags_s.append(time.time() - record.time_s)

    def close(self) -> None:
        pass


def never() -> StopReason | None:
    return None


@pytest.fixture
def temp_root(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder that everything of the session must lie in, and must be gone from."""
    import tempfile

    root = Path(tempfile.mkdtemp(prefix="t"))
    monkeypatch.setattr(session, "_temp_root", lambda: str(root))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield root
    import shutil

    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After every test: no process more, and environment and signal handlers as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert left == []
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    changed = {name for name in environment.keys() | os.environ.keys() if environment.get(name) != os.environ.get(name)}
    assert changed - {"PYTEST_CURRENT_TEST"} == set()


def fail(body: Body, tmp_path: Path, world_size: int = 1) -> tuple[Exception, Received]:
    received = Received()
    with pytest.raises(Exception) as caught:
        worker_group.run(plan_of(tmp_path, world_size=world_size), sink=received, stop=never, body=body)
    return caught.value, received


@pytest.mark.ray
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=needs_two_cpus)])
def test_records_arrive_complete_in_order_and_soon(
    world_size: int, temp_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    received = Received()
    outcome = worker_group.run(plan_of(tmp_path, world_size=world_size), sink=received, stop=never, body=counts)
    assert [record.step for record in received.records] == list(range(1, 301))
    assert received.records[3].values == {"loss": 0.25}
    # 0.5 s is what is promised; the machine of the tests may be busy with others.
    assert sorted(received.lags_s)[len(received.lags_s) // 2] < 1.0
    assert (outcome.reason, outcome.step, outcome.figures["sum"]) == (StopReason.FINISHED, 300, world_size)
    assert outcome.figures["torch_threads"] == outcome.figures["omp"] == 1
    assert capfd.readouterr() == ("", "")
    assert list(temp_root.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@needs_two_cpus
def test_an_expected_error_of_one_rank_is_the_one_error(
    temp_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error, _ = fail(ray_bodies.bad_data_on_rank_1, tmp_path, world_size=2)
    assert type(error) is DataError
    assert str(error) == "words.txt: is not UTF-8 at byte 17. Save it as UTF-8."
    assert capfd.readouterr() == ("", "")
    assert list(temp_root.iterdir()) == []


@pytest.mark.ray
@needs_two_cpus
def test_an_unexpected_error_of_all_ranks_is_one_traceback(
    temp_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error, received = fail(ray_bodies.value_error_after_records, tmp_path, world_size=2)
    assert isinstance(error, WorkerCrash)
    assert str(error).count("Traceback") == 1
    assert str(error).count("ValueError: unforeseen in rank") == 2  # the headline and the traceback of one rank
    assert "value_error_after_records" in str(error)
    assert error.exit_code == 1
    assert [record.step for record in received.records] in ([], [1, 2, 3])
    assert capfd.readouterr() == ("", "")


@pytest.mark.ray
@needs_two_cpus
def test_a_killed_worker_is_named_and_its_logs_are_kept(
    temp_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error, _ = fail(ray_bodies.killed_on_rank_1, tmp_path, world_size=2)
    assert isinstance(error, WorkerCrash)
    assert str(error).startswith("worker 1: the process died")
    assert "Saved checkpoints are kept" in str(error)
    assert "--resume" in str(error)
    assert "Traceback" not in str(error)
    (kept,) = temp_root.iterdir()
    assert str(kept) in str(error)
    assert list(kept.glob("session_latest/logs/worker-*.err"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.ray
def test_a_worker_that_fails_before_it_can_report_is_told_too(
    temp_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "main", ray_bodies.fails_before_the_edge)
    error, _ = fail(counts, tmp_path)
    assert isinstance(error, WorkerCrash)
    assert str(error).startswith("worker 0: ended with ImportError: an older copy stands in the way")


@pytest.mark.slow
@pytest.mark.ray
def test_a_worker_group_that_cannot_be_built_is_an_error_not_a_wait(
    temp_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each worker asks for more than there is, after the checks: as when somebody else has taken the CPUs meanwhile.
    monkeypatch.setattr(ResourceRequest, "per_worker", lambda request: {"CPU": 2.0 * request.threads})
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    error, _ = fail(counts, tmp_path)
    assert isinstance(error, ResourceError)
    assert "no room" in str(error)
    assert list(temp_root.iterdir()) == []


@pytest.mark.ray
def test_a_process_killed_by_rays_memory_monitor_is_a_resource_error(
    temp_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray's memory monitor ends processes from the first moment on.
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    error, _ = fail(until_stopped, tmp_path)
    assert isinstance(error, ResourceError)
    assert "out of memory" in str(error) and "Traceback" not in str(error) and len(str(error)) < 300


@pytest.mark.ray
@needs_two_cpus
def test_a_stop_reaches_the_workers_within_a_second(temp_root: Path, tmp_path: Path) -> None:
    received = Received()
    asked_s: list[float] = []

    def after_some_records() -> StopReason | None:
        if len(received.records) < 5:
            return None
        asked_s.append(time.time())
        return StopReason.SIGTERM

    outcome = worker_group.run(
        plan_of(tmp_path, world_size=2), sink=received, stop=after_some_records, body=until_stopped
    )
    assert outcome.reason is StopReason.SIGTERM
    assert outcome.figures["stop_seen_s"] - asked_s[0] < 1.0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "saved_0": str(outcome.step), "saved_1": str(outcome.step),
    }  # fmt: skip
    assert received.records[-1].step == outcome.step


@pytest.mark.ray
def test_a_stop_before_the_workers_are_there_ends_at_once(temp_root: Path, tmp_path: Path) -> None:
    with pytest.raises(StopRequested) as caught:
        worker_group.run(plan_of(tmp_path), sink=Received(), stop=lambda: StopReason.INTERRUPT, body=counts)
    assert caught.value.reason.exit_code == 130
    assert list(temp_root.iterdir()) == []


@pytest.mark.ray
def test_an_interrupt_in_the_driver_ends_everything_at_once(temp_root: Path, tmp_path: Path) -> None:
    received = Received()

    def interrupt() -> StopReason | None:
        if received.records:
            raise KeyboardInterrupt
        return None

    started_s = 0.0
    with pytest.raises(KeyboardInterrupt):
        try:
            worker_group.run(plan_of(tmp_path), sink=received, stop=interrupt, body=until_stopped)
        finally:
            started_s = time.time()
    assert time.time() - started_s < 10
    assert list(temp_root.iterdir()) == []


def refuses(call: Callable[[], RunResult], kind: type[Exception], limit_s: float) -> str:
    started_s = time.monotonic()
    with pytest.raises(kind) as caught:
        call()
    assert time.monotonic() - started_s < limit_s
    return str(caught.value)


def test_too_many_workers_are_refused_before_ray_starts(temp_root: Path, tmp_path: Path) -> None:
    def run() -> RunResult:
        return worker_group.run(plan_of(tmp_path, world_size=4096), sink=Received(), stop=never, body=counts)

    assert "4096" in refuses(run, ResourceError, 2.0)
    assert list(temp_root.iterdir()) == []


def test_an_address_where_something_else_listens_is_refused(temp_root: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def run() -> RunResult:
            return worker_group.run(plan_of(tmp_path, ray_address=address), sink=Received(), stop=never, body=counts)

        assert address in refuses(run, UnavailableError, 10.0)
    assert list(temp_root.iterdir()) == []
