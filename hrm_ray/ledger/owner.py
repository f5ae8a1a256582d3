"""The ledger of chunks as its one owner has it: who trains what, what was reported, which rounds count.

One job: each call is one transaction that carries out transitions of `states`. It reads no clock (times are the
caller's), draws nothing, and does not know what training is. What a late or doubled call gets is a value, `Refused`:
such calls are ordinary. An exception is a mistake in the calling code (ValueError) or a broken file (HrmRayError).
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
    """A ledger that may be written. From several threads of the process: calls take turns."""

    def transaction(self) -> AbstractContextManager[None]:
        """Calls inside are carried out together or not at all, and outlive power loss."""
        return self.database.transaction(durable=True)

    def add_blocks(self, blocks: Iterable[BlockLength]) -> None:
        """Tell of blocks in order: new ones, growth of the last, or what is known already (a resumed run's).

        Raises DataError where the data is not what it was, ValueError for a block out of turn.
        """
        with self.database.transaction():
            known_blocks.add_blocks(self, blocks)

    def end_data(self) -> None:
        """Tell that there are no more blocks. Raises ValueError while one is open."""
        with self.database.transaction():
            if self.database.row("SELECT 1 FROM blocks WHERE NOT sealed"):
                raise ValueError("the data cannot end in an open block")
            self.database.rows("UPDATE facts SET value = 1 WHERE name = 'data_ended'")

    def start_at(self, chunk: int) -> None:
        """Let the first epoch begin at a chunk: those before it are no part of that epoch, and its order must map
        positions 0.. to the chunks from there on. Raises ValueError once another start has been used."""
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
        """Tell how many packed sequences a chunk has: that ends its ranges, in this epoch and all others.

        Raises DataError where it had another number before.
        """
        if sequences < 0:
            raise ValueError(f"chunk {chunk} cannot have {sequences} sequences")
        known = self.sequences(chunk)
        if known == sequences:
            return
        if known is not None:
            value, reason = f"chunk {chunk}", f"it has {sequences} packed sequences now, and had {known} before"
            hint = "Restore the data and the tokenizer of the run, or train anew"
            raise DataError(Fault(value, reason, hint))
        with self.database.transaction():
            self.block_of(chunk)
            self.database.rows("INSERT INTO measured VALUES (?, ?)", (chunk, sequences))
            open_ended = ranges.unmeasured(self.database, chunk)
            ranges.put_all(self.database, [replace(found, end=sequences) for found in open_ended])

    def start_worker(self, worker: str) -> int:
        """A worker starts, or starts again: its new generation. What an earlier one held counts as a failed attempt."""
        with self.database.transaction(durable=True):
            self._return_leases(worker, "its worker was started again")
            row = self.database.row("SELECT generation FROM workers WHERE worker = ?", (worker,))
            generation = int(row[0]) + 1 if row is not None else 1
            self.database.rows("INSERT OR REPLACE INTO workers VALUES (?, ?, 1)", (worker, generation))
            self.database.rows("DELETE FROM claims WHERE worker = ?", (worker,))
        return generation

    def stop_worker(self, worker: str, generation: int, failure: str | None = None) -> None:
        """A worker is gone: what it held is PENDING. With a `failure` (it died of it) that is a failed attempt."""
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
        """Lease to a worker what comes first: a PENDING range that was touched before, else the next chunk in order.

        Epochs before `epochs` are given out (None: without end), each when nothing of the one before is PENDING. The
        lease runs out `lease_s` after `now_s`, on whatever monotonic clock the caller keeps to (None: never); leases
        that have run out by `now_s` are taken back first. The same `key` again gives the same lease, while it is held.
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

    def expire(self, now_s: float) -> list[Range]:
        """Take back the leases that have run out by `now_s`; gives them as they were."""
        with self.database.transaction():
            return self._expire(now_s)

    def renew(self, lease: Lease, now_s: float, lease_s: float) -> Lease | Refused:
        """Let a lease run until `lease_s` after `now_s`."""
        with self.database.transaction():
            held = self._held(lease)
            if isinstance(held, Refused):
                return held
            longer = states.renew(held, now_s + lease_s)
            ranges.put(self.database, longer)
            return self._lease(longer)

    def release(self, lease: Lease) -> Refused | None:
        """Give a lease back untrained, in order: no failed attempt."""
        with self.database.transaction():
            held = self._held(lease)
            if isinstance(held, Refused):
                return held
            ranges.put(self.database, states.release(held))
            return None

    def split(self, lease: Lease, at: int) -> Lease | Refused:
        """Cut a lease at sequence `at`: gives the lease of [start, at); the rest is PENDING.

        The same cut again gives the same lease.
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
        """Hand in what was trained from the anchor of round `base`: all of `leases`, or nothing where one is stale.
        `skipped` are those whose updates were skipped: handed in with the others, and not counted as learned.

        `name` is the report's own for good: the same report again, at any later time, gives what the first one gave.
        Raises ValueError for no lease at all, for leases of several workers, or for a chunk that was not measured.
        """
        owners = {(lease.worker, lease.generation) for lease in (*leases, *skipped)}
        if len(owners) != 1:
            raise ValueError(f"a report is of one worker, not of {sorted(owners)}")
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
            assert made is not None
            reasons = [None] * len(leases) + [SKIPPED_UPDATE] * len(skipped)
            pairs = zip(reported, reasons, strict=True)
            ranges.put_all(self.database, [states.train(one, made.number, reason) for one, reason in pairs])
            return made

    def reject(self, name: str, reason: str, *, lost: bool = False) -> Refused | None:
        """Refuse a staged contribution: its ranges are PENDING again.

        `lost` (its file is missing or broken) counts as a failed attempt at them, not as a rejection: it tells nothing
        about the data.
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
        """Make a round the head, if the head is still `parent`: one transaction that outlives power loss.

        The contributions `accepted` are merged, in that order, and those `rejected` (name: reason) go back. The same
        commit again gives the same round. Whoever writes the anchor writes it whole before this call, under a name
        never used before, and counts it as valid only after it: the head, not the newest file, says which anchor holds.
        """
        proposed = Round(round, parent, anchor, checksum, 0, 0)
        with self.database.transaction(durable=True):
            return rounds.commit(self, proposed, accepted, rejected or {})

    def rollback(self, to: int | None) -> list[Round] | Refused:
        """Make an earlier round the head (None: the start); gives the rounds that this undoes, the newest first.

        Their ranges are PENDING again, and so is all that is under way; every worker has to start again. Where `to` is
        the head, nothing changes.
        """
        with self.database.transaction(durable=True):
            return rounds.roll_back(self, to)

    def requeue(self, aside: Iterable[Range]) -> None:
        """Give quarantined ranges another chance; `quarantined()` lists them."""
        with self.database.transaction():
            found = [ranges.at(self.database, one.epoch, one.chunk, one.start) for one in aside]
            ranges.put_all(self.database, [states.requeue(one) for one in found if one is not None])

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
        ranges.put_all(self.database, [states.lose(one, f"the lease of {one.worker} ran out") for one in over])
        return over

    def _held(self, lease: Lease) -> Range | Refused:
        """The range that a lease is for, if it still holds and goes as far as the lease says."""
        held = ranges.at(self.database, lease.epoch, lease.chunk, lease.start)
        if held is None or states.fenced(held, lease):
            span = f"chunk {lease.chunk} from sequence {lease.start} in epoch {lease.epoch}"
            return Refused(f"attempt {lease.attempt} of {lease.worker} at {span} is over")
        if lease.end is not None and lease.end != held.end:
            return Refused(f"chunk {lease.chunk} was leased up to sequence {held.end}, not {lease.end}")
        return held

    def _claimed(self, key: str) -> Lease | Refused | None:
        """What an earlier claim of that key was given."""
        row = self.database.row("SELECT attempt, epoch, chunk, start FROM claims WHERE key = ?", (key,))
        if row is None:
            return None
        held = ranges.at(self.database, *row[1:])
        if held is None or held.state is not states.State.LEASED or held.attempt != row[0]:
            return Refused(f"what claim {key} was given is no longer held")
        return self._lease(held)


def open_ledger(path: Path, *, durable: bool = True) -> Ledger:
    """Open a run's ledger as its owner, made anew where there is none.

    Nothing that the last owner's workers hold is held any longer: its clock is not this one's, and power loss may have
    taken claims that they know of. They start again (`start_worker`), as if their lease had been released; no attempt
    is counted as failed. Reports and rounds stand. Whoever had the file open can no longer write it. `durable=False` is
    for what need not outlive power loss.
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
