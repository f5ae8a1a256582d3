"""A loader over claimed ranges takes each sample once and in order, whatever halts, and says what it took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.ledger import Lease
from hrm_ray.train.claimed_loader import ClaimedLoader
from hrm_ray.train.claimed_rows import PUZZLES_PER_CHUNK, TakenRange, puzzle_chunks, puzzles_of_chunk
from hrm_ray.train.loaders import BatchSize
from hrm_ray.types import Columns

Place = tuple[int, int, int]
"""Epoch, chunk, number of the sample in the chunk."""


class Numbered:
    """ClaimedRows whose samples are their places."""

    def read_ahead(self, lease: Lease) -> None: ...

    def is_read(self, lease: Lease) -> bool:
        return True

    def sequences(self, lease: Lease) -> int:
        return 100

    def columns(self, taken: Sequence[TakenRange], places: npt.NDArray[np.int64], rows: int) -> Columns:
        found = [(one.lease.epoch, one.lease.chunk, n) for one in taken for n in range(one.start, one.end)]
        assert len(found) == len(places) and (np.diff(places) > 0).all()
        inputs, active = np.full((rows, 3), -1), np.zeros(rows, dtype=bool)
        for place, row in zip(places.tolist(), found, strict=True):
            inputs[place], active[place] = row, True
        return {"inputs": inputs, "active": active}

    def keep(self, leases: Iterable[Lease]) -> None: ...

    def take_notes(self) -> list[str]:
        return []

    def close(self) -> None: ...


def lease_of(epoch: int, chunk: int, start: int, end: int) -> Lease:
    return Lease("0", 1, 1, epoch, chunk, 0, chunk, chunk, start, end, None)


LEASES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)), max_size=6)


@settings(max_examples=200, deadline=None)
@given(LEASES, st.integers(1, 3), st.integers(1, 3), st.booleans(), st.data())
def test_every_sample_once_and_in_order(
    drawn: list[tuple[int, int, int, int]], batch_size: int, accumulation: int, carried: bool, data: st.DataObject
) -> None:
    leases = sorted(
        {(epoch, chunk, start): (epoch, chunk, start, start + size) for epoch, chunk, start, size in drawn}.values()
    )
    rows, loader = Numbered(), ClaimedLoader(Numbered(), BatchSize(batch_size, accumulation, 0, 1), carried=carried)
    assert rows.take_notes() == []
    loader.replace(lease_of(*each) for each in reversed(leases))
    expected = [(epoch, chunk, n) for epoch, chunk, start, end in leases for n in range(start, end)]
    assert loader.left == len(expected)
    taken: list[Place] = []
    skipped: set[int] = set()
    while loader.left:
        loader.draining = data.draw(st.booleans()) if carried else False
        halted = np.ones((accumulation, batch_size), dtype=bool)
        if carried:
            halted = np.array(data.draw(st.lists(st.booleans(), min_size=halted.size, max_size=halted.size)))
            halted = halted.reshape(accumulation, batch_size)
        micro_batches = loader.next_batch(list(halted), 1)
        assert [len(micro["active"]) for micro in micro_batches] == [batch_size] * accumulation
        active = np.concatenate([micro["active"] for micro in micro_batches])
        assert not (active & ~halted.reshape(-1)).any()
        found = [tuple(row) for micro in micro_batches for row in micro["inputs"][micro["active"]].tolist()]
        assert len({epoch for epoch, _, _ in found}) <= 1
        left_in_epoch = sum(place[0] == expected[len(taken)][0] for place in expected[len(taken) :])
        wanted = 0 if loader.draining else min(int(halted.sum()), left_in_epoch)
        assert len(found) == wanted
        if data.draw(st.booleans()):
            loader.mark_skipped()
            skipped |= set(range(len(taken), len(taken) + len(found)))
        taken += found
    assert taken == expected
    parts = loader.taken()
    assert [(one.lease.epoch, one.lease.chunk, n) for one in parts for n in range(one.start, one.end)] == expected
    assert all(one.lease.start <= one.start < one.end <= (one.lease.end or 0) for one in parts)
    marks = [one.skipped for one in parts for _ in range(one.start, one.end)]
    assert marks == [number in skipped and not carried for number in range(len(expected))]


def test_chunks_of_puzzles_hold_each_puzzle_once() -> None:
    for puzzles in (1, PUZZLES_PER_CHUNK - 1, PUZZLES_PER_CHUNK, PUZZLES_PER_CHUNK + 1, 3 * PUZZLES_PER_CHUNK):
        sizes = [puzzles_of_chunk(puzzles, chunk) for chunk in range(puzzle_chunks(puzzles))]
        assert sum(sizes) == puzzles and min(sizes) > 0
        assert puzzles_of_chunk(puzzles, len(sizes)) == 0
