"""The ledger for its single owner: each call applies transitions of `states` in one transaction.

A late or repeated call returns `Refused`, because such calls are normal. An exception means a bug in the calling code
(ValueError) or a damaged file (HrmRayError). Times are the caller's; no clock is read here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from hrm_ray.errors import DataError, Fault
from hrm_ray.ledger import blocks as known_blocks
from hrm_ray.ledger import ranges, rounds, states
from hrm_ray.ledger.blocks import BlockLength
from hrm_ray.ledger.database import own
from hrm_ray.ledger.ranges import ClaimOrder
from hrm_ray.ledger.reader import Contribution, LedgerReader, Round
from hrm_ray.ledger.states import Idle, Lease, Range, Refused

SKIPPED_UPDATE = "its weight update was skipped: the gradients were not finite"


class Ledger(LedgerReader):
    """A ledger open for writing. Safe to call from several threads."""

    def transaction(self) -> AbstractContextManager[None]:
        """Calls inside are one transaction, which survives power loss."""
        return self.database.transaction(durable=True)

    def add_blocks(self, blocks: Iterable[BlockLength]) -> None:
        """Add blocks in order: new ones, growth of the last one, or known ones again (after a resume).

        Raises DataError where the data has changed, ValueError for a block out of order.
        """
        with self.database.transaction():
            known_blocks.add_blocks(self, blocks)

    def end_data(self) -> None:
        """Record that there are no more blocks. Raises ValueError while one is open."""
        with self.database.transaction():
            if self.database.row("SELECT 1 FROM blocks WHERE NOT sealed"):
                raise ValueError("the data cannot end in an open block")
            self.database.rows("UPDATE facts SET value = 1 WHERE name = 'data_ended'")

    def start_at(self, chunk: int) -> None:
        """Let the first epoch begin at a chunk; its order maps positions 0.. to the chunks from there on.

        Raises ValueError once another start has been used."""
        with self.database.transaction():
            row = self.database.row("SELECT start_chunk FROM epochs WHERE epoch = 0")
            if row is None:
                self.database.rows("INSERT INTO epochs VALUES (0, ?, 0)", (chunk,))
            elif row[0] != chunk:
                raise ValueError(f"the first epoch began at chunk {row[0]}, not {chunk}")

    def set_shuffled(self, shuffled: bool) -> None:
        """Note whether the ranges of this run count places in the order of shuffle windows."""
        with self.database.transaction():
            self.database.rows("INSERT OR REPLACE INTO facts VALUES ('shuffled', ?)", (int(shuffled),))

    def measure(self, chunk: int, sequences: int) -> None:
        """Set how many packed sequences a chunk has, which ends its open ranges in every epoch.

        Raises DataError where the chunk had another number before.
        """
        if sequences < 0:
            raise ValueError(f"chunk {chunk} cannot have {sequences} sequences")
        known = self.sequences(chunk)
        if known == sequences:
            return
        if known is not None:
            value, reason = f"chunk {chunk}", f"has {sequences} packed sequences, but had {known} before"
            hint = "Restore the data and the tokenizer of the run, or train again"
            raise DataError(Fault(value, reason, hint))
        with self.database.transaction():
            self.block_of(chunk)
            self.database.rows("INSERT INTO measured VALUES (?, ?)", (chunk, sequences))
            open_ended = ranges.unmeasured(self.database, chunk)
            ranges.put_all(self.database, [replace(found, end=sequences) for found in open_ended])

    def start_worker(self, worker: str) -> int:
        """Start a worker and return its generation. Leases of its earlier generation count as failed attempts."""
        with self.database.transaction(durable=True):
            self._return_leases(worker, "its worker was started again")
            row = self.database.row("SELECT generation FROM workers WHERE worker = ?", (worker,))
            generation = int(row[0]) + 1 if row is not None else 1
            self.database.rows("INSERT OR REPLACE INTO workers VALUES (?, ?, 1)", (worker, generation))
            self.database.rows("DELETE FROM claims WHERE worker = ?", (worker,))
        return generation

    def stop_worker(self, worker: str, generation: int, failure: str | None = None) -> None:
        """Stop a worker: its leases are PENDING again. With a `failure` they count as failed attempts."""
        with self.database.transaction():
            if self._active(worker, generation):
                self._return_leases(worker, failure)
                self.database.rows("UPDATE workers SET active = 0 WHERE worker = ?", (worker,))

    def claim(
        self,
        worker: str,
        generation: int,
        order: ClaimOrder,
        *,
        epochs: int | None = None,
        now_s: float = 0.0,
        lease_s: float | None = None,
        key: str | None = None,
    ) -> Lease | Idle | Refused:
        """Lease the first range to a worker: a PENDING range with a row, else the next chunk in order.

        Only epochs before `epochs` are leased (None: all), each when nothing of the one before is PENDING. The lease
        expires `lease_s` after `now_s`, on the caller's monotonic clock (None: never); leases that have expired by
        `now_s` are taken back first. The same `key` returns the same lease while it is held.
        """
        with self.database.transaction():
            if not self._active(worker, generation):
                return _stopped(worker, generation)
            if key is not None and (again := self._claimed(key)) is not None:
                return again
            self._expire(now_s)
            found = ranges.first_pending(self.database, epochs) or known_blocks.next_untouched(self, order, epochs)
            if isinstance(found, Idle):
                return found
            held = states.lease(found, worker, generation, None if lease_s is None else now_s + lease_s)
            ranges.put(self.database, held)
            if key is not None:
                place = (held.epoch, held.chunk, held.start)
                self.database.rows(
                    "INSERT INTO claims VALUES (?, ?, ?, ?, ?, ?, ?)", (key, worker, generation, held.attempt, *place)
                )
            return self._lease(held)

    def claim_at(
        self, worker: str, generation: int, place: Lease, start: int, *, now_s: float, lease_s: float
    ) -> Lease | Refused:
        """Lease to a worker the PENDING range that begins at sequence `start` of the chunk of `place`: what a split has
        left of it."""
        with self.database.transaction():
            if not self._active(worker, generation):
                return _stopped(worker, generation)
            found = ranges.at(self.database, place.epoch, place.chunk, start)
            if found is None or found.state is not states.State.PENDING:
                return Refused(f"no range of chunk {place.chunk} waits at sequence {start}")
            held = states.lease(found, worker, generation, now_s + lease_s)
            ranges.put(self.database, held)
            return self._lease(held)

    def expire(self, now_s: float) -> list[Range]:
        """Take back the leases that have expired by `now_s`; returns their ranges as they were."""
        with self.database.transaction():
            return self._expire(now_s)

    def renew(self, lease: Lease, now_s: float, lease_s: float) -> Lease | Refused:
        """Extend a lease to `lease_s` after `now_s`."""
        with self.database.transaction():
            held = self._held(lease)
            if isinstance(held, Refused):
                return held
            longer = states.renew(held, now_s + lease_s)
            ranges.put(self.database, longer)
            return self._lease(longer)

    def release(self, lease: Lease) -> Refused | None:
        """Return a lease untrained; this is no failed attempt."""
        with self.database.transaction():
            held = self._held(lease)
            if isinstance(held, Refused):
                return held
            ranges.put(self.database, states.release(held))
            return None

    def split(self, lease: Lease, at: int) -> Lease | Refused:
        """Split a lease at sequence `at`: returns the lease of [start, at); the rest is PENDING.

        The same split again returns the same lease.
        """
        with self.database.transaction():
            held = self._held(replace(lease, end=at))
            if not isinstance(held, Refused):
                return self._lease(held)
            held = self._held(lease)
            if isinstance(held, Refused):
                return held
            first, rest = states.split(held, at)
            ranges.put(self.database, first, rest)
            return self._lease(first)

    def report(
        self,
        name: str,
        leases: Sequence[Lease],
        *,
        base: int | None,
        path: str,
        checksum: str,
        skipped: Sequence[Lease] = (),
    ) -> Contribution | Refused:
        """Stage a contribution: `leases` trained from the anchor of round `base`; refused where one of them is stale.

        `skipped` are leases whose weight updates were skipped; their sequences are not counted as learned. `name` is
        unique: the same report again, at any later time, returns what the first one did. Raises ValueError without
        leases, for leases of several workers, or for a chunk that was not measured.
        """
        owners = {(lease.worker, lease.generation) for lease in (*leases, *skipped)}
        if len(owners) != 1:
            raise ValueError(f"a report needs leases of one worker, not of {sorted(owners)}")
        ((worker, generation),) = owners
        with self.database.transaction():
            known = self.contribution(name)
            if known is not None:
                same = (worker, generation, base, path, checksum)
                if (known.worker, known.generation, known.base, known.path, known.checksum) == same:
                    return known
                return Refused(f"contribution {name} was reported before, with another content")
            if not self._active(worker, generation):
                return _stopped(worker, generation)
            if base is not None and self.round(base) is None:
                return Refused(f"round {base} is not in the head's lineage")
            reported: list[Range] = []
            for lease in (*leases, *skipped):
                held = self._held(lease)
                if isinstance(held, Refused):
                    return held
                reported.append(held)
            sequences = sum(one.sequences for one in reported[: len(leases)])
            self.database.rows(
                "INSERT INTO contributions (name, worker, generation, base, path, checksum, sequences)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (name, worker, generation, base, path, checksum, sequences),
            )
            made = self.contribution(name)
            if made is None:
                raise RuntimeError(f"contribution {name} is missing after its insertion")
            reasons = [None] * len(leases) + [SKIPPED_UPDATE] * len(skipped)
            pairs = zip(reported, reasons, strict=True)
            ranges.put_all(self.database, [states.train(one, made.number, reason) for one, reason in pairs])
            return made

    def reject(self, name: str, reason: str, *, lost: bool = False) -> Refused | None:
        """Reject a staged contribution: its ranges are PENDING again.

        `lost` (its file is missing or damaged) is a failed attempt, not a rejection: the data is not to blame.
        """
        with self.database.transaction():
            found = self.contribution(name)
            if found is None or found.round is not None:
                return Refused(f"contribution {name} is not staged")
            refuse = states.lose if lost else states.reject
            parts = ranges.of_contribution(self.database, found.number)
            rounds.drop(self, found, [refuse(part, reason) for part in parts])
            return None

    def commit(
        self,
        round: int,
        *,
        parent: int | None,
        accepted: Sequence[str],
        anchor: str,
        checksum: str,
        rejected: Mapping[str, str] | None = None,
    ) -> Round | Refused:
        """Make a round the head, if the head is still `parent`: one transaction that survives power loss.

        The contributions `accepted` are merged, in that order; those `rejected` (name: reason) are PENDING again. The
        same commit again returns the same round. The anchor must be complete before this call, under a name never used
        before, and is valid only afterwards: the head, not the newest file, says which anchor counts.
        """
        proposed = Round(round, parent, anchor, checksum, 0, 0)
        with self.database.transaction(durable=True):
            return rounds.commit(self, proposed, accepted, rejected or {})

    def rollback(self, to: int | None) -> list[Round] | Refused:
        """Make an earlier round the head (None: the start); returns the rounds undone, newest first.

        Their ranges, all leases and all staged contributions are PENDING again, and every worker must start again.
        Nothing changes where `to` is the head.
        """
        with self.database.transaction(durable=True):
            return rounds.roll_back(self, to)

    def drop_staged(self) -> int:
        """Drop all staged contributions, whose ranges are PENDING again without a failed attempt; returns how many."""
        with self.database.transaction(durable=True):
            return rounds.drop_staged(self)

    def requeue(self, aside: Iterable[Range]) -> None:
        """Make quarantined ranges PENDING again; `quarantined()` lists them."""
        with self.database.transaction():
            found = [ranges.at(self.database, one.epoch, one.chunk, one.start) for one in aside]
            ranges.put_all(self.database, [states.requeue(one) for one in found if one is not None])

    def outstanding(self) -> int:
        """Sequences that are leased and measured, or staged: they will be learned, or come back."""
        leased = sum(held.sequences for held in ranges.leased(self.database))
        return leased + sum(one.sequences for one in self.staged())

    def has_more(self, order: ClaimOrder, epochs: int | None = None) -> bool:
        """Whether a claim would be given a range now."""
        with self.database.transaction():
            waiting = ranges.any_pending(self.database, epochs)
            return waiting or not isinstance(known_blocks.next_untouched(self, order, epochs), Idle)

    def any_leased(self) -> bool:
        """Whether any range is leased."""
        return bool(ranges.leased(self.database))

    def _active(self, worker: str, generation: int) -> bool:
        row = self.database.row(
            "SELECT 1 FROM workers WHERE worker = ? AND generation = ? AND active", (worker, generation)
        )
        return row is not None

    def _return_leases(self, worker: str, failure: str | None) -> None:
        held = ranges.leased_by(self.database, worker)
        changed = [states.release(one) if failure is None else states.lose(one, failure) for one in held]
        ranges.put_all(self.database, changed)

    def _expire(self, now_s: float) -> list[Range]:
        over = ranges.expired(self.database, now_s)
        ranges.put_all(self.database, [states.lose(one, f"the lease of {one.worker} expired") for one in over])
        return over

    def _held(self, lease: Lease) -> Range | Refused:
        """The range of a lease that is still valid and has the same end."""
        held = ranges.at(self.database, lease.epoch, lease.chunk, lease.start)
        if held is None or states.fenced(held, lease):
            span = f"chunk {lease.chunk} from sequence {lease.start} in epoch {lease.epoch}"
            return Refused(f"attempt {lease.attempt} of {lease.worker} at {span} is over")
        if lease.end is not None and lease.end != held.end:
            return Refused(f"chunk {lease.chunk} was leased up to sequence {held.end}, not {lease.end}")
        return held

    def _claimed(self, key: str) -> Lease | Refused | None:
        """The lease that an earlier claim with this key returned."""
        row = self.database.row("SELECT attempt, epoch, chunk, start FROM claims WHERE key = ?", (key,))
        if row is None:
            return None
        held = ranges.at(self.database, *row[1:])
        if held is None or held.state is not states.State.LEASED or held.attempt != row[0]:
            return Refused(f"the lease of claim {key} is no longer held")
        return self._lease(held)


def open_ledger(path: Path, *, durable: bool = True) -> Ledger:
    """Open a run's ledger as its owner, created where it is missing; an earlier owner can no longer write it.

    All leases are released, because the earlier owner's clock is not this one's and power loss may have taken claims;
    no attempt is counted as failed. Workers start again with `start_worker`. Reports and rounds stay. With
    `durable=False` nothing is safe from power loss.
    """
    ledger = Ledger(own(path, durable))
    try:
        with ledger.database.transaction(durable=True):
            rounds.stop_all(ledger)
    except BaseException:
        ledger.close()
        raise
    return ledger


def _stopped(worker: str, generation: int) -> Refused:
    return Refused(f"generation {generation} of worker {worker} is over")
