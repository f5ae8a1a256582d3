"""Synchronous training on the ledger: whatever ends a run, its last checkpoint has learned what the ledger has
merged."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.errors import DataError
from hrm_ray.ledger import BlockLength, Idle, Lease, Ledger, Round, Span, State, SynchronousRun, open_ledger
from hrm_ray.ledger.verify import violations
from tests.support.counted_training import CountedTraining
from tests.support.ledgers import ledger_of, linear, states


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return ledger_of(tmp_path / "ledger.sqlite", [2, 2])


def take(run: SynchronousRun, sequences: int = 10) -> Lease:
    lease = run.claim(linear)
    assert lease is not None
    run.measure(lease.chunk, sequences)
    return lease.measured(sequences)


def whole(lease: Lease) -> Span:
    assert lease.end is not None
    return Span(lease.epoch, lease.chunk, lease.start, lease.end)


def test_a_checkpoint_is_a_round(ledger: Ledger) -> None:
    run = SynchronousRun(ledger, None)
    first, second, third = take(run), take(run), take(run)
    made = run.commit_checkpoint(100, None, [whole(first), Span(0, 1, 0, 4)], "checkpoints/step_100", "sum")
    assert made == Round(100, None, "checkpoints/step_100", "sum", 14, 14) == ledger.head
    assert states(ledger) == [
        *[(0, 0, 10, State.MERGED), (1, 0, 4, State.MERGED), (1, 4, 10, State.LEASED), (2, 0, 10, State.LEASED)]
    ]
    made = run.commit_checkpoint(200, 100, [Span(0, 1, 4, 10), whole(third)], "checkpoints/step_200", "sum")
    assert made.total_sequences == 30 and second.chunk == 1 and list(violations(ledger)) == []
    assert run.commit_checkpoint(300, 200, [], "checkpoints/step_300", "sum").sequences == 0


def test_it_is_one_transaction(ledger: Ledger) -> None:
    run = SynchronousRun(ledger, None)
    spans = [whole(take(run)), whole(take(run))]
    begun: list[bool] = []
    genuine = ledger.database.rows

    def listening(statement: str, *words: object) -> object:
        begun.extend([True] if statement.startswith("BEGIN") else [])
        return genuine(statement, *words)  # type: ignore[arg-type]

    ledger.database.rows = listening  # type: ignore[method-assign, assignment]
    run.commit_checkpoint(1, None, spans, "a", "c")
    assert begun == [True]


def test_a_doubled_commit_changes_nothing(ledger: Ledger) -> None:
    run = SynchronousRun(ledger, None)
    span = whole(take(run))
    made = run.commit_checkpoint(1, None, [span], "a", "c")
    assert run.commit_checkpoint(1, None, [span], "a", "c") == made
    with pytest.raises(DataError, match="another content"):
        run.commit_checkpoint(1, None, [span], "a", "another")


def test_a_commit_that_fails_changes_nothing(ledger: Ledger) -> None:
    run = SynchronousRun(ledger, None)
    span = whole(take(run))
    before = states(ledger)
    for step, parent, spans, reason in (
        (5, 4, [span], "round 4 is not in"),
        (5, None, [span, Span(0, 1, 0, 10)], "chunk 1 in epoch 0"),
        (5, None, [Span(0, 0, 0, 11)], "0 to 11 of chunk 0"),
        (5, None, [Span(0, 0, 2, 5)], "2 to 5 of chunk 0"),
    ):
        with pytest.raises(DataError, match=reason):
            run.commit_checkpoint(step, parent, spans, "a", "c")
        assert states(ledger) == before and ledger.head is None and ledger.staged() == []


def test_a_run_goes_on_from_any_checkpoint_of_its_lineage(ledger: Ledger) -> None:
    run = SynchronousRun(ledger, None)
    for step, parent in ((1, None), (2, 1), (3, 2)):
        run.commit_checkpoint(step, parent, [whole(take(run))], f"step_{step}", "c")
    take(run)
    again = SynchronousRun(ledger, 1)
    assert [one.round for one in again.undone] == [3, 2] and again.generation == run.generation + 1
    assert [take(again).chunk for _ in range(3)] == [1, 2, 3]
    with pytest.raises(DataError, match=r"over|not leased"):
        run.commit_checkpoint(2, 1, [Span(0, 1, 0, 10)], "step_2", "c")
    with pytest.raises(DataError, match="round 3 is not in the lineage"):
        SynchronousRun(ledger, 3)
    assert SynchronousRun(ledger, None).ledger.head is None


def test_failures_of_the_run_put_no_chunk_aside(ledger: Ledger) -> None:
    for _ in range(12):
        run = SynchronousRun(ledger, None)
        take(run)
    run.close()
    run.close()
    assert states(ledger) == [(0, 0, 10, State.PENDING)] and ledger.quarantined() == []
    assert isinstance(take(SynchronousRun(ledger, None)), Lease)


def test_there_may_be_nothing_to_claim(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger.sqlite") as ledger:
        run = SynchronousRun(ledger, None)
        assert run.claim(linear) is None
        ledger.add_blocks([BlockLength(0, 1)])
        ledger.end_data()
        run.commit_checkpoint(1, None, [whole(take(run))], "a", "c")
        assert (
            run.claim(linear, epochs=1) is None and ledger.claim("gang", run.generation, linear, epochs=1) is Idle.DONE
        )


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    per_step=st.integers(1, 5),
    every=st.integers(1, 4),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_any_run_with_any_kills_trains_everything_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], per_step: int, every: int, epochs: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("sync") / "ledger.sqlite"
    trained = CountedTraining(path, lengths, per_step, every, epochs, Random(seed))
    while not trained.start(may_be_killed=trained.starts < 6):
        with open_ledger(path, durable=False) as ledger:
            assert list(violations(ledger)) == []
    everything = {(e, c, s): 1 for e in range(epochs) for c, length in enumerate(lengths) for s in range(length)}
    assert trained.checkpoints[max(trained.checkpoints)] == Counter(everything)
    with open_ledger(path, durable=False) as ledger:
        assert all(ledger.complete(epoch) for epoch in range(epochs)) and list(violations(ledger)) == []
