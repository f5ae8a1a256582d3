"""Any sequence of calls: the ledger answers as one that keeps every sequence by itself, and its invariants hold."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hrm_ray.ledger import BlockLength, Idle, Lease, Refused, Span, State, open_ledger
from hrm_ray.ledger import ranges as rows
from hrm_ray.ledger.verify import violations
from tests.support.naive_ledger import Given, NaiveLedger

WORKERS = st.sampled_from(["a", "b"])
EPOCHS = 2


class LedgerMachine(RuleBasedStateMachine):
    """The real ledger beside the naive one, told the same."""

    @initialize(
        lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
        shift=st.integers(0, 4),
        per_block=st.integers(1, 3),
    )
    def open(self, lengths: list[int], shift: int, per_block: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.ledger = open_ledger(self.folder / "ledger.sqlite", durable=False)
        self.lengths, self.shift = lengths, shift
        blocks = [min(per_block, len(lengths) - at) for at in range(0, len(lengths), per_block)]
        self.ledger.add_blocks(BlockLength(number, chunks) for number, chunks in enumerate(blocks))
        self.ledger.end_data()
        chunks = len(lengths)
        self.naive = NaiveLedger([lengths[self.order(0, position)] for position in range(chunks)], EPOCHS)
        self.now_s = 0.0
        self.number = 0
        self.leases: list[tuple[Lease, Given]] = []

    def order(self, epoch: int, position: int) -> int:
        return (position + self.shift) % len(self.lengths)

    def fresh(self) -> int:
        self.number += 1
        return self.number

    @rule(worker=WORKERS)
    def start_worker(self, worker: str) -> None:
        self.naive.start_worker(worker, self.ledger.start_worker(worker))

    @rule(worker=WORKERS, failed=st.booleans(), really=st.integers(0, 2))
    def stop_worker(self, worker: str, failed: bool, really: int) -> None:
        if worker in self.naive.generations and not really:
            self.ledger.stop_worker(worker, self.naive.generations[worker], "scripted" if failed else None)
            self.naive.stop_worker(worker, failed)

    @rule(worker=WORKERS)
    def claim_after_the_end(self, worker: str) -> None:
        late = self.naive.generations.get(worker, 1) - 1
        assert isinstance(self.ledger.claim(worker, late, self.order, epochs=EPOCHS, now_s=self.now_s), Refused)

    @rule(
        worker=WORKERS,
        lease_s=st.sampled_from([None, 3.0, 10.0]),
        passes_s=st.sampled_from([0.0, 0.0, 1.0, 4.0]),
        number=st.integers(1, 3),
    )
    def claim(self, worker: str, lease_s: float | None, passes_s: float, number: int) -> None:
        """Some claims; a worker that is not there starts first."""
        if worker not in self.naive.generations:
            self.start_worker(worker)
        self.now_s += passes_s
        for _ in range(number):
            self.claim_one(worker, lease_s)

    def claim_one(self, worker: str, lease_s: float | None) -> None:
        got = self.ledger.claim(
            *(worker, self.naive.generations[worker], self.order),
            **{"epochs": EPOCHS, "now_s": self.now_s, "lease_s": lease_s, "key": f"{self.fresh()}"},
        )
        expected = self.naive.claim(worker, self.now_s, lease_s)
        if expected is None:
            settled = {State.MERGED, State.SKIPPED, State.QUARANTINED}
            done = all(cell.state in settled for cell in self.naive.cells.values())
            assert got is (Idle.DONE if done else Idle.OTHERS)
            return
        assert isinstance(got, Lease)
        self.ledger.measure(got.chunk, self.lengths[got.chunk])
        got = got.measured(self.lengths[got.chunk])
        seen = (got.worker, got.generation, got.attempt), got.epoch, got.position, got.start, got.end
        assert seen == (expected.holder, expected.epoch, expected.position, expected.start, expected.end)
        assert got.chunk == self.order(got.epoch, got.position)
        assert self.ledger.block_of(got.chunk).first_chunk + got.chunk_in_block == got.chunk
        self.leases.append((got, expected))

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 99), longer_s=st.sampled_from([1.0, 9.0]))
    def renew(self, which: int, longer_s: float) -> None:
        lease, given = self.leases[which % len(self.leases)]
        renewed = self.ledger.renew(lease, self.now_s, longer_s)
        assert isinstance(renewed, Refused) != self.naive.renew(given, self.now_s + longer_s)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        lease, given = self.leases[which % len(self.leases)]
        assert (self.ledger.release(lease) is None) == self.naive.release(given)

    @precondition(lambda self: any(given.end - given.start > 1 for _, given in self.leases))
    @rule(which=st.integers(0, 99), part=st.integers(0, 99))
    def split(self, which: int, part: int) -> None:
        long = [(lease, given) for lease, given in self.leases if given.end - given.start > 1]
        lease, given = long[which % len(long)]
        at = given.start + 1 + part % (given.end - given.start - 1)
        first, expected = self.ledger.split(lease, at), self.naive.split(given, at)
        if expected is None:
            assert isinstance(first, Refused)
            return
        assert isinstance(first, Lease)
        assert (first.start, first.end, first.attempt) == (expected.start, expected.end, expected.holder[2])
        self.leases[self.leases.index((lease, given))] = first, expected

    @precondition(lambda self: self.leases)
    @rule(
        which=st.integers(0, 99),
        number=st.integers(1, 3),
        skip=st.integers(0, 2),
        stale=st.integers(0, 3),
        twice=st.booleans(),
    )
    def report(self, which: int, number: int, skip: int, stale: int, twice: bool) -> None:
        """Leases of one incarnation, the first `skip` of them of skipped updates; now and then with one that may be
        over."""
        held = [pair for pair in self.leases if stale == 0 or self.naive.holds(pair[1])] or self.leases
        first = held[which % len(held)]
        of_one = [pair for pair in held if pair[1].holder[:2] == first[1].holder[:2]]
        at = of_one.index(first)
        of_one = (of_one[at:] + of_one[:at])[:number]
        leases, expected = [lease for lease, _ in of_one], [given for _, given in of_one]
        name = f"report {self.fresh()}"
        base = self.naive.rounds[-1][0] if self.naive.rounds else None
        words = {"skipped": leases[:skip], "base": base, "path": "file", "checksum": "sum"}
        told = self.ledger.report(name, leases[skip:], **words)
        assert isinstance(told, Refused) != self.naive.report(name, expected[skip:], expected[:skip])
        if not isinstance(told, Refused):
            assert told.sequences == self.naive.learned(name)
            if twice:
                assert self.ledger.report(name, leases[skip:], **words) == told

    @precondition(lambda self: self.naive.staged)
    @rule(which=st.integers(0, 99), lost=st.booleans())
    def reject(self, which: int, lost: bool) -> None:
        name = self.naive.staged[which % len(self.naive.staged)]
        assert self.ledger.reject(name, "scripted", lost=lost) is None
        assert isinstance(self.ledger.reject(name, "scripted", lost=lost), Refused)
        self.naive.reject(name, lost)

    @precondition(lambda self: self.naive.staged)
    @rule(take=st.integers(0, 2), refuse=st.integers(0, 1), late=st.booleans())
    def commit(self, take: int, refuse: int, late: bool) -> None:
        staged = self.naive.staged
        accepted, rejected = staged[:take], staged[take : take + refuse]
        number = self.fresh()
        parent = self.naive.rounds[-1][0] if self.naive.rounds else None
        words = {"accepted": accepted, "rejected": dict.fromkeys(rejected, "scripted"), "anchor": "a", "checksum": "c"}
        if late:
            assert isinstance(self.ledger.commit(number, parent=-1, **words), Refused)
        made = self.ledger.commit(number, parent=parent, **words)
        assert not isinstance(made, Refused) and self.ledger.head == made
        assert self.ledger.commit(number, parent=parent, **words) == made
        self.naive.commit(number, accepted, rejected)

    @precondition(lambda self: self.naive.rounds)
    @rule(back=st.integers(1, 3))
    def rollback(self, back: int) -> None:
        names = [None, *[number for number, _ in self.naive.rounds]]
        assert self.ledger.rollback(names[-1]) == []
        to = names[max(-1 - back, -len(names))]
        undone = self.ledger.rollback(to)
        assert not isinstance(undone, Refused)
        assert [one.round for one in undone] == names[: names.index(to) : -1]
        self.naive.rollback(to)

    @rule()
    def reopen(self) -> None:
        self.ledger.close()
        self.ledger = open_ledger(self.folder / "ledger.sqlite", durable=False)
        self.naive.reopen()

    @rule()
    def requeue(self) -> None:
        self.ledger.requeue(self.ledger.quarantined())
        self.naive.requeue()

    @invariant()
    def every_sequence_is_where_the_naive_one_has_it(self) -> None:
        assert list(violations(self.ledger)) == []
        for epoch in range(EPOCHS):
            seen: set[tuple[int, int, int]] = set()
            for found in rows.of_epoch(self.ledger.database, epoch):
                span = Span(epoch, found.chunk, found.start, found.end or self.lengths[found.chunk])
                for at in range(span.start, span.end):
                    cell = self.naive.cells[epoch, found.position, at]
                    assert (found.state, found.attempt) == (cell.state, cell.attempt)
                    assert (found.failures, found.rejections) == (cell.failures, cell.rejections)
                    seen.add((epoch, found.position, at))
            for place, cell in self.naive.cells.items():
                if place[0] == epoch and place not in seen:
                    assert cell == type(cell)()
        merged = sum(cell.state is State.MERGED for cell in self.naive.cells.values())
        assert merged == (self.ledger.head.total_sequences if self.ledger.head is not None else 0)
        skipped = sum(cell.state is State.SKIPPED for cell in self.naive.cells.values())
        assert skipped == sum(self.ledger.skipped().values())

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40)
