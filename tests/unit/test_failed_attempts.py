"""What a failed attempt leaves, and that every part of a run reports the cause which a restart can meet."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hrm_ray.bundle.folder_watch import FolderWatch
from hrm_ray.errors import DataError, DiskError, Fault, HrmRayError, ResourceError, UnavailableError, UnreadableError
from hrm_ray.launch import local, supervisor
from hrm_ray.launch.node_report import Measured, Need, NodeReport
from hrm_ray.launch.resources import ResourceRequest
from hrm_ray.launch.restarts import Cause, Ending
from hrm_ray.launch.supervisor import WatchedSink
from hrm_ray.metrics.fanout import FanOut
from hrm_ray.orchestration import attempts
from hrm_ray.orchestration.session import Session
from hrm_ray.orchestration.worker import check_shared
from hrm_ray.rundir import MANIFEST, RunDir
from hrm_ray.train import session
from hrm_ray.train.plan import RunPlan, as_restarted
from hrm_ray.train.strategies.ddp import DdpStrategy
from hrm_ray.train.world import World
from hrm_ray.types import RunResult, StopReason
from tests.support.ray_bodies import plan_of

RANK_0 = World(0, 1, torch.device("cpu"), False)


def fails_with(number: int) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def test_the_model_of_a_failed_local_attempt_is_freed_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[nn.Module]] = []
    alive: list[bool] = []

    def train(plan: RunPlan, link: local.LocalLink) -> RunResult:
        alive.extend(model() is not None for model in models)
        model = nn.Linear(2, 2)
        models.append(weakref.ref(model))
        if len(models) == 1:
            try:
                raise OSError(errno.ENOSPC, "full")
            except OSError as full:
                raise DiskError(Fault("the disk", "is full", "")) from full
        return RunResult(StopReason.FINISHED, 1, 0, str(tmp_path))

    monkeypatch.setattr(local, "train", train)
    monkeypatch.setattr(supervisor, "wait_for", lambda wait_s, stop: None)
    gc.disable()
    try:
        result = local.run(plan_of(tmp_path, max_failures=1), sink=FanOut([]), stop=lambda: None)
    finally:
        gc.enable()
    assert result.reason is StopReason.FINISHED
    assert alive == [False]


@pytest.mark.skipif(os.name == "nt", reason="the folder is held open on POSIX only")
@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, DiskError), (errno.ENOENT, DataError)])
def test_a_disk_that_is_away_when_an_attempt_begins_is_a_fault_of_the_disk(
    number: int, kind: type[HrmRayError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path)
    monkeypatch.setattr(os, "open", fails_with(number))
    with pytest.raises(kind) as raised:
        session.train(plan, local.LocalLink(FanOut([]), lambda: None))
    assert type(raised.value) is kind


def test_a_folder_that_cannot_be_looked_at_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    monkeypatch.setattr(os, "open", lambda *arguments: 4711)
    monkeypatch.setattr(os, "close", closed.append)
    monkeypatch.setattr(os, "stat", fails_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        FolderWatch(tmp_path)
    monkeypatch.undo()
    assert closed == ([] if os.name == "nt" else [4711])


def test_a_stale_handle_of_the_same_folder_is_no_deleted_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a network file system was restarted."""
    watch = FolderWatch(tmp_path)
    monkeypatch.setattr(os, "fstat", fails_with(errno.ESTALE))
    assert watch.fault() is None
    monkeypatch.undo()
    watch.close()


def whole_checkpoint(run_dir: RunDir, step: int) -> Path:
    partial = run_dir.partial_checkpoint(step)
    partial.mkdir(parents=True)
    (partial / "state.json").write_text("{}")
    run_dir.describe_checkpoint(step, partial)
    return run_dir.seal_checkpoint(step, partial)


@pytest.mark.parametrize("away", [True, False])
def test_a_restart_never_begins_again_beside_checkpoints(
    away: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where their disk is away for a moment, nor where all are damaged."""
    run_dir = RunDir(tmp_path)
    whole = whole_checkpoint(run_dir, 2)
    run_dir.config.write_text("{}")
    run_dir.metrics.write_text("kept")
    plan = replace(plan_of(tmp_path), attempt=1)
    if away:
        read_text = Path.read_text

        def read(path: Path, *arguments: Any, **options: Any) -> str:
            if path.name == MANIFEST:
                raise OSError(errno.EIO, "away")
            return read_text(path, *arguments, **options)

        monkeypatch.setattr(Path, "read_text", read)
    else:
        (whole / "state.json").write_text("other")
    with pytest.raises(UnreadableError if away else DataError) as raised:
        as_restarted(plan, run_dir)
    assert isinstance(raised.value, UnreadableError) == away
    assert run_dir.metrics.is_file()
    monkeypatch.undo()
    if away:
        assert as_restarted(plan, run_dir).checkpoint == whole


def test_a_restart_waits_for_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    """As in the empty folder below a mount point: the run does not begin again there."""
    plan = replace(plan_of(tmp_path), attempt=1)
    with pytest.raises(UnreadableError, match="is not there any more"):
        as_restarted(plan, RunDir(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnreadableError, match="deleted or moved, or its disk is unmounted"):
        session.train(replace(plan, bundle=tmp_path / "gone"), local.LocalLink(FanOut([]), lambda: None))


def test_a_folder_on_another_disk_than_before_may_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    watch = FolderWatch(bundle)
    if os.name != "nt":
        bundle.rmdir()
        with pytest.raises(DataError) as raised:
            watch.check()
        assert type(raised.value) is DataError
        bundle.mkdir()
    stat = os.stat

    def below_the_mount(path: Any, *arguments: Any, **options: Any) -> Any:
        found = stat(path, *arguments, **options)
        return os.stat_result((*found[:2], found.st_dev + 1, *found[3:10]))

    monkeypatch.setattr(os, "stat", below_the_mount)
    with pytest.raises(UnreadableError, match="was unmounted while training"):
        watch.check()
    monkeypatch.undo()
    watch.close()


def test_the_actors_of_a_run_load_no_torch() -> None:
    """They start beside the workers."""
    modules = "launch.restarts", "orchestration.run_monitor", "orchestration.worker_group"
    code = f"import sys, {', '.join(f'hrm_ray.{name}' for name in modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_stop_while_the_disk_is_away_reports_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = DiskError(Fault("the disk", "does not answer", ""))
    ending = Ending(Cause.DISK, error, 3, 0, 1, 1)
    monkeypatch.setattr(RunDir, "newest_checkpoint", fails_with(errno.EIO))
    with pytest.raises(DiskError):
        supervisor._stopped(plan_of(tmp_path), StopReason.INTERRUPT, WatchedSink(FanOut([])), ending)


def test_a_stop_after_workers_made_room_for_more_ends_with_what_is_saved(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    whole = whole_checkpoint(run_dir, 2)
    (whole / "state.json").write_text('{"progress": {"step": 2}, "epoch": 0}')
    result = supervisor._stopped(replace(plan_of(tmp_path), attempt=1), StopReason.SIGTERM, WatchedSink(FanOut([])))
    assert (result.reason, result.step) == (StopReason.SIGTERM, 2)


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, DiskError), (errno.ENOENT, UnavailableError)])
def test_a_node_whose_disk_is_away_is_no_node_with_another_folder(
    number: int, kind: type[HrmRayError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", fails_with(number))
    with pytest.raises(kind):
        check_shared(tmp_path / "marker", "token")


def test_other_ranks_get_the_cause_of_the_leaders_error() -> None:
    """Errors are pickled without what they came from, and kinds of OSError by their number."""
    from hrm_ray.train.world import _portable

    try:
        try:
            raise OSError(errno.ESTALE, "stale")
        except OSError as away:
            raise DataError(Fault("rows.jsonl", "cannot be read", "")) from away
    except DataError as error:
        sent = _portable(error)
    assert type(sent) is UnreadableError
    timed_out = _portable(TimeoutError(errno.ETIMEDOUT, "timed out", "rows.jsonl"))
    assert isinstance(timed_out, OSError) and timed_out.errno == errno.ETIMEDOUT


def test_the_first_step_of_a_process_reduces_as_every_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run has its first step where another run has a later one, and a sum over ranks depends on the length of
    what is sent."""
    lengths: list[int] = []

    def all_reduce(tensor: Tensor) -> None:
        lengths.append(tensor.numel())

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    objective = nn.Linear(3, 2)
    strategy: Any = DdpStrategy.__new__(DdpStrategy)
    strategy.world, strategy.objective = RANK_0, objective
    sent: list[list[int]] = []
    for _ in range(2):
        objective(torch.ones(1, 3)).sum().backward()
        assert strategy.reduce(False) is False
        sent.append(lengths.copy())
        lengths.clear()
    assert sent == [[9], [9]]


@pytest.mark.parametrize("independent", [True, False])
def test_only_the_node_of_the_bundle_needs_its_disk_where_trainers_are_independent(
    independent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, world_size=2)
    cluster = plan.settings.cluster.model_copy(update={"parallel_independent": independent})
    plan = replace(plan, settings=plan.settings.model_copy(update={"cluster": cluster}))
    request = ResourceRequest(2, 1, 0)
    small = Measured(10**9, 10, True, {})
    free_bytes = 1000
    monkeypatch.setattr("hrm_ray.launch.preflight.need_of", lambda *_: Need(request, 1, 100))
    monkeypatch.setattr(attempts, "ask_nodes", lambda *_: [NodeReport("10.0.0.2", {"CPU": 4.0}, small)])
    monkeypatch.setattr(attempts, "measure", lambda *_: replace(small, disk_bytes=free_bytes))
    session = cast(Session, SimpleNamespace(where="auto"))
    if not independent:
        with pytest.raises(ResourceError, match="disk of node 10"):
            attempts._check_nodes(session, request, plan)
        return
    attempts._check_nodes(session, request, plan)
    free_bytes = 10
    with pytest.raises(ResourceError, match="disk of this machine"):
        attempts._check_nodes(session, request, plan)
