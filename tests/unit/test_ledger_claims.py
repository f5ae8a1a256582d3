"""Who gets what: blocks as they become known, the order of claims, epochs, keys, leases that run out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hrm_ray.data.order import epoch_order
from hrm_ray.errors import DataError
from hrm_ray.ledger import BlockLength, Idle, Lease, Ledger, LedgerBlock, Refused, Span, State, open_ledger
from hrm_ray.ledger.states import MAX_ATTEMPTS
from tests.support.ledgers import claimed, ledger_of, linear, reported, states


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def finish(ledger: Ledger, *leases: Lease) -> None:
    """Report leases and commit them in a round of their own."""
    head = ledger.head
    parent = None if head is None else head.round
    number = 1 if parent is None else parent + 1
    reported(ledger, f"report {number}", *leases)
    ledger.commit(number, parent=parent, accepted=[f"report {number}"], anchor="a", checksum="c")


def test_blocks_number_their_chunks_on(path: Path) -> None:
    with ledger_of(path, [3, 0, 2], ended=False) as ledger:
        assert ledger.chunks == 5
        assert ledger.block_of(2) == LedgerBlock(0, 0, 3, True)
        assert ledger.block_of(3) == LedgerBlock(2, 3, 2, True)
        ledger.add_blocks([BlockLength(3, 1, sealed=False)])
        ledger.add_blocks([BlockLength(3, 4, sealed=False), BlockLength(3, 6), BlockLength(4, 1)])
        assert ledger.blocks()[3:] == [LedgerBlock(3, 5, 6, True), LedgerBlock(4, 11, 1, True)]
        for chunk in (-1, 12):
            with pytest.raises(ValueError, match=f"chunk {chunk}"):
                ledger.block_of(chunk)


def test_a_resumed_run_may_tell_the_same_blocks_again(path: Path) -> None:
    told = [BlockLength(0, 3), BlockLength(1, 2, sealed=False)]
    with open_ledger(path, durable=False) as ledger:
        ledger.add_blocks(told)
    with open_ledger(path, durable=False) as ledger:
        ledger.add_blocks(told)
        ledger.add_blocks([BlockLength(0, 2, sealed=False), BlockLength(0, 3), BlockLength(1, 2), BlockLength(1, 2)])
        ledger.end_data()
        ledger.add_blocks([BlockLength(0, 3), BlockLength(1, 2)])
        assert [block.chunks for block in ledger.blocks()] == [3, 2]


@pytest.mark.parametrize(
    ("told", "before"),
    [
        (BlockLength(0, 4), "3 chunks"),
        (BlockLength(0, 4, sealed=False), "3 chunks"),
        (BlockLength(0, 2), "3 chunks"),
        (BlockLength(1, 1, sealed=False), "2 chunks"),
    ],
)
def test_data_that_changed_is_refused(path: Path, told: BlockLength, before: str) -> None:
    with ledger_of(path, [3], ended=False) as ledger:
        ledger.add_blocks([BlockLength(1, 2, sealed=False)])
        with pytest.raises(DataError, match=rf"block {told.block} with {told.chunks} chunks.*{before} before"):
            ledger.add_blocks([told])
        assert ledger.chunks == 5


def test_blocks_out_of_turn_and_after_the_end(path: Path) -> None:
    with ledger_of(path, [3], ended=False) as ledger:
        with pytest.raises(ValueError, match="block 2"):
            ledger.add_blocks([BlockLength(2, 1)])
        ledger.add_blocks([BlockLength(1, 1, sealed=False)])
        with pytest.raises(ValueError, match="block 2"):
            ledger.add_blocks([BlockLength(2, 1)])
        with pytest.raises(ValueError, match="open block"):
            ledger.end_data()
        ledger.add_blocks([BlockLength(1, 1)])
        ledger.end_data()
        with pytest.raises(DataError, match="ended with block 1"):
            ledger.add_blocks([BlockLength(2, 1)])


def test_a_lease_says_what_and_where(path: Path) -> None:
    with ledger_of(path, [2, 3]) as ledger:
        generation = ledger.start_worker("w")
        lease = ledger.claim("w", generation, lambda epoch, position: 4 - position, now_s=5.0, lease_s=60.0)
        assert lease == Lease("w", 1, 1, 0, 0, 1, 2, 4, 0, None, 65.0)
        ledger.measure(4, 12)
        assert ledger.leases("w") == [lease.measured(12)] and ledger.leases("w")[0].end == 12
        assert ledger.lease_at(0, 4, 0) == lease.measured(12) and ledger.lease_at(0, 3, 0) is None


def test_chunks_come_in_a_keyed_order_and_returned_ones_first(path: Path) -> None:
    count = 40

    def order(epoch: int, position: int) -> int:
        return int(epoch_order(3, epoch, count, linear=False).at(np.array([position]))[0])

    with ledger_of(path, [25, 15]) as ledger:
        generation = ledger.start_worker("w")
        leases = [ledger.claim("w", generation, order) for _ in range(10)]
        assert [lease.chunk for lease in leases if isinstance(lease, Lease)] == [order(0, at) for at in range(10)]
        for number in (7, 2, 5):
            assert ledger.release(leases[number]) is None  # type: ignore[arg-type]
        again = [ledger.claim("w", generation, order) for _ in range(4)]
        assert [lease.position for lease in again if isinstance(lease, Lease)] == [2, 5, 7, 10]


def test_an_order_that_is_none_is_found(path: Path) -> None:
    with ledger_of(path, [3]) as ledger:
        generation = ledger.start_worker("w")
        claimed(ledger, "w", generation)
        for wrong in (lambda epoch, position: 0, lambda epoch, position: 3, lambda epoch, position: -1):
            with pytest.raises(ValueError, match="order of epoch 0 has chunk"):
                ledger.claim("w", generation, wrong)
        assert ledger.counts()[0].untouched == 2


def test_data_of_unknown_length_is_claimed_as_it_comes(path: Path) -> None:
    with open_ledger(path, durable=False) as ledger:
        generation = ledger.start_worker("w")
        assert ledger.claim("w", generation, linear) is Idle.MORE_DATA
        ledger.add_blocks([BlockLength(0, 1, sealed=False)])
        first = claimed(ledger, "w", generation)
        assert ledger.claim("w", generation, linear, epochs=1) is Idle.MORE_DATA
        finish(ledger, first)
        assert not ledger.complete(0)
        ledger.add_blocks([BlockLength(0, 2)])
        assert ledger.claim("w", generation, lambda epoch, position: None) is Idle.MORE_DATA
        second = claimed(ledger, "w", generation)
        assert ledger.claim("w", generation, linear, epochs=1) is Idle.MORE_DATA
        ledger.end_data()
        assert ledger.claim("w", generation, linear, epochs=1) is Idle.OTHERS
        finish(ledger, second)
        assert ledger.complete(0) and ledger.claim("w", generation, linear, epochs=1) is Idle.DONE


def test_data_without_chunks_is_done(path: Path) -> None:
    with ledger_of(path, [0, 0]) as ledger:
        assert ledger.claim("w", ledger.start_worker("w"), linear) is Idle.DONE


def test_the_next_epoch_claims_nothing_while_this_one_has_pending_chunks(path: Path) -> None:
    with ledger_of(path, [2]) as ledger:
        generation = ledger.start_worker("w")
        first, second = claimed(ledger, "w", generation), claimed(ledger, "w", generation)
        third = claimed(ledger, "w", generation)
        assert (third.epoch, third.chunk, ledger.epoch) == (1, 0, 0)  # all of epoch 0 is held: nothing waits
        ledger.release(second)
        assert claimed(ledger, "w", generation).epoch == 0
        assert claimed(ledger, "w", generation).epoch == 1
        finish(ledger, first, *[lease for lease in ledger.leases("w") if lease.epoch == 0 and lease.chunk == 1])
        assert ledger.complete(0) and ledger.epoch == 1 and not ledger.complete(1)


def test_every_epoch_starts_all_chunks_again(path: Path) -> None:
    with ledger_of(path, [2, 1]) as ledger:
        generation = ledger.start_worker("w")
        seen: list[tuple[int, int]] = []
        while isinstance(lease := ledger.claim("w", generation, linear, epochs=3), Lease):
            ledger.measure(lease.chunk, 4)
            seen.append((lease.epoch, lease.chunk))
            finish(ledger, lease.measured(4))
        assert lease is Idle.DONE
        assert seen == [(epoch, chunk) for epoch in range(3) for chunk in range(3)]
        assert [counts.complete for counts in ledger.counts()] == [True] * 3 and ledger.epoch == 3
        assert ledger.head is not None and ledger.head.total_sequences == 36


def test_an_epoch_that_is_not_asked_for_is_left_alone(path: Path) -> None:
    with ledger_of(path, [1]) as ledger:
        generation = ledger.start_worker("w")
        finish(ledger, claimed(ledger, "w", generation))
        ledger.release(claimed(ledger, "w", generation))
        assert ledger.claim("w", generation, linear, epochs=1) is Idle.DONE
        assert claimed(ledger, "w", generation, epochs=2).epoch == 1


def test_the_first_epoch_may_start_later(path: Path) -> None:
    with ledger_of(path, [4]) as ledger:
        ledger.start_at(3)
        ledger.start_at(3)
        generation = ledger.start_worker("w")
        first = ledger.claim("w", generation, lambda epoch, position: position + (3 if epoch == 0 else 0))
        assert isinstance(first, Lease) and (first.epoch, first.position, first.chunk) == (0, 0, 3)
        with pytest.raises(ValueError, match="chunk 3, not 2"):
            ledger.start_at(2)
        second = ledger.claim("w", generation, linear)
        assert isinstance(second, Lease) and (second.epoch, second.chunk) == (1, 0)
        assert [(counts.chunks, counts.untouched) for counts in ledger.counts()] == [(1, 0), (4, 3)]


def test_a_chunk_before_the_start_is_outside_the_order(path: Path) -> None:
    with ledger_of(path, [4]) as ledger:
        ledger.start_at(2)
        with pytest.raises(ValueError, match=r"outside 2\.\.3"):
            ledger.claim("w", ledger.start_worker("w"), linear)


def test_a_measure_ends_the_ranges_of_all_epochs_and_stays(path: Path) -> None:
    with ledger_of(path, [1]) as ledger:
        generation = ledger.start_worker("w")
        open_ended = claimed(ledger, "w", generation, None)
        ledger.measure(0, 7)
        ledger.measure(0, 7)
        assert claimed(ledger, "w", generation, None).end == 7
        assert states(ledger) == [(0, 0, 7, State.LEASED)] == states(ledger, 1)
        with pytest.raises(DataError, match="chunk 0.*6 packed sequences, but had 7"):
            ledger.measure(0, 6)
        for chunk, sequences in ((1, 3), (0, -1)):
            with pytest.raises(ValueError, match=f"chunk {chunk}"):
                ledger.measure(chunk, sequences)
        assert reported(ledger, "open ended", open_ended).sequences == 7


def test_a_chunk_without_sequences_goes_the_same_way(path: Path) -> None:
    with ledger_of(path, [2]) as ledger:
        generation = ledger.start_worker("w")
        finish(ledger, claimed(ledger, "w", generation, 0), claimed(ledger, "w", generation, 3))
        assert states(ledger) == [(0, 0, 0, State.MERGED), (1, 0, 3, State.MERGED)]
        assert ledger.complete(0) and Span(0, 0, 0, 0).sequences == 0


def test_the_same_key_gives_the_same_lease(path: Path) -> None:
    with ledger_of(path, [3]) as ledger:
        generation = ledger.start_worker("w")
        lease = ledger.claim("w", generation, linear, key="one")
        assert ledger.claim("w", generation, linear, key="one") == lease
        assert isinstance(lease, Lease) and isinstance(other := claimed(ledger, "w", generation, key="two"), Lease)
        assert other.chunk == 1
        ledger.release(lease)
        late = ledger.claim("w", generation, linear, key="one")
        assert isinstance(late, Refused) and "one" in late.reason
        assert claimed(ledger, "w", generation, key="three").chunk == 0
        assert isinstance(ledger.claim("w", generation, linear, key="one"), Refused)


def test_a_generation_that_is_over_gets_nothing(path: Path) -> None:
    with ledger_of(path, [3]) as ledger:
        assert isinstance(ledger.claim("w", 1, linear), Refused)
        generation = ledger.start_worker("w")
        lease = claimed(ledger, "w", generation)
        assert ledger.start_worker("w") == generation + 1
        for answer in (
            ledger.claim("w", generation, linear),
            ledger.renew(lease, 0.0, 9.0),
            ledger.release(lease),
            ledger.split(lease, 5),
            ledger.report("late", [lease], base=None, path="p", checksum="c"),
        ):
            assert isinstance(answer, Refused)
        assert states(ledger) == [(0, 0, 10, State.PENDING)]
        again = claimed(ledger, "w", generation + 1)
        assert (again.chunk, again.attempt) == (0, 2)
        ledger.stop_worker("w", generation, "a late report of its death")
        assert ledger.leases("w") == [again]
        ledger.stop_worker("w", generation + 1)
        assert ledger.leases("w") == [] and isinstance(ledger.claim("w", generation + 1, linear), Refused)


def test_leases_run_out_on_the_callers_clock(path: Path) -> None:
    with ledger_of(path, [3]) as ledger:
        one, two = ledger.start_worker("one"), ledger.start_worker("two")
        lease = claimed(ledger, "one", one, now_s=100.0, lease_s=60.0)
        assert ledger.expire(159.9) == []
        renewed = ledger.renew(lease, 150.0, 60.0)
        assert isinstance(renewed, Lease) and renewed.expiry_s == 210.0
        assert claimed(ledger, "two", two, now_s=209.0, lease_s=60.0).chunk == 1
        taken = claimed(ledger, "two", two, now_s=210.0, lease_s=60.0)
        assert (taken.chunk, taken.attempt) == (0, 2)
        assert isinstance(ledger.renew(lease, 211.0, 60.0), Refused)
        assert [held.worker for held in ledger.expire(1000.0)] == ["two", "two"]


def test_a_lease_that_ran_out_still_counts_until_it_is_taken_back(path: Path) -> None:
    with ledger_of(path, [3]) as ledger:
        generation = ledger.start_worker("w")
        lease = claimed(ledger, "w", generation, now_s=0.0, lease_s=60.0)
        assert reported(ledger, "late but alone", lease).sequences == 10
        assert ledger.expire(1000.0) == []


@pytest.mark.parametrize("end", ["expired", "died", "started again"])
def test_a_chunk_that_kills_its_workers_is_put_aside_and_may_be_requeued(path: Path, end: str) -> None:
    with ledger_of(path, [2]) as ledger:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            generation = ledger.start_worker("w")
            lease = claimed(ledger, "w", generation, now_s=0.0, lease_s=1.0)
            assert (lease.chunk, lease.attempt) == (0, attempt)
            if end == "expired":
                ledger.expire(1.0)
            elif end == "died":
                ledger.stop_worker("w", generation, "the worker died: out of memory")
            else:
                ledger.start_worker("w")
        (aside,) = ledger.quarantined()
        assert aside.reason is not None and end in aside.reason
        generation = ledger.start_worker("w")
        finish(ledger, claimed(ledger, "w", generation))
        assert ledger.complete(0)
        ledger.requeue([aside])
        assert not ledger.complete(0) and claimed(ledger, "w", generation).chunk == 0


def test_orderly_stops_never_put_a_chunk_aside(path: Path) -> None:
    for number in range(2 * MAX_ATTEMPTS):
        with ledger_of(path, [2]) as ledger:
            generation = ledger.start_worker("w")
            assert claimed(ledger, "w", generation).attempt == 2 * number + 1
            ledger.stop_worker("w", generation)
            generation = ledger.start_worker("w")
            claimed(ledger, "w", generation)
    with open_ledger(path, durable=False) as ledger:
        assert states(ledger) == [(0, 0, 10, State.PENDING)] and ledger.quarantined() == []


def test_a_split_keeps_the_part_and_frees_the_rest(path: Path) -> None:
    with ledger_of(path, [1]) as ledger:
        one, two = ledger.start_worker("one"), ledger.start_worker("two")
        lease = claimed(ledger, "one", one)
        first = ledger.split(lease, 4)
        assert isinstance(first, Lease) and (first.start, first.end, first.attempt) == (0, 4, 1)
        assert states(ledger) == [(0, 0, 4, State.LEASED), (0, 4, 10, State.PENDING)]
        assert ledger.split(lease, 4) == first
        assert isinstance(ledger.split(lease, 3), Refused)  # it goes to 4 only, by now
        rest = claimed(ledger, "two", two)
        assert (rest.start, rest.end, rest.attempt) == (4, 10, 2)
        finish(ledger, first)
        finish(ledger, rest)
        assert ledger.complete(0)


def test_pieces_that_came_back_are_given_out_as_one(path: Path) -> None:
    with ledger_of(path, [1]) as ledger:
        generation = ledger.start_worker("w")
        first = ledger.split(claimed(ledger, "w", generation), 4)
        second = ledger.split(claimed(ledger, "w", generation), 7)
        assert isinstance(first, Lease) and isinstance(second, Lease)
        ledger.release(first)
        ledger.release(second)
        whole = claimed(ledger, "w", generation)
        assert (whole.start, whole.end, whole.attempt) == (0, 10, 3)
        assert states(ledger) == [(0, 0, 10, State.LEASED)]
