"""Reads a ledger: blocks, epochs, leases, rounds and their lineage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hrm_ray.ledger import ranges
from hrm_ray.ledger.database import Database, read
from hrm_ray.ledger.states import Lease, Range, State
from hrm_ray.rundir import INDEPENDENT

if TYPE_CHECKING:
    from typing_extensions import Self

_CONTRIBUTION = "number, name, worker, generation, base, path, checksum, sequences, round"
_ROUND = "round, parent, anchor, checksum, sequences, total_sequences"


@dataclass(frozen=True)
class LedgerBlock:
    """A block of the data: chunks first_chunk .. first_chunk + chunks - 1. It can grow until it is `sealed`."""

    block: int
    first_chunk: int
    chunks: int
    sealed: bool


@dataclass(frozen=True)
class Contribution:
    """A report: what `worker` trained from the anchor of round `base`, and the file with its weights or their change.

    `round` is the round that accepted the report; None while it is staged. The path is relative to the bundle.
    """

    number: int
    name: str
    worker: str
    generation: int
    base: int | None
    path: str
    checksum: str
    sequences: int
    round: int | None


@dataclass(frozen=True)
class Round:
    """A committed round: its anchor (a checkpoint, or common weights) and how many sequences the anchor has learned.

    `sequences` are of this round's contributions, `total_sequences` of its whole lineage.
    """

    round: int
    parent: int | None
    anchor: str
    checksum: str
    sequences: int
    total_sequences: int


def is_anchor(round_: Round) -> bool:
    """Whether a round was committed by independent trainers: its anchor is a file of theirs, not a checkpoint."""
    return round_.anchor.startswith(f"{INDEPENDENT}/")


@dataclass(frozen=True)
class StateCount:
    """How many ranges are in a state, and their sequences as far as they are measured."""

    ranges: int
    sequences: int


@dataclass(frozen=True)
class EpochCounts:
    """An epoch in figures. `untouched` chunks are PENDING without a row; `states` counts the ranges with one."""

    epoch: int
    chunks: int
    untouched: int
    complete: bool
    states: Mapping[State, StateCount]


class LedgerReader:
    """An open ledger for reading; a context manager that closes it."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @property
    def path(self) -> Path:
        return self.database.path

    @property
    def data_ended(self) -> bool:
        """Whether all blocks are known and sealed."""
        return bool(self._fact("data_ended"))

    @property
    def chunks(self) -> int:
        """Chunks known so far, over all blocks."""
        row = self.database.row("SELECT first_chunk + chunks FROM blocks ORDER BY block DESC LIMIT 1")
        return int(row[0]) if row is not None else 0

    @property
    def head(self) -> Round | None:
        """The newest round; None where none has been committed, or all were undone."""
        found = self._fact("head")
        return None if found is None else self.round(found)

    @property
    def epoch(self) -> int:
        """The first epoch that is not complete."""
        first = ranges.earliest_epoch(self.database)
        if first is None:
            begun = self.database.row("SELECT max(epoch) FROM epochs")
            first = begun[0] if begun is not None and begun[0] is not None else 0
        return first + 1 if self.complete(first) else first

    def blocks(self) -> list[LedgerBlock]:
        """All blocks, in order."""
        rows = self.database.rows("SELECT block, first_chunk, chunks, sealed FROM blocks ORDER BY block")
        return [LedgerBlock(block, first, chunks, bool(sealed)) for block, first, chunks, sealed in rows]

    def block_of(self, chunk: int) -> LedgerBlock:
        """The block of a chunk. Raises ValueError for a chunk that no block has."""
        row = self.database.row(
            "SELECT block, first_chunk, chunks, sealed FROM blocks WHERE first_chunk <= ? AND chunks > 0"
            " ORDER BY first_chunk DESC LIMIT 1",
            (chunk,),
        )
        if row is None or not row[1] <= chunk < row[1] + row[2]:
            raise ValueError(f"no block has chunk {chunk}; {self.chunks} are known")
        return LedgerBlock(row[0], row[1], row[2], bool(row[3]))

    def sequences(self, chunk: int) -> int | None:
        """How many packed sequences a chunk has; None until it has been measured."""
        row = self.database.row("SELECT sequences FROM measured WHERE chunk = ?", (chunk,))
        return int(row[0]) if row is not None else None

    def leases(self, worker: str) -> list[Lease]:
        """A worker's leases, in the order of claims."""
        return [self._lease(held) for held in ranges.leased_by(self.database, worker)]

    def lease_at(self, epoch: int, chunk: int, start: int) -> Lease | None:
        """The lease that begins at a sequence, or None."""
        held = ranges.at(self.database, epoch, chunk, start)
        return None if held is None or held.state is not State.LEASED else self._lease(held)

    def quarantined(self) -> list[Range]:
        """The quarantined ranges, each with its reason."""
        return ranges.quarantined(self.database)

    def staged(self) -> list[Contribution]:
        """Reports that no round has accepted yet, in the order of their arrival."""
        return self._contributions("INDEXED BY of_round WHERE round IS NULL ORDER BY number")

    def contribution(self, name: str) -> Contribution | None:
        """The report of that name, staged or accepted; or None."""
        found = self._contributions("WHERE name = ?", name)
        return found[0] if found else None

    def contributions_of(self, round_: int) -> list[Contribution]:
        """The reports that a round accepted, in the order in which they were merged."""
        return self._contributions("WHERE round = ? ORDER BY place", round_)

    def round(self, round_: int) -> Round | None:
        """A committed round by its number, or None."""
        row = self.database.row(f"SELECT {_ROUND} FROM rounds WHERE round = ?", (round_,))
        return Round(*row) if row is not None else None

    def lineage(self) -> Iterator[Round]:
        """The head, its parent, and so on to the first round."""
        found = self.head
        while found is not None:
            yield found
            found = None if found.parent is None else self.round(found.parent)

    def skipped(self) -> dict[int, int]:
        """Sequences that each round has passed over without learning them, for rounds with any."""
        rows = self.database.rows(
            "SELECT round, sum(end - start) FROM ranges JOIN contributions ON contribution = number"
            " WHERE state = ? AND round IS NOT NULL GROUP BY round",
            (State.SKIPPED.value,),
        )
        return dict(rows)

    @property
    def shuffled(self) -> bool:
        """Whether ranges count places in the order of a shuffle window, not sequences of a chunk."""
        return bool(self._fact("shuffled"))

    def complete(self, epoch: int) -> bool:
        """Whether all of an epoch is MERGED, SKIPPED or QUARANTINED and the data's end is known."""
        row = self.database.row("SELECT start_chunk, cursor FROM epochs WHERE epoch = ?", (epoch,))
        at_its_end = row is not None and self.data_ended and row[0] + row[1] >= self.chunks
        return at_its_end and not ranges.unsettled(self.database, epoch)

    def counts(self) -> list[EpochCounts]:
        """Every epoch that has begun, in figures. Reads all rows."""
        found: list[EpochCounts] = []
        known = self.chunks
        for epoch, start_chunk, cursor in self.database.rows("SELECT epoch, start_chunk, cursor FROM epochs"):
            states = {
                State(state): StateCount(count, sequences)
                for state, count, sequences in self.database.rows(
                    "SELECT state, count(*), coalesce(sum(end - start), 0) FROM ranges WHERE epoch = ?"
                    " GROUP BY state ORDER BY state",
                    (epoch,),
                )
            }
            chunks = max(known - start_chunk, 0)
            found.append(EpochCounts(epoch, chunks, chunks - cursor, self.complete(epoch), states))
        return found

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fact(self, name: str) -> int | None:
        row = self.database.row("SELECT value FROM facts WHERE name = ?", (name,))
        return row[0] if row is not None else None

    def _contributions(self, where: str, *values: object) -> list[Contribution]:
        rows = self.database.rows(f"SELECT {_CONTRIBUTION} FROM contributions {where}", values)
        return [Contribution(*row) for row in rows]

    def _lease(self, held: Range) -> Lease:
        """The lease of a LEASED range."""
        if held.worker is None or held.generation is None:
            raise ValueError(f"{held} is not leased")
        block = self.block_of(held.chunk)
        return Lease(
            worker=held.worker,
            generation=held.generation,
            attempt=held.attempt,
            epoch=held.epoch,
            position=held.position,
            block=block.block,
            chunk_in_block=held.chunk - block.first_chunk,
            chunk=held.chunk,
            start=held.start,
            end=held.end,
            expiry_s=held.expiry_s,
        )


def read_ledger(path: Path) -> LedgerReader:
    """Read the current ledger; a run may be writing it. Raises SettingsError where there is none, DataError for another
    file."""
    return LedgerReader(read(path))
