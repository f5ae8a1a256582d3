"""A run with a fixed number of workers whose cluster loses nodes, on nodes of one CPU each."""

from __future__ import annotations

import multiprocessing
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from hrm_ray.errors import ResourceError
from hrm_ray.launch import local, restarts
from hrm_ray.orchestration import worker_group
from hrm_ray.rundir import RunDir
from hrm_ray.types import Record
from tests.ray.test_elastic import TEXTS, Nodes, nodes_of, plan_of
from tests.ray.test_worker_group import Received, never
from tests.support.numbered_corpora import TOKENIZER, write_corpus
from tests.support.recorded_training import recorded, recorded_by_attempt, rows_by_step
from tests.support.runs import records

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROWS = 4
LOST_AT = (6, 14)
"""The steps after which a node is lost; only the first one is replaced."""


class Losing(Received):
    """A display that takes a node away twice, and adds one when the run first waits for room; called in the main
    thread."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__()
        self.nodes = nodes
        self.due = list(LOST_AT)
        self.replaced = False

    def write(self, record: Record) -> None:
        super().write(record)
        if record.kind == "train" and self.due and record.step == self.due[0]:
            del self.due[0]
            self.nodes.change(-1)
        # The first failure is that of the workers; the second, that there is no room for others.
        if record.kind == "event" and not self.replaced and "no room" in str(record.values["message"]):
            self.replaced = True
            self.nodes.change(1)


def test_a_fixed_number_of_workers_waits_for_a_replacement_and_not_for_ever(tmp_path: Path) -> None:
    """The rows and losses of an undisturbed run; without a replacement exit code 4 and a whole checkpoint."""
    # In a process of its own: after a private cluster, a process cannot keep actors on one at another address.
    process = multiprocessing.get_context("spawn").Process(target=lose_nodes, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def lose_nodes(tmp_path: Path) -> None:
    """The test, in its own process."""
    TOKENIZER.save(tmp_path / "tokenizer")
    write_corpus(tmp_path / "corpus", TEXTS, files=3)
    words: dict[str, str | bool] = {"--steps": "16", "--save-every": "2", "--max-failures": "20"}
    alone = plan_of(tmp_path, tmp_path / "one", **words, **{"--launcher": "local", "--batch-size": str(ROWS)})
    recorded(alone, local.LocalLink(Received(), never), folder=tmp_path / "rows")
    with nodes_of(2) as nodes:
        shared = {"--ray-address": nodes.cluster.address, "--world-size": "2", "--batch-size": str(ROWS // 2)}
        plan = plan_of(tmp_path, tmp_path / "two", **words, **shared, **{"--wait-for-resources": "1s"})
        sink = Losing(nodes)
        # The workers make no step more until their node is gone; attempts without room count too.
        halts = {attempt: LOST_AT[min(attempt, 1)] + 1 for attempt in range(20)}
        body = partial(recorded_by_attempt, folder=tmp_path / "attempts", halts=halts)
        with mock.patch.object(restarts, "WAITS_S", (1.0, 1.0, 1.0)), pytest.raises(ResourceError) as raised:
            worker_group.run(plan, sink=sink, stop=never, body=body)
    message = str(raised.value)
    assert raised.value.exit_code == 4 and "room" in message and "--resume" in message, message
    assert len(message) < 300 and sink.replaced
    newest = RunDir(plan.bundle).newest_whole_checkpoint()
    last = LOST_AT[1]
    assert newest is not None and newest.name == f"step_{last}"
    want, found = records(tmp_path / "one"), records(plan.bundle)
    assert [(entry["step"], entry["world_size"]) for entry in found[:last]] == [
        (step, 2) for step in range(1, last + 1)
    ]
    losses = [[entry["loss"] for entry in each[:last]] for each in (found, want)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    trained: dict[int, list[tuple[int, ...]]] = {}
    for folder in sorted((tmp_path / "attempts").iterdir(), key=lambda each: int(each.name)):
        trained |= rows_by_step(folder, range(len(list(folder.iterdir()))))
    undisturbed = rows_by_step(tmp_path / "rows", [0])
    assert all(trained[step] == undisturbed[step] for step in range(1, last + 1))
