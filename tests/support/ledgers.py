"""Small ledgers for tests: blocks of chunks, leases, and a count of what is where."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hrm_ray.ledger import BlockLength, Contribution, Lease, Ledger, LedgerReader, State, open_ledger
from hrm_ray.ledger import ranges as rows


def linear(epoch: int, position: int) -> int:
    """The order of a linear data set."""
    return position


def ledger_of(path: Path, blocks: list[int], ended: bool = True) -> Ledger:
    """A ledger of sealed blocks with that many chunks, and the data's end."""
    ledger = open_ledger(path, durable=False)
    ledger.add_blocks(BlockLength(number, chunks) for number, chunks in enumerate(blocks))
    if ended:
        ledger.end_data()
    return ledger


def claimed(ledger: Ledger, worker: str, generation: int, sequences: int | None = 10, **words: object) -> Lease:
    """The next lease, of a chunk that is measured to have that many sequences."""
    lease = ledger.claim(worker, generation, linear, **words)  # type: ignore[arg-type]
    assert isinstance(lease, Lease), lease
    if sequences is None:
        return lease
    ledger.measure(lease.chunk, sequences)
    return lease.measured(sequences)


def reported(ledger: Ledger, name: str, *leases: Lease) -> Contribution:
    """A report of leases from the head's anchor, which is taken."""
    head = ledger.head
    base = None if head is None else head.round
    told = ledger.report(name, leases, base=base, path=f"{name}.safetensors", checksum=f"sum of {name}")
    assert isinstance(told, Contribution), told
    return told


def standing(ledger: LedgerReader, epoch: int = 0) -> dict[State, Counter[tuple[int, int]]]:
    """State -> the (chunk, sequence) pairs of an epoch that have a row in that state, each with how often."""
    found: dict[State, Counter[tuple[int, int]]] = {}
    for one in rows.of_epoch(ledger.database, epoch):
        cells = found.setdefault(one.state, Counter())
        cells.update((one.chunk, at) for at in range(one.start, one.end or one.start))
    return found


def states(ledger: LedgerReader, epoch: int = 0) -> list[tuple[int, int, int | None, State]]:
    """The ranges of an epoch: chunk, start, end, state."""
    return [(one.chunk, one.start, one.end, one.state) for one in rows.of_epoch(ledger.database, epoch)]
