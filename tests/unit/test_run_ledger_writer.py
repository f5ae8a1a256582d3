"""The ledger of a run on text beside its checkpoints: one saved again, and one that never came into its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from hrm_ray.data.catalog import Catalog
from hrm_ray.data.stream import ConsumedRange, append_ranges
from hrm_ray.ledger import State, read_ledger
from hrm_ray.ledger.verify import violations
from hrm_ray.rundir import RunDir
from hrm_ray.train.ledger_writer import LedgerWriter, ResumePoint


def opened(root: Path, resume_point: ResumePoint | None = None) -> LedgerWriter:
    return LedgerWriter(RunDir(root), Catalog(root / "none", writes=False), 0, resume_point)


def part(chunk: int, start: int, end: int, sequences: int = 20, skipped: bool = False) -> ConsumedRange:
    return ConsumedRange(0, 0, chunk, chunk, sequences, start, end, skipped)


def merged(root: Path) -> int:
    """Sequences that the weights have learned, in a ledger that must hold."""
    with read_ledger(RunDir(root).ledger) as ledger:
        assert list(violations(ledger)) == []
        assert ledger.head is not None
        return ledger.head.total_sequences


def test_stretches_that_follow_each_other_are_one() -> None:
    ranges = [part(0, 0, 5)]
    append_ranges(ranges, [part(0, 5, 9), part(1, 0, 3), part(1, 4, 6), part(1, 6, 8, skipped=True)])
    assert ranges == [part(0, 0, 9), part(1, 0, 3), part(1, 4, 6), part(1, 6, 8, skipped=True)]


@pytest.mark.parametrize("dies", [False, True])
def test_sequences_of_skipped_updates_are_not_merged(tmp_path: Path, dies: bool) -> None:
    """In the middle of a chunk, over its end, and as all of a round; going back makes them PENDING like the others."""
    writer = opened(tmp_path)
    ranges = [part(0, 0, 5), part(0, 5, 8, skipped=True), part(0, 8, 18), part(0, 18, 20, skipped=True)]
    ranges.append(part(1, 0, 2, skipped=True))
    writer.commit(3, writer.covered(3, ranges), "third", data_ended=False)
    writer.commit(4, writer.covered(4, [part(1, 2, 20, skipped=True)]), "fourth", data_ended=True)
    writer.close()
    assert merged(tmp_path) == 15
    with read_ledger(RunDir(tmp_path).ledger) as ledger:
        assert ledger.skipped() == {3: 7, 4: 18}
        counts = ledger.counts()[0]
        assert {state: count.sequences for state, count in counts.states.items()} == {
            State.MERGED: 15,
            State.SKIPPED: 25,
        }
        assert counts.complete, "nothing is left of the epoch"
        assert list(violations(ledger, {3: (15, 7), 4: (15, 25)})) == []
        assert list(violations(ledger, {3: (None, None)})) == [], "an older checkpoint has no counts"
        assert ["15 sequences are MERGED" in one for one in violations(ledger, {3: (15, 7), 4: (12, 25)})] == [True]
        assert ["25 sequences are SKIPPED" in one for one in violations(ledger, {4: (15, 28)})] == [True]
    if dies:
        writer = opened(tmp_path, ResumePoint(3, "third", tuple(ranges)))
        writer.commit(4, writer.covered(4, [part(1, 2, 20)]), "again", data_ended=True)
        writer.close()
        assert merged(tmp_path) == 33


@pytest.mark.parametrize("dies", [False, True])
def test_a_checkpoint_that_is_saved_again_in_mid_chunk(tmp_path: Path, dies: bool) -> None:
    """Steps that were skipped in between took rows too. Where the run dies before the new files are in their place, it
    goes on from the old ones, and what they do not have is trained again."""
    ledger_writer = opened(tmp_path)
    first = ledger_writer.covered(3, [part(0, 0, 5)])
    ledger_writer.commit(3, first, "first", data_ended=False)
    again = ledger_writer.covered(3, [part(0, 5, 8)])
    assert again == [part(0, 0, 8)]
    ledger_writer.commit(3, again, "again", data_ended=False)
    ledger_writer.close()
    assert merged(tmp_path) == 8
    there = ResumePoint(3, "first", tuple(first)) if dies else ResumePoint(3, "again", tuple(again))
    ledger_writer = opened(tmp_path, there)
    begin = 5 if dies else 8
    ledger_writer.commit(6, ledger_writer.covered(6, [part(0, begin, 20), part(1, 0, 4)]), "sixth", data_ended=False)
    ledger_writer.close()
    assert merged(tmp_path) == 24


def test_a_checkpoint_that_never_came_into_its_place(tmp_path: Path) -> None:
    ledger_writer = opened(tmp_path)
    ledger_writer.commit(3, [part(0, 0, 5)], "third", data_ended=False)
    ledger_writer.commit(6, [part(0, 5, 20), part(1, 0, 2)], "sixth", data_ended=False)
    ledger_writer.close()
    ledger_writer = opened(tmp_path, ResumePoint(3, "third", (part(0, 0, 5),)))
    ledger_writer.commit(6, ledger_writer.covered(6, [part(0, 5, 20), part(1, 0, 20)]), "other", data_ended=True)
    ledger_writer.close()
    assert merged(tmp_path) == 40


def test_a_chunk_without_a_sequence_is_done_too(tmp_path: Path) -> None:
    ledger_writer = opened(tmp_path)
    covered = [part(0, 0, 20), part(1, 0, 0, sequences=0), part(2, 0, 20)]
    ledger_writer.commit(1, covered, "first", data_ended=True)
    ledger_writer.close()
    assert merged(tmp_path) == 40
    with read_ledger(RunDir(tmp_path).ledger) as ledger:
        assert ledger.complete(0)
