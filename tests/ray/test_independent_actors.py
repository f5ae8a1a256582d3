"""Independent trainers as Ray actors: real kills at named points, and nodes that do not see the bundle."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from hrm_ray.bundle.store import open_bundle
from hrm_ray.bundle.weights_file import read_tensors
from hrm_ray.launch.run import run
from hrm_ray.launch.run_directory import load_run
from hrm_ray.ledger import read_ledger
from hrm_ray.orchestration import session
from hrm_ray.rundir import RunDir
from hrm_ray.types import Record, StopReason
from tests.unit.test_independent_processes import (
    HOOKS,
    OPTIONS,
    ROOT,
    _flat,
    command,
    rows_of_the_weights,
    text_file,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ACTORS = [word.replace("subprocess", "ray") for word in OPTIONS]
KILLS = [
    ["trainer-1", "after report", 1],
    ["anchors", "after merge", 1],
    ["coordinator", "before commit", 1],
    ["driver", "before commit", 1],
    ["raylet", "before commit", 1],
]
"""Process, point, and number of the call in that process. The first round is committed by the second command, in its
second cluster. Trainers that die while they write are tests/unit/test_independent_processes.py's."""


def check_rows(folder: Path) -> None:
    """Each row was trained into the weights once, and nothing is left."""
    bundle = RunDir(folder / "b")
    trained = rows_of_the_weights(folder, bundle)
    with read_ledger(bundle.ledger) as ledger:
        head, rows = ledger.head, sum(ledger.sequences(chunk) or 0 for chunk in range(ledger.chunks))
        epochs = ledger.epoch
    assert head is not None and len(trained) == head.total_sequences and set(trained.values()) == {1}
    assert len([row for row in trained if row[0] < epochs]) == epochs * rows > 0
    open_bundle(bundle.root, torch.device("cpu"))
    assert list(bundle.independent.contributions.iterdir()) == []
    assert [path.name for path in bundle.root.iterdir() if path.name.startswith(".driver-")] == []


def test_kills_of_actors_cost_time_and_never_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temp = tempfile.mkdtemp(prefix="k")
    monkeypatch.setenv("TMPDIR", temp)
    text, before = text_file(tmp_path), set(psutil.pids())
    ended = command(tmp_path, "--dataset-file", str(text), *ACTORS, "--epochs", "4", kills=KILLS)
    assert ended.returncode == -9, ended.stdout + ended.stderr
    ended = command(tmp_path, "--resume", kills=KILLS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    killed = [kill for number, kill in enumerate(KILLS) if (tmp_path / f"killed-{number}").exists()]
    assert killed == KILLS
    check_rows(tmp_path)
    # The cluster of the killed driver ends by itself, and its folder was removed by the second start.
    ours = [process for process in psutil.process_iter(["pid"]) if process.pid not in before]
    _, left = psutil.wait_procs([each for each in ours if _of_cluster(each, temp)], timeout=30.0)
    assert left == []
    assert [name for name in os.listdir(temp) if name.startswith("hrm-")] == []
    shutil.rmtree(temp)


def _of_cluster(process: psutil.Process, temp: str) -> bool:
    try:
        return any(temp in word for word in process.cmdline())
    except psutil.Error:
        return False


def test_one_actor_without_an_outer_step_is_plain_training(tmp_path: Path) -> None:
    shape = [*OPTIONS[OPTIONS.index("--hidden-size") :], "--dataset-file", str(text_file(tmp_path)), "--steps", "23"]
    shape += ["--linear-dataset", "--threads", "1"]
    plain = run(load_run(_flat([*shape, "--bundle-dir", str(tmp_path / "plain"), "--launcher", "local"])))
    alone = ["--parallel-independent", "--world-size", "1", "--outer-optimizer", "none", "--merge-every", "5"]
    result = run(load_run(_flat([*shape, "--bundle-dir", str(tmp_path / "alone"), *alone, "--launcher", "ray"])))
    assert (result.step, result.samples) == (plain.step, plain.samples)
    own, other = (read_tensors(RunDir(Path(one.bundle)).weights) for one in (plain, result))
    assert own.keys() == other.keys()
    assert [name for name in own if not torch.equal(own[name], other[name])] == []


class Nodes:
    """A head without CPUs, which has the bundle, and nodes of one CPU that see neither it nor the data, and have a
    temporary folder each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.temp = folder, tempfile.mkdtemp(prefix="n")
        self.ip = ray.util.get_node_ip_address()
        self.cluster = Cluster()
        self._add(num_cpus=0, include_dashboard=False, temp_dir=self.temp)
        self.ones = [self.add(number) for number in range(2)]

    def add(self, number: int) -> Any:
        own = self.folder / f"node-{number}"
        own.mkdir(exist_ok=True)
        hidden = os.pathsep.join([str(self.folder / "b"), str(self.folder / "text.txt")])
        return self._add(num_cpus=1, env_vars={"HRM_HIDDEN": hidden, "TMPDIR": str(own)})

    def _add(self, **more: Any) -> Any:
        return self.cluster.add_node(node_ip_address=self.ip, object_store_memory=80 * 2**20, **more)


class LosesANode:
    """A display that takes a node away in mid-run, and brings another in its place; called in the main thread. It ends
    the run when the trainers of both nodes have reported after that."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes, self.done = nodes, False
        self.messages: list[str] = []
        self.reported: set[str] = set()

    def write(self, record: Record) -> None:
        self.messages.append(str(record.values.get("message", "")))
        if record.kind == "train" and record.step >= 8 and not self.done:
            self.done = True
            self.nodes.cluster.remove_node(self.nodes.ones.pop(), allow_graceful=False)
            self.nodes.ones.append(self.nodes.add(1))
        elif any("is started again" in message for message in self.messages):
            self.reported |= {name for name in record.values if name.endswith("/samples_per_s")}

    def stop(self) -> StopReason | None:
        return StopReason.STOP_FILE if len(self.reported) == 2 else None

    def close(self) -> None:
        pass


def test_nodes_that_see_no_bundle_and_one_that_is_lost(tmp_path: Path) -> None:
    text_file(tmp_path)
    # In a process of its own: after a private cluster, a process cannot keep actors on one at another address.
    process = multiprocessing.get_context("spawn").Process(target=_on_other_nodes, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    check_rows(tmp_path)
    for number in range(2):
        assert [path.name for path in (tmp_path / f"node-{number}").iterdir() if path.name.startswith("hrm-")] == []


def _on_other_nodes(folder: Path) -> None:
    os.environ["RAY_AUTH_TOKEN"] = session._token()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HOOKS), str(ROOT)])
    os.environ["HRM_AUDIT"], os.environ["HRM_KILLS"] = str(folder), json.dumps([])
    logging.getLogger("ray").setLevel(logging.ERROR)
    nodes = Nodes(folder)
    try:
        sink = LosesANode(nodes)
        words = [
            *OPTIONS,
            "--epochs",
            "5000",
            "--dataset-file",
            str(folder / "text.txt"),
            "--bundle-dir",
            str(folder / "b"),
        ]
        said = {**_flat(words), "--ray-address": nodes.cluster.address}
        del said["--launcher"]
        result = run(load_run(said), sink=sink, stop=sink.stop)
        assert result.reason is StopReason.STOP_FILE
        # Which of the two Ray sees first is chance.
        assert [one.cause for one in result.restarts] in (["worker lost"], ["node lost"])
        trainers = RunDir(folder / "b").independent.root / "trainers"
        for name in ("trainer-0", "trainer-1"):
            own = RunDir(trainers / name)
            assert own.newest_whole_checkpoint() is not None
            assert own.metrics.stat().st_size > 0
    finally:
        nodes.cluster.shutdown()
        shutil.rmtree(nodes.temp, ignore_errors=True)
