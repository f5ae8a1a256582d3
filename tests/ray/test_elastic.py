"""A run whose cluster shrinks and grows while it trains, on nodes of one CPU each."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from hrm_ray.launch import local
from hrm_ray.launch.plan import make_plan
from hrm_ray.launch.resolve import resolve
from hrm_ray.ledger import read_ledger
from hrm_ray.ledger.verify import violations
from hrm_ray.orchestration import session, worker_group
from hrm_ray.rundir import RunDir, read_json
from hrm_ray.settings.load import load_settings
from hrm_ray.train.plan import RunPlan
from hrm_ray.types import Record
from tests.ray.test_worker_group import Received, never
from tests.support.numbered_corpora import TOKENIZER, Shape, texts_of, write_corpus
from tests.support.recorded_training import recorded, recorded_by_attempt, rows_by_step
from tests.support.runs import records

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TEXTS = texts_of([number % 23 for number in range(600)])
SHAPE = Shape(samples_per_block=200, chunk_size=37, seq_len=16)
ROWS = 12
"""Of the effective batch: 4, 3, 2 and 1 workers can share them."""
STEPS, EVERY = 44, 4
"""Weight updates, and those between two checkpoints."""
CHANGES = {0: (10, -2), 1: (18, 1), 2: (26, -2), 3: (34, 3)}
"""By attempt: the step after which nodes are taken away or added, and how many."""


class Nodes:
    """A cluster with a head without CPUs, and nodes with one each. Ray starts nodes in the main thread only."""

    def __init__(self, number: int) -> None:
        self.folder = tempfile.mkdtemp(prefix="e")
        self.ip = ray.util.get_node_ip_address()
        self.cluster = Cluster()
        self.add(1, num_cpus=0, include_dashboard=False, temp_dir=self.folder)
        self.ones: list[Any] = []
        self.add(number)

    def add(self, number: int, **more: Any) -> None:
        for _ in range(number):
            more = {"object_store_memory": 80 * 2**20, **more}
            node = self.cluster.add_node(node_ip_address=self.ip, **more)
            if "num_cpus" not in more:
                self.ones.append(node)

    def change(self, number: int) -> None:
        if number > 0:
            self.add(number)
        for _ in range(-number):
            self.cluster.remove_node(self.ones.pop(), allow_graceful=False)


@contextmanager
def nodes_of(number: int) -> Iterator[Nodes]:
    """A cluster of so many nodes."""
    os.environ["RAY_AUTH_TOKEN"] = session._token()
    logging.getLogger("ray").setLevel(logging.ERROR)
    made = Nodes(number)
    try:
        yield made
    finally:
        made.cluster.shutdown()
        shutil.rmtree(made.folder, ignore_errors=True)


def plan_of(tmp_path: Path, bundle: Path, **said: str | bool) -> RunPlan:
    options: dict[str, str | bool] = {
        **{"--dataset-file": str(tmp_path / "corpus"), "--bundle-dir": str(bundle), "--lr-schedule": "constant"},
        **{"--tokenizer-path": str(tmp_path / "tokenizer"), "--max-seq-len": str(SHAPE.seq_len), "--keep": "20"},
        **{"--samples-per-block": str(SHAPE.samples_per_block), "--dataset-chunk-size": str(SHAPE.chunk_size)},
        **{"--hidden-size": "32", "--num-heads": "2", "--num-layers": "2", "--no-use-moe": True, "--no-amp": True},
        **{"--threads": "1", "--log-every": "1", "--steps": str(STEPS), "--save-every": str(EVERY)},
        **{"--dropout-rate": "0.1", "--no-linear-dataset": True, "--shuffle-buffer-size": "60", "--max-failures": "2"},
    }
    return make_plan(resolve(load_settings({**options, **said})))


class Changing(Received):
    """A display that takes nodes away and adds some as a run gets on; called in the main thread."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__()
        self.nodes = nodes
        self.left = dict(CHANGES)
        self.lost_s: list[float] = []

    def write(self, record: Record) -> None:
        super().write(record)
        change = next(iter(self.left.values()), None)
        if record.kind == "train" and change is not None and record.step == change[0]:
            del self.left[next(iter(self.left))]
            self.nodes.change(change[1])
            self.lost_s.append(time.time())


def test_a_run_goes_on_while_its_cluster_shrinks_and_grows(tmp_path: Path) -> None:
    """4 -> 2 -> 3 -> 1 -> 4 workers, with dropout and shuffled rows: every step has the rows of an undisturbed run in
    one process, in their order, and its loss up to float32 sums in another order; the ledger verifies."""
    # In a process of its own: after a private cluster, a process cannot keep actors on one at another address.
    process = multiprocessing.get_context("spawn").Process(target=shrink_and_grow, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def shrink_and_grow(tmp_path: Path) -> None:
    """The test, in its own process."""
    with nodes_of(4) as nodes:
        _shrink_and_grow(nodes, tmp_path)


def _shrink_and_grow(nodes: Nodes, tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer")
    write_corpus(tmp_path / "corpus", TEXTS, files=3)
    alone = plan_of(tmp_path, tmp_path / "one", **{"--launcher": "local", "--batch-size": str(ROWS)})
    recorded(alone, local.LocalLink(Received(), never), folder=tmp_path / "rows")
    words: dict[str, str | bool] = {"--world-size": "4", "--min-workers": "1", "--batch-size": str(ROWS // 4)}
    plan = plan_of(tmp_path, tmp_path / "many", **words, **{"--ray-address": nodes.cluster.address})
    sink = Changing(nodes)
    halts = {attempt: step + 1 for attempt, (step, _) in CHANGES.items()}
    body = partial(recorded_by_attempt, folder=tmp_path / "attempts", halts=halts)
    result = worker_group.run(plan, sink=sink, stop=never, body=body)
    assert result.step == STEPS and len(result.restarts) == 2
    # Which of the two Ray sees first is chance.
    assert {restart.cause for restart in result.restarts} <= {"node lost", "worker lost"}
    want, found = records(tmp_path / "one"), records(tmp_path / "many")
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    sizes = [record["world_size"] for record in found]
    # Fewer from the last checkpoint before the loss on, more from the first after there is room.
    assert sizes == [4] * 8 + [2] * 12 + [3] * 4 + [1] * 12 + [4] * 8
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in want], rel=1e-4)
    survived: dict[int, list[tuple[int, ...]]] = {}
    for attempt, workers in enumerate((4, 2, 3, 1, 4)):
        survived |= rows_by_step(tmp_path / "attempts" / str(attempt), range(workers))
    assert survived == rows_by_step(tmp_path / "rows", [0])
    with read_ledger(RunDir(tmp_path / "many").ledger) as ledger:
        assert list(violations(ledger)) == []
    stored = read_json(RunDir(tmp_path / "many").training_args)["settings"]
    assert (stored["cluster"]["world_size"], stored["optimizer"]["batch_size"]) == (4, 3), "what was asked for"
    events = [str(record["message"]) for record in records(tmp_path / "many", "event")]
    for said in ("3 workers instead of 2 from step 20 on", "4 workers instead of 1 from step 36 on"):
        assert any(message.startswith(said) for message in events), events
    shown = [record for record in sink.records if record.kind == "event"]
    decided = [record.time_s for record in shown if " of at most " in str(record.values["message"])]
    began = [record.time_s for record in shown if "restart" in record.values]
    for what, times in (("the decision", decided), ("the next attempt", began)):
        taken_s = [round(at - lost) for at, lost in zip(times, sink.lost_s[::2], strict=True)]
        print(f"seconds from a lost node to {what}: {taken_s}")
