"""Ledgers with one of their safeguards taken out, to show that the simulation finds what that does.

One job: two plausible protocols that are wrong. Nothing in the product knows of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

from hrm_ray.ledger import Contribution, Lease, Ledger, Range, Refused, State
from hrm_ray.ledger import ranges as rows


class Weakness(Enum):
    """What is left out of the protocol."""

    NONE = "nothing"
    UNFENCED = "fencing by generation and attempt"
    COMPLETE_WHEN_TRAINED = "that only the lineage says what is done"
    ANCHOR_FIRST = "that the ledger's head, not the newest file, says which anchor holds"


class Unfenced(Ledger):
    """Takes a report whoever holds the range by now, and whatever became of it."""

    _reporting = False

    def _active(self, worker: str, generation: int) -> bool:
        return True

    def _held(self, lease: Lease) -> Range | Refused:
        held = rows.at(self.database, lease.epoch, lease.chunk, lease.start)
        if held is None or not self._reporting:
            return super()._held(lease)
        return replace(held, state=State.LEASED)

    def report(self, *words: Any, **named: Any) -> Contribution | Refused:
        self._reporting = True
        try:
            return super().report(*words, **named)
        finally:
            self._reporting = False


class CompleteWhenTrained(Ledger):
    """Strikes a range off as soon as a worker has trained it; its report is taken in whenever it comes."""

    def strike_off(self, lease: Lease) -> None:
        held = self._held(lease)
        if isinstance(held, Range):
            with self.database.transaction():
                rows.put(self.database, replace(held, state=State.MERGED, worker=None, generation=None, expiry_s=None))

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
        leases = [*leases, *skipped]
        with self.database.transaction():
            if self.contribution(name) is None:
                self.database.rows(
                    "INSERT INTO contributions (name, worker, generation, base, path, checksum, sequences)"
                    " VALUES (?, ?, ?, NULL, ?, ?, 0)",
                    (name, leases[0].worker, leases[0].generation, path, checksum),
                )
                for lease in leases:
                    self.strike_off(lease)
            made = self.contribution(name)
            assert made is not None
            return made


LEDGERS: dict[Weakness, type[Ledger]] = {
    Weakness.NONE: Ledger,
    Weakness.UNFENCED: Unfenced,
    Weakness.COMPLETE_WHEN_TRAINED: CompleteWhenTrained,
    Weakness.ANCHOR_FIRST: Ledger,
}
