"""What is refused before anything starts, because this machine has not got it."""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hrm_ray.errors import ResourceError, SettingsError, UnavailableError
from hrm_ray.launch.devices import choose_device, choose_devices, visible_gpus
from hrm_ray.launch.preflight import disk_bytes, merging_bytes, state_bytes
from hrm_ray.model.describe import count_parameters
from hrm_ray.rundir import RunDir
from hrm_ray.settings.cluster import ClusterSettings
from hrm_ray.train.plan import RunPlan
from tests.support.block_trainers import plan_of
from tests.support.runs import TEXT, files_below, hrm, last_said, refused, text_file, train

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def a_machine_without_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)


def machine(monkeypatch: pytest.MonkeyPatch, cuda: int = 0, cpus: int = 8) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(
        "hrm_ray.launch.devices._COUNT", {"cuda": lambda: cuda, "xpu": int, "mps": int, "cpu": lambda: 1}
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr("hrm_ray.launch.devices.usable_cpus", lambda: cpus)


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000))
    words = ("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *TEXT)
    refused(4, *words, naming=("memory", "take", "free", "smaller model"))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    words = ("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *TEXT)
    refused(4, *words, naming=("disk", "checkpoints", "--keep"))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_independent_trainers_need_room_for_anchors_states_and_a_second_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plan_of(text_file(tmp_path), tmp_path / "a", *TEXT)
    words = ("--parallel-independent", "--world-size", "3", "--launcher", "subprocess")
    plan = plan_of(text_file(tmp_path), tmp_path / "b", *TEXT, *words)
    weights = count_parameters(plan.config).total
    # Weights and two moments in a state; of a trainer two of them, and its report.
    own = disk_bytes(plan.settings, plan.config, plan.bundle) - disk_bytes(plain.settings, plain.config, plain.bundle)
    assert own == weights * (4 * 2 * 4 + 3 * (4 + 2 * 12))
    assert state_bytes(plan.settings, plan.config) - state_bytes(plain.settings, plain.config) == 4 * weights
    assert merging_bytes(plan.settings, plan.config) == 12 * weights
    assert merging_bytes(plain.settings, plain.config) == 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    again = ("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "c", *TEXT, *words)
    refused(4, *again, naming=("disk", "checkpoints", "anchors, and the states of 3 trainers", "--keep"))


def test_checkpoints_that_are_there_need_no_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended because the disk was full resumes as soon as one checkpoint fits."""
    data, bundle = text_file(tmp_path), tmp_path / "b"
    train(data, bundle, *TEXT, "--steps", 3, "--save-every", 1)
    folders = [RunDir(bundle).checkpoint(step) for step in (1, 2, 3)]
    (one, *_) = (sum(path.stat().st_size for path in folder.iterdir()) for folder in folders)
    again = ("train", "--bundle-dir", bundle, "--resume", "--steps", 4)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 10**9, one // 2))
    before = files_below(bundle)
    refused(4, *again, naming=("disk", "3 checkpoints and one being written", "more than those there"))
    assert files_below(bundle) == before
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 10**9, one))
    refused(4, *again, "--keep", 5, naming=("disk", "5 checkpoints"))
    assert hrm(*again).code == 0
    assert hrm(*again, "--steps", 5, "--keep", 1).code == 0, "fewer are kept than are there"


def test_a_file_system_that_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, 0))
    words = ("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *TEXT)
    refused(4, *words, naming=(f"--bundle-dir {tmp_path / 'b'}", "stores no files"))


def test_one_device_is_trained_here() -> None:
    chosen = choose_devices(ClusterSettings())
    assert (chosen.device, chosen.world_size, chosen.threads, chosen.launcher) == ("cpu", 1, 8, "local")


def test_several_workers_share_the_cpus() -> None:
    chosen = choose_devices(ClusterSettings(world_size=3))
    assert (chosen.world_size, chosen.threads, chosen.launcher) == (3, 2, "ray")


def test_all_gpus_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=4)
    chosen = choose_devices(ClusterSettings())
    assert (chosen.device, chosen.world_size, chosen.launcher) == ("cuda", 4, "ray")
    alone = choose_devices(ClusterSettings(world_size=1))
    assert (alone.device, alone.world_size, alone.launcher) == ("cuda", 1, "local")


def test_named_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with pytest.raises(UnavailableError, match="--cuda-ids 1,9: this machine has 4 CUDA devices, counted from 0"):
        choose_devices(ClusterSettings(cuda_ids="1,9"))
    chosen = choose_devices(ClusterSettings(cuda_ids="1"))
    assert (chosen.visible_gpus, chosen.world_size) == ("1", 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_named_gpus_among_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,GPU-7")
    chosen = choose_devices(ClusterSettings(cuda_ids="1,2"))
    with visible_gpus(chosen):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,GPU-7"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,5,GPU-7"
    assert chosen.world_size == 2


def test_a_dry_run_leaves_the_visible_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    data, bundle = text_file(tmp_path), tmp_path / "b"
    ran = hrm("train", "--dataset-file", data, "--bundle-dir", bundle, *TEXT, "--cuda-ids", "1", "--dry-run")
    assert ran.code == 0 and "cuda" in ran.out
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    """A device or GPU that was named is never replaced by another one; --device auto takes what there is."""
    with pytest.raises(UnavailableError, match="--device cuda: this machine has no such device, only cpu"):
        choose_devices(ClusterSettings(device="cuda"))
    with pytest.raises(UnavailableError, match="--device mps"):
        choose_device("mps")
    assert choose_device("auto") == choose_device("cpu") == choose_devices(ClusterSettings()).device == "cpu"
    words = ("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *TEXT)
    refused(3, *words, "--device", "cuda", naming=("--device cuda", "only cpu", "Give --device auto"))
    refused(3, *words, "--cuda-ids", "0,1", naming=("--cuda-ids 0,1", "0 CUDA devices", "--device auto"))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_generate_on_a_device_that_is_not_there() -> None:
    bundle = Path(__file__).resolve().parent.parent / "fixtures" / "bundles_0_1" / "text"
    refused(3, "generate", bundle, "--prompt", "x", "--device", "cuda", naming=("--device cuda", "Give --device auto"))


def test_gpus_of_a_cluster_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="Ray chooses the GPUs"):
        choose_devices(ClusterSettings(cuda_ids="0", ray_address="auto"))
    chosen = choose_devices(ClusterSettings(device="cuda", ray_address="auto", world_size=2))
    assert (chosen.device, chosen.world_size, chosen.launcher) == ("cuda", 2, "ray")


CPUS, GPUS = {"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "said", "expected"),
    [
        ([CPUS, GPUS, GPUS], {}, ("cuda", 4)),
        ([CPUS, GPUS, GPUS], {"threads": 5}, ("cuda", 2)),
        ([CPUS, GPUS, GPUS], {"world_size": 3}, ("cuda", 3)),
        ([CPUS, GPUS, GPUS], {"strategy": "single"}, ("cuda", 1)),
        ([CPUS, CPUS], {}, ("cpu", 1)),
        ([CPUS, CPUS], {"world_size": 8}, ("cpu", 8)),
        ([CPUS, CPUS], {"device": "cuda"}, ("cuda", 1)),
        (None, {"device": "cpu"}, ("cpu", 1)),
        (None, {"device": "cuda", "world_size": 2}, ("cuda", 2)),
    ],
)
def test_a_running_cluster_gives_its_gpus(
    nodes: list[dict[str, float]] | None,
    said: dict[str, Any],
    expected: tuple[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked only for what was left open; what this machine has does not matter."""
    machine(monkeypatch, cuda=1)

    def cluster_nodes(address: str) -> list[dict[str, float]]:
        assert address == "auto" and nodes is not None
        return nodes

    monkeypatch.setattr("hrm_ray.orchestration.worker_group.cluster_nodes", cluster_nodes)
    chosen = choose_devices(ClusterSettings.model_validate({"ray_address": "auto", **said}))
    assert (chosen.device, chosen.world_size) == expected and chosen.launcher == "ray"


def test_named_gpus_are_set_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr("hrm_ray.launch.resolve.check_launch", lambda devices: None)
    seen: list[tuple[str, int]] = []

    def starting(plan: RunPlan, **named: Any) -> None:
        seen.append((os.environ["CUDA_VISIBLE_DEVICES"], plan.world_size))
        raise ResourceError([])

    monkeypatch.setattr("hrm_ray.orchestration.worker_group.run", starting)
    words = last_said((*TEXT, "--launcher", "ray", "--cuda-ids", "1,3", "--no-amp"))
    hrm("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *words)
    assert seen == [("5,7", 2)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"


def test_waiting_for_a_machine_that_does_not_grow_is_noted(tmp_path: Path) -> None:
    words = ("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *TEXT)
    ran = hrm(*words, "--wait-for-resources", "10m", "--dry-run")
    assert ran.code == 0 and "--wait-for-resources 10m (no running cluster is used" in ran.out
    refused(2, *words, "--wait-for-resources", "soon", naming=("--wait-for-resources soon", "duration", "1h30m"))


def test_a_dry_run_shows_what_is_needed_and_what_is_there(tmp_path: Path) -> None:
    ran = hrm("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b", *TEXT, "--dry-run")
    lines = ran.out.splitlines()
    (row,) = (number for number, line in enumerate(lines) if line.startswith("1 worker, each"))
    assert lines[row - 1].split() == ["CPUs", "GPUs", "memory", "disk", "hrm_ray", "torch", "ray"]
    assert lines[row + 1].startswith("this machine")
