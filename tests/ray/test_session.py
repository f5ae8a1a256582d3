"""A Ray session inside another program: what the program has changed stays, and its own Ray cluster is used."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import ray._private.worker as ray_worker

from hrm_ray.errors import SettingsError, UnavailableError
from hrm_ray.launch.devices import choose_devices
from hrm_ray.launch.hangs import Timeouts
from hrm_ray.launch.preflight import check_launch, least_bytes
from hrm_ray.launch.resources import ResourceRequest
from hrm_ray.orchestration import session as session_module
from hrm_ray.orchestration import worker_group
from hrm_ray.orchestration.session import Session, attached, worker_environment
from hrm_ray.settings.cluster import ClusterSettings
from hrm_ray.types import StopReason
from tests.ray.test_worker_group import Received, never
from tests.support.ray_bodies import counts, plan_of, until_stopped

pytestmark = pytest.mark.ray

ONE_CPU = ResourceRequest(1, 1, 0)


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for Ray; the environment and Ray's flag are put back after the test."""
    root = Path(tempfile.mkdtemp(prefix="s"))
    monkeypatch.setattr(session_module, "_temp_root", lambda: str(root))
    monkeypatch.setattr(ray_worker, "_worker_logs_enabled", ray_worker._worker_logs_enabled)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = dict(os.environ)
    yield root
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(root, ignore_errors=True)


def test_a_private_session_undoes_only_what_it_has_changed(restored: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as earlier:
        os.environ["OF_THE_PROGRAM"] = "before"
        before = dict(os.environ)
        session = Session(None, ONE_CPU)
        session.open(never)
        # Another thread of the program must not take this cluster for the program's.
        second = Session(None, ONE_CPU)
        assert not second.attached and not attached()
        with pytest.raises(SettingsError, match="another run of this program"):
            second.open(never)
        second.close()
        assert session.private and ray.is_initialized() and not ray_worker._worker_logs_enabled
        assert float(os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"]) == Timeouts.of(None).poll_s
        meanwhile = {"OF_THE_PROGRAM": "after", "NEW": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "7"}
        assert meanwhile.keys() - os.environ.keys() == {"NEW"}
        os.environ.update(meanwhile)
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as later:
            session.close()
            assert earlier.poll() is None and later.poll() is None
            later.communicate(b"\n")
        earlier.communicate(b"\n")
    assert dict(os.environ) == {**before, **meanwhile}
    assert ray_worker._worker_logs_enabled and not ray.is_initialized()
    assert list(restored.iterdir()) == []


def test_a_program_keeps_its_own_cluster(restored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["RAY_AUTH_TOKEN"] = session_module._token()
    context = ray.init(
        address="local", num_cpus=2, num_gpus=0, _temp_dir=str(restored), logging_level=logging.ERROR,
        object_store_memory=100 * 2**20, log_to_driver=False, namespace="of the program",
    )  # fmt: skip
    address = context.address_info["gcs_address"]
    kept = ray.put("kept")
    plan = plan_of(tmp_path, steps=20)
    least_bytes(plan.settings, plan.config)  # PyTorch sets a variable when it first counts parameters, as any run does.
    before = dict(os.environ)
    # The cluster may be larger than this machine, which is not asked.
    monkeypatch.setattr("hrm_ray.launch.preflight.usable_cpus", lambda: 1)
    many = ClusterSettings(launcher="ray", world_size=64, threads=8, device="cuda", strict=True)
    check_launch(choose_devices(many))
    assert choose_devices(ClusterSettings(device="cpu")).launcher == "local"
    received = Received()
    outcome = worker_group.run(plan, sink=received, stop=never, body=counts)
    assert outcome.reason is StopReason.FINISHED and [record.step for record in received.records] == list(range(1, 21))
    assert ray.get_runtime_context().gcs_address == address and ray.get(kept) == "kept"
    assert dict(os.environ) == before and ray_worker._worker_logs_enabled

    def interrupt() -> StopReason | None:
        if len(received.records) > 20:
            raise KeyboardInterrupt
        return None

    with pytest.raises(KeyboardInterrupt):
        worker_group.run(plan_of(tmp_path), sink=received, stop=interrupt, body=until_stopped)
    with pytest.raises(SettingsError, match="connected to the Ray cluster at"):
        worker_group.run(plan_of(tmp_path, ray_address="198.51.100.1:6379"), sink=Received(), stop=never)
    assert ray.is_initialized()


def test_what_a_failed_connection_has_set_is_undone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(**options: object) -> None:
        os.environ["SET_BY_RAY"] = "1"
        raise ConnectionError("no cluster")

    monkeypatch.setattr(ray, "init", failing)
    monkeypatch.setattr(session_module, "_load_ray_train", lambda: None)
    before = dict(os.environ)
    session = Session(None, ONE_CPU)
    with pytest.raises(UnavailableError, match="no cluster"):
        session.open(never)
    session.close()
    assert dict(os.environ) == before


def test_the_environment_of_workers_begins_with_this_package() -> None:
    assert worker_environment(3)["PYTHONPATH"].split(os.pathsep)[0] == session_module.source_root()


ORPHAN = """
import logging, pathlib, sys, time
import hrm_ray.orchestration
import psutil, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
         object_store_memory=100 * 2**20, _temp_dir=sys.argv[1])
for process in psutil.Process().children(recursive=True):
    if process.name() == "raylet":
        process.kill()
        process.wait(20)
ray.shutdown()
pathlib.Path(sys.argv[1], "survived").write_text(str(psutil.Process().ppid()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process without a parent, as POSIX has them")
def test_a_driver_whose_parent_is_process_1_survives_its_raylet() -> None:
    """As in a container, or started by a daemon. Ray alone would end it."""
    temp = tempfile.mkdtemp(prefix="o")
    code = (
        "from subprocess import *; import sys; print(Popen([sys.executable, '-c', *sys.argv[1:]], stdout=DEVNULL).pid)"
    )
    try:
        started = subprocess.run([sys.executable, "-c", code, ORPHAN, temp], stdout=subprocess.PIPE, check=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(int(started.stdout)).wait(60)
        assert Path(temp, "survived").is_file()
    finally:
        shutil.rmtree(temp, ignore_errors=True)
