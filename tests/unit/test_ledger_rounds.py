"""Reports and rounds: all or nothing, once, on the right parent; and what going back undoes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hrm_ray.ledger import Contribution, Lease, Ledger, Refused, Round, State
from hrm_ray.ledger.verify import violations
from tests.support.ledgers import claimed, ledger_of, linear, reported, standing, states


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return ledger_of(tmp_path / "ledger.sqlite", [3, 3])


def commit(ledger: Ledger, number: int, parent: int | None, *accepted: str, **rejected: str) -> Round | Refused:
    return ledger.commit(
        number, parent=parent, accepted=accepted, rejected=rejected, anchor=f"anchor {number}", checksum=f"sum {number}"
    )


def frozen(ledger: Ledger) -> list[tuple[object, ...]]:
    """Everything that is in the file."""
    tables = ("facts", "blocks", "measured", "epochs", "workers", "claims", "ranges", "contributions", "rounds")
    return [row for table in tables for row in ledger.database.rows(f"SELECT * FROM {table}")]


def test_a_report_is_all_or_nothing(ledger: Ledger) -> None:
    generation = ledger.start_worker("w")
    good, gone = claimed(ledger, "w", generation), claimed(ledger, "w", generation)
    ledger.release(gone)
    before = frozen(ledger)
    refused = ledger.report("mixed", [good, gone], base=None, path="p", checksum="c")
    assert isinstance(refused, Refused) and "chunk 1" in refused.reason and frozen(ledger) == before
    told = reported(ledger, "good", good)
    assert (told.sequences, told.round, told.path) == (10, None, "good.safetensors") and ledger.staged() == [told]
    assert states(ledger) == [(0, 0, 10, State.TRAINED), (1, 0, 10, State.PENDING)]


def test_a_report_is_of_one_worker_about_measured_chunks(ledger: Ledger) -> None:
    one, two = ledger.start_worker("one"), ledger.start_worker("two")
    leases = [claimed(ledger, "one", one), claimed(ledger, "two", two)]
    for wrong in ([], leases):
        with pytest.raises(ValueError, match="one worker"):
            ledger.report("wrong", wrong, base=None, path="p", checksum="c")
    with pytest.raises(ValueError, match="measured"):
        ledger.report("wrong", [claimed(ledger, "one", one, None)], base=None, path="p", checksum="c")
    assert ledger.staged() == []


def test_a_report_that_says_another_end_is_stale(ledger: Ledger) -> None:
    generation = ledger.start_worker("w")
    lease = claimed(ledger, "w", generation)
    first = ledger.split(lease, 4)
    assert isinstance(ledger.report("all", [lease], base=None, path="p", checksum="c"), Refused)
    assert isinstance(first, Lease) and reported(ledger, "part", first).sequences == 4


def test_a_doubled_report_changes_nothing_whenever_it_comes(ledger: Ledger) -> None:
    generation = ledger.start_worker("w")
    lease = claimed(ledger, "w", generation)
    told = reported(ledger, "one", lease)

    def again() -> Contribution | Refused:
        return ledger.report("one", [lease], base=None, path="one.safetensors", checksum="sum of one")

    before = frozen(ledger)
    assert again() == told and frozen(ledger) == before
    assert isinstance(commit(ledger, 1, None, "one"), Round)
    before = frozen(ledger)
    late = again()
    assert isinstance(late, Contribution) and late.round == 1 and frozen(ledger) == before
    other = ledger.report("one", [lease], base=None, path="one.safetensors", checksum="another")
    assert isinstance(other, Refused) and "before" in other.reason and frozen(ledger) == before
    ledger.rollback(None)
    before = frozen(ledger)
    assert isinstance(again(), Refused) and frozen(ledger) == before


def test_a_report_on_a_round_that_does_not_count_is_refused(ledger: Ledger) -> None:
    generation = ledger.start_worker("w")
    lease = claimed(ledger, "w", generation)
    refused = ledger.report("foreign", [lease], base=5, path="p", checksum="c")
    assert isinstance(refused, Refused) and "round 5" in refused.reason


def test_a_round_takes_in_its_contributions_in_order(ledger: Ledger) -> None:
    generation = ledger.start_worker("w")
    for name in ("a", "b", "c"):
        reported(ledger, name, claimed(ledger, "w", generation))
    first = commit(ledger, 1, None, "b", "a")
    assert first == Round(1, None, "anchor 1", "sum 1", 20, 20) == ledger.head
    assert [one.name for one in ledger.contributions_of(1)] == ["b", "a"]
    assert [one.name for one in ledger.staged()] == ["c"]
    second = commit(ledger, 7, 1, "c")
    assert second == Round(7, 1, "anchor 7", "sum 7", 10, 30)
    assert list(ledger.lineage()) == [second, first] and list(violations(ledger)) == []
    assert states(ledger) == [(chunk, 0, 10, State.MERGED) for chunk in range(3)]


def test_a_round_may_refuse_some_in_the_same_breath(ledger: Ledger) -> None:
    generation = ledger.start_worker("w")
    for name in ("good", "bad"):
        reported(ledger, name, claimed(ledger, "w", generation))
    assert isinstance(commit(ledger, 1, None, "good", bad="its norm is 9 times the median"), Round)
    assert states(ledger) == [(0, 0, 10, State.MERGED), (1, 0, 10, State.PENDING)]
    assert ledger.contribution("bad") is None
    reported(ledger, "bad again", claimed(ledger, "w", generation))
    assert isinstance(commit(ledger, 2, 1, **{"bad again": "its norm is 8 times the median"}), Round)
    (aside,) = ledger.quarantined()
    assert aside.reason == "rejected 2 times; the last: its norm is 8 times the median"


def test_a_commit_compares_the_parent(ledger: Ledger) -> None:
    generation = ledger.start_worker("w")
    reported(ledger, "a", claimed(ledger, "w", generation))
    assert isinstance(commit(ledger, 1, None, "a"), Round)
    reported(ledger, "b", claimed(ledger, "w", generation))
    before = frozen(ledger)
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: commit(ledger, 2, None, "b"), "the head is round 1"),
        (lambda: commit(ledger, 2, 5, "b"), "the head is round 1"),
        (lambda: commit(ledger, 2, 1, "a"), "not staged"),
        (lambda: commit(ledger, 2, 1, "b", "b"), "twice"),
        (lambda: commit(ledger, 2, 1, "b", b="why"), "twice"),
        (lambda: commit(ledger, 2, 1, "b", c="why"), "not staged, or named twice: c"),
        (lambda: commit(ledger, 1, None, "b"), "committed already"),
    ]
    for call, reason in wrong:
        refused = call()
        assert isinstance(refused, Refused) and reason in refused.reason
    with pytest.raises(ValueError, match="above its parent"):
        commit(ledger, 0, 1, "b")
    assert frozen(ledger) == before


def test_a_doubled_commit_changes_nothing(ledger: Ledger) -> None:
    generation = ledger.start_worker("w")
    reported(ledger, "a", claimed(ledger, "w", generation))
    first = commit(ledger, 1, None, "a")
    assert isinstance(commit(ledger, 2, 1), Round)
    before = frozen(ledger)
    assert commit(ledger, 1, None, "a") == first and frozen(ledger) == before


def test_a_lost_file_is_no_rejection(ledger: Ledger) -> None:
    for number in range(4):
        generation = ledger.start_worker("w")
        name = f"report {number}"
        reported(ledger, name, claimed(ledger, "w", generation))
        assert ledger.reject(name, "its file is missing", lost=True) is None
        assert isinstance(ledger.reject(name, "its file is missing", lost=True), Refused)
        assert states(ledger) == [(0, 0, 10, State.PENDING)]
    assert ledger.quarantined() == []
    reported(ledger, "at last", claimed(ledger, "w", generation))
    ledger.reject("at last", "its file is missing", lost=True)
    assert [aside.failures for aside in ledger.quarantined()] == [5]


def test_what_is_merged_cannot_be_refused(ledger: Ledger) -> None:
    generation = ledger.start_worker("w")
    reported(ledger, "a", claimed(ledger, "w", generation))
    commit(ledger, 1, None, "a")
    assert isinstance(ledger.reject("a", "too late"), Refused)
    assert states(ledger) == [(0, 0, 10, State.MERGED)]


def grow(ledger: Ledger, rounds: int) -> list[Round]:
    """Rounds of one chunk each, and one contribution staged, one lease and one split lease on top."""
    generation = ledger.start_worker("w")
    made: list[Round] = []
    for number in range(1, rounds + 1):
        reported(ledger, f"report {number}", claimed(ledger, "w", generation))
        committed = commit(ledger, number, number - 1 or None, f"report {number}")
        assert isinstance(committed, Round)
        made.append(committed)
    reported(ledger, "staged", claimed(ledger, "w", generation))
    ledger.split(claimed(ledger, "w", generation), 3)
    return made


@pytest.mark.parametrize("to", [None, 1, 2])
def test_going_back_undoes_the_rounds_after(ledger: Ledger, to: int | None) -> None:
    made = grow(ledger, 3)
    kept = to or 0
    assert ledger.rollback(to) == made[kept:][::-1]
    assert ledger.head == (made[kept - 1] if kept else None) and list(ledger.lineage()) == made[:kept][::-1]
    found = standing(ledger)
    assert set(found.get(State.MERGED, {})) == {(chunk, at) for chunk in range(kept) for at in range(10)}
    assert set(found) <= {State.MERGED, State.PENDING} and ledger.staged() == []
    assert all(one.failures == 0 for one in ledger.quarantined()) and list(violations(ledger)) == []
    assert isinstance(ledger.claim("w", 1, linear), Refused)  # its weights rest on what does not count any longer
    generation = ledger.start_worker("w")
    chunks = [claimed(ledger, "w", generation, None).chunk for _ in range(6 - kept)]
    assert chunks == list(range(kept, 6))


def test_going_back_to_where_one_is_changes_nothing(ledger: Ledger) -> None:
    grow(ledger, 2)
    before = frozen(ledger)
    assert ledger.rollback(2) == [] and frozen(ledger) == before
    refused = ledger.rollback(9)
    assert isinstance(refused, Refused) and "round 9" in refused.reason and frozen(ledger) == before


def test_a_round_undone_may_come_again_with_another_content(ledger: Ledger) -> None:
    grow(ledger, 2)
    ledger.rollback(1)
    generation = ledger.start_worker("v")
    reported(ledger, "report 2", claimed(ledger, "v", generation), claimed(ledger, "v", generation))
    again = commit(ledger, 2, 1, "report 2")
    assert isinstance(again, Round) and (again.sequences, again.total_sequences) == (20, 30)
    assert list(violations(ledger)) == []


def test_going_back_over_an_epochs_end(ledger: Ledger) -> None:
    generation = ledger.start_worker("w")
    for number in range(1, 10):  # six chunks to an epoch
        reported(ledger, f"report {number}", claimed(ledger, "w", generation))
        commit(ledger, number, number - 1 or None, f"report {number}")
    assert ledger.complete(0) and ledger.epoch == 1
    ledger.rollback(4)
    assert not ledger.complete(0) and ledger.epoch == 0
    generation = ledger.start_worker("w")
    leases = [claimed(ledger, "w", generation) for _ in range(9)]
    assert [(lease.epoch, lease.chunk) for lease in leases] == [
        (0, 4),
        (0, 5),
        *[(1, chunk) for chunk in range(6)],
        (2, 0),
    ]


def test_the_newest_valid_ancestor_is_one_expression(ledger: Ledger) -> None:
    """Invariant 7: where the head's anchor is broken, recovery takes the newest whose file is as it was."""
    grow(ledger, 3)
    whole = next((one for one in ledger.lineage() if one.anchor != "anchor 3"), None)
    assert whole is not None
    ledger.rollback(whole.round)
    assert ledger.head == whole
