"""Text through Ray Data: the rows of one process, every one of them once, also when workers are killed."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from hrm_ray.data.bpe import train_bpe
from hrm_ray.errors import DataError
from hrm_ray.launch import local
from hrm_ray.launch.plan import make_plan
from hrm_ray.launch.resolve import resolve
from hrm_ray.launch.resources import usable_cpus
from hrm_ray.ledger import read_ledger
from hrm_ray.ledger.verify import violations
from hrm_ray.orchestration import worker_group
from hrm_ray.orchestration.attempts import reads_text
from hrm_ray.orchestration.datasets import ChunkTaskContext
from hrm_ray.rundir import RunDir
from hrm_ray.settings.load import load_settings
from hrm_ray.train.plan import RunPlan, TextData
from hrm_ray.types import Record
from tests.ray.test_worker_group import Received, never
from tests.support.faults import Faulty, fail_at, rows_by_step
from tests.support.numbered_corpora import TOKENIZER, Row, Shape, rows_of_corpus, texts_of, write_corpus
from tests.support.runs import records

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(usable_cpus() < 2, reason="two workers need two CPUs"),
]

TEXTS = texts_of([number % 23 for number in range(160)])
SHAPE = Shape(samples_per_block=60, chunk_size=13, seq_len=16)
EFFECTIVE = 8


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    TOKENIZER.save(tmp_path / "tokenizer")
    return write_corpus(tmp_path / "corpus", TEXTS, files=3)


def plan_of(corpus: Path, bundle: Path, ranks: int, **said: str | bool) -> RunPlan:
    """A plan of training. Nothing is counted beforehand, so chunks are made as the run goes."""
    options: dict[str, str | bool] = {
        **{"--dataset-file": str(corpus), "--bundle-dir": str(bundle), "--lr-schedule": "constant"},
        **{"--tokenizer-path": str(corpus.parent / "tokenizer"), "--max-seq-len": str(SHAPE.seq_len)},
        **{"--samples-per-block": str(SHAPE.samples_per_block), "--dataset-chunk-size": str(SHAPE.chunk_size)},
        **{"--hidden-size": "32", "--num-heads": "2", "--num-layers": "2", "--no-use-moe": True, "--no-amp": True},
        **{"--launcher": "ray" if ranks > 1 else "local", "--world-size": str(ranks), "--threads": "1"},
        **{"--batch-size": str(EFFECTIVE // ranks), "--log-every": "1", "--stop-after-epoch": True},
    }
    return make_plan(resolve(load_settings({**options, **said})))


def total(rows: dict[int, list[Row]]) -> Counter[Row]:
    pad = TOKENIZER.pad_id
    return Counter(tuple(t for t in row if t != pad) for step in rows.values() for row in step)


EXPECTED = Counter(rows_of_corpus(TEXTS, SHAPE))


@pytest.mark.parametrize("order", ["linear", pytest.param("shuffled", marks=pytest.mark.slow)])
def test_ray_data_gives_the_rows_of_one_process(corpus: Path, tmp_path: Path, order: str) -> None:
    said: dict[str, str | bool] = {}
    if order == "shuffled":
        said = {"--no-linear-dataset": True, "--shuffle-buffer-size": "30"}
    alone = plan_of(corpus, tmp_path / "one", 1, **said)
    Faulty(rows=tmp_path / "rows1")(alone, local.LocalLink(Received(), never))
    plan = plan_of(corpus, tmp_path / "two", 2, **said)
    assert reads_text(plan), "there should be something left for Ray Data to make"
    outcome = worker_group.run(plan, sink=Received(), stop=never, body=Faulty(rows=tmp_path / "rows2"))
    one, two = rows_by_step(tmp_path / "rows1"), rows_by_step(tmp_path / "rows2")
    assert one == two
    assert total(two) == EXPECTED and outcome.step == len(two)
    losses = [record["loss"] for record in records(tmp_path / "one")]
    # float32 sums in another order.
    assert [record["loss"] for record in records(tmp_path / "two")] == pytest.approx(losses, rel=1e-4)
    with read_ledger(RunDir(tmp_path / "two").ledger) as ledger:
        assert list(violations(ledger)) == [] and ledger.complete(0)


def test_several_workers_are_served_what_is_in_the_cache_too(corpus: Path, tmp_path: Path) -> None:
    plan = plan_of(corpus, tmp_path / "b", 2)
    assert isinstance(plan.data, TextData) and worker_group.is_served(plan)
    kept = replace(plan, data=replace(plan.data, text=replace(plan.data.text, kept=True)))
    assert worker_group.is_served(kept) and not reads_text(kept)
    assert not worker_group.is_served(replace(kept, world_size=1))


def test_a_process_that_served_another_run_opens_this_ones_tokenizer(corpus: Path, tmp_path: Path) -> None:
    """On a program's cluster Ray uses the processes of tasks again, also for a new run of the same name."""
    plan = plan_of(corpus, tmp_path / "b", 2)
    assert isinstance(plan.data, TextData)
    text = plan.data.text
    first = ChunkTaskContext(plan.bundle, text, run="first")
    assert first.pipeline(writes=False).tokenizer.fingerprint == TOKENIZER.fingerprint
    other = train_bpe(TEXTS, TOKENIZER.vocab_size + 20, 10)
    other.save(plan.bundle)
    second = ChunkTaskContext(plan.bundle, text, run="second")
    assert second.pipeline(writes=False).tokenizer.fingerprint == other.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_costs_no_row_and_doubles_none(corpus: Path, tmp_path: Path, rank: int) -> None:
    """Killed after the checkpoint of step 6. What survives in the weights is what was trained up to step 6 and what was
    trained after going on: together every row once."""
    bundle = tmp_path / "b"
    plan = plan_of(corpus, bundle, 2, **{"--save-every": "3"})
    body = Faulty([fail_at(rank, 9)], rows=tmp_path / "rows")
    result = worker_group.run(plan, sink=Received(), stop=never, body=body)
    (restart,) = result.restarts
    assert (restart.cause, restart.resumed_step) == ("worker lost", 6)
    trained = rows_by_step(tmp_path / "rows")
    assert total(trained) == EXPECTED and max(trained) == result.step
    with read_ledger(RunDir(bundle).ledger) as ledger:
        assert list(violations(ledger)) == [] and ledger.complete(0)
        assert ledger.head is not None and ledger.head.total_sequences == EXPECTED.total()


@pytest.mark.slow
def test_a_bundle_deleted_while_two_workers_train_ends_them(corpus: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"

    class Deleting(Received):
        def write(self, record: Record) -> None:
            if record.kind == "train" and record.step == 1:
                # Its workers write into it meanwhile, so it cannot be emptied in its place.
                shutil.rmtree(bundle.rename(tmp_path / "moved"), ignore_errors=True)

    plan = plan_of(corpus, bundle, 2, **{"--epochs": "500", "--save-every": "3"})
    with pytest.raises(DataError, match="the bundle was deleted or moved while training"):
        worker_group.run(plan, sink=Deleting(), stop=never)
    assert not bundle.exists()
