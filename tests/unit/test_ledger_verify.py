"""Verification names what is wrong, and the export says where everything stands, briefly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hrm_ray.ledger import BlockLength, Lease, Ledger, State, open_ledger
from hrm_ray.ledger.export import document, export
from hrm_ray.ledger.verify import violations
from tests.support.ledgers import claimed, ledger_of, reported


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Two blocks of three chunks: two rounds of one chunk, a quarantined chunk, a report, a split lease."""
    ledger = ledger_of(tmp_path / "ledger.sqlite", [3, 3])
    generation = ledger.start_worker("w")
    for number in (1, 2):
        reported(ledger, f"report {number}", claimed(ledger, "w", generation))
        ledger.commit(number, parent=number - 1 or None, accepted=[f"report {number}"], anchor="a", checksum="c")
    for number in (1, 2):
        reported(ledger, f"bad {number}", claimed(ledger, "w", generation))
        ledger.reject(f"bad {number}", "it raised the loss")
    reported(ledger, "staged", claimed(ledger, "w", generation))
    lease = ledger.split(claimed(ledger, "w", generation), 4)
    assert isinstance(lease, Lease)
    return ledger


DAMAGE = [
    ("DELETE FROM ranges WHERE chunk = 4 AND start = 0", "chunk 4: sequences 0 to 4 are in no range"),
    ("UPDATE ranges SET start = 3 WHERE chunk = 4 AND start = 4", "chunk 4: sequences 3 to 4 are in two ranges"),
    ("UPDATE ranges SET end = 9 WHERE chunk = 4 AND start = 4", "chunk 4: its ranges end at 9, but it has 10"),
    ("UPDATE ranges SET end = NULL WHERE chunk = 3", "ends at None, but the chunk has 10"),
    ("DELETE FROM ranges WHERE chunk = 3", "1 of the 5 positions given out have no range"),
    ("UPDATE ranges SET position = 0 WHERE chunk = 4 AND start = 4", "its sequences from 4 are at position 0, not 4"),
    ("UPDATE ranges SET position = 4, start = 1 WHERE chunk = 3", "position 4 is another chunk's"),
    ("UPDATE ranges SET position = 77 WHERE chunk = 3", "position 77 is another chunk's, or was not given out"),
    ("UPDATE ranges SET chunk = 17 WHERE chunk = 3", "chunk 17: no block has it"),
    ("UPDATE ranges SET state = 3 WHERE state = 2", "it is MERGED, but its contribution was accepted by no round"),
    ("UPDATE ranges SET state = 2 WHERE chunk = 0", "it is TRAINED, but its contribution was accepted by round 1"),
    ("UPDATE ranges SET state = 0 WHERE chunk = 0", "it is PENDING with worker None and contribution 1"),
    ("UPDATE ranges SET worker = NULL WHERE state = 1", "it is LEASED with worker None"),
    ("UPDATE ranges SET contribution = 99 WHERE chunk = 0", "by contribution 99, which does not exist"),
    ("UPDATE contributions SET round = NULL WHERE number = 2", "its contribution was accepted by no round"),
    ("UPDATE contributions SET round = 9 WHERE number = 2", "contribution report 2 was accepted by round 9"),
    ("UPDATE rounds SET sequences = 11 WHERE round = 2", "round 2 counts 11 sequences, but 10 are merged"),
    (
        "UPDATE rounds SET sequences = 11 WHERE round = 2",
        "20 sequences are merged, but the rounds of the lineage count",
    ),
    ("UPDATE rounds SET total_sequences = 5 WHERE round = 2", "round 2 says 5 sequences in all, not 20"),
    ("UPDATE facts SET value = 1 WHERE name = 'head'", "round 2 is not in the lineage"),
    ("UPDATE facts SET value = 7 WHERE name = 'head'", "the head is round 7, which does not exist"),
    ("UPDATE rounds SET parent = 2 WHERE round = 1", "round 1 says 10 sequences in all, not 30"),
    ("DELETE FROM rounds WHERE round = 1", "round 2 has the parent 1, which does not exist"),
    ("UPDATE blocks SET sealed = 0 WHERE block = 1", "block 1 is open"),
    ("UPDATE blocks SET first_chunk = 4 WHERE block = 1", "block 1 begins with chunk 4"),
]


def test_a_sound_ledger_has_no_violations(ledger: Ledger) -> None:
    assert list(violations(ledger)) == []


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE, ids=[damage for damage, _ in DAMAGE])
def test_every_violation_is_a_sentence(ledger: Ledger, damage: str, sentence: str) -> None:
    ledger.database.rows(damage)
    found = list(violations(ledger))
    assert any(sentence in one for one in found), found
    assert len(found) <= 7


def test_the_export_is_what_people_want_to_know(ledger: Ledger, tmp_path: Path) -> None:
    place = tmp_path / "chunk_tracker_state.json"
    export(ledger, place)
    found = json.loads(place.read_text(encoding="utf-8"))
    assert found == document(ledger)
    assert (found["epoch"], found["chunks"], found["data_ended"], found["head"]) == (0, 6, True, 2)
    assert found["blocks"] == [{"block": "0-1", "chunks": 3, "sealed": True}]
    assert [one["round"] for one in found["rounds"]] == [2, 1]
    (epoch,) = found["epochs"]
    assert (epoch["chunks"], epoch["untouched"], epoch["complete"]) == (6, 1, False)
    assert epoch["states"] == {
        "PENDING": {"ranges": 1, "sequences": 6, "chunks": ["4[4:10]"]},
        "LEASED": {"ranges": 1, "sequences": 4, "chunks": ["4[0:4]"]},
        "TRAINED": {"ranges": 1, "sequences": 10, "chunks": ["3"]},
        "MERGED": {"ranges": 2, "sequences": 20, "chunks": ["0-1"]},
        "QUARANTINED": {"ranges": 1, "sequences": 10, "chunks": ["2"]},
    }
    reason = "rejected 2 times; the last: it raised the loss"
    assert found["quarantined"] == [{"epoch": 0, "range": "2[0:10]", "reason": reason}]


def test_counts_are_by_epoch_and_state(ledger: Ledger) -> None:
    (counts,) = ledger.counts()
    assert {state: (one.ranges, one.sequences) for state, one in counts.states.items()} == {
        **{State.PENDING: (1, 6), State.LEASED: (1, 4), State.TRAINED: (1, 10)},
        **{State.MERGED: (2, 20), State.QUARANTINED: (1, 10)},
    }


def test_long_lists_are_cut_and_say_so(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger.sqlite", durable=False) as ledger:
        ledger.add_blocks(BlockLength(number, 1 + number % 2) for number in range(3000))
        ledger.end_data()
        generation = ledger.start_worker("w")
        with ledger.database.transaction():
            for position in range(2200):
                lease = ledger.claim("w", generation, lambda epoch, position: 2 * position)
                assert isinstance(lease, Lease)
                ledger.measure(lease.chunk, 3)
        found = document(ledger)
        leased = found["epochs"][0]["states"]["LEASED"]
        assert len(leased["chunks"]) == 1000 and leased["chunks_left_out"] == 1200
        assert len(found["blocks"]) == 1000 and found["blocks_left_out"] == 2000
        assert len(json.dumps(found)) < 200_000


def test_a_chunk_in_one_state_is_named_whole_however_it_is_cut(tmp_path: Path) -> None:
    with ledger_of(tmp_path / "ledger.sqlite", [3]) as ledger:
        generation = ledger.start_worker("w")
        first = ledger.split(claimed(ledger, "w", generation), 4)
        assert isinstance(first, Lease)
        reported(ledger, "one", first)
        reported(ledger, "two", claimed(ledger, "w", generation), claimed(ledger, "w", generation))
        claimed(ledger, "w", generation, None)
        states = document(ledger)["epochs"][0]["states"]
        assert states["TRAINED"]["chunks"] == ["0-1"] and states["TRAINED"]["ranges"] == 3
        assert states["LEASED"]["chunks"] == ["2"]
