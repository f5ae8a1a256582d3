"""A trainer of the simulated run: it claims, learns, reports, dies, and comes back from the dead.

One job: one incarnation of a worker. It knows only what messages tell it, and may outlive its own death certificate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hrm_ray.ledger import Idle, Lease
from tests.support.weak_ledgers import Weakness

if TYPE_CHECKING:
    from tests.support.ledger_simulation import Simulation

LEASE_TICKS = 14
RENEW_TICKS = 4
RESEND_TICKS = 8


def place_of(lease: Lease) -> tuple[int, int, int]:
    return lease.epoch, lease.chunk, lease.start


class Trainer:
    """`own` is what its weights learned since the last report; `leases` what that was leased by, the last one open at
    sequence `at`; `skipped` the places of those whose updates are skipped; `asked` the request that it waits for."""

    def __init__(self, world: Simulation, name: str, generation: int, base: int | None) -> None:
        self.world, self.name, self.generation, self.base = world, name, generation, base
        self.own = np.zeros(world.size, np.int64)
        self.leases: list[Lease] = []
        self.skipped: set[tuple[int, int, int]] = set()
        self.at = self.asked_at = self.requests = self.paused_until = 0
        self.asked: tuple[str, tuple[Any, ...]] | None = None
        self.gone = False

    @property
    def key(self) -> str:
        """By what its present request, and a report in it, is known for good."""
        return f"{self.name}.{self.generation}.{self.requests}"

    def live(self) -> None:
        """One tick."""
        if self.world.goes_wrong(0.008, "worker died"):
            self.gone = True
            return
        if self.world.goes_wrong(0.008, "worker paused beyond its lease"):
            self.paused_until = self.world.tick + self.world.draw.randint(LEASE_TICKS, 3 * LEASE_TICKS)
            return
        for kind, words in self.world.received(self):
            self._heard(kind, *words)
        if self.gone:
            return
        if self.leases and self.world.tick % RENEW_TICKS == 0:
            self.world.send(None, "renew", self, tuple(self.leases))
        if self.asked is not None:
            if self.world.tick - self.asked_at >= RESEND_TICKS:
                if self.asked[0] == "claim" and self.world.goes_wrong(0.2, "claim given up"):
                    self.asked = None
                else:
                    self.asked_at = self.world.tick
                    self.world.send(None, self.asked[0], self, *self.asked[1])
            return
        if not self.leases or self.at >= self._end():
            self._ask("claim")
            return
        self._learn()

    def _learn(self) -> None:
        """One sequence; at a chunk's end, or in its middle where it is told to stop, the report."""
        lease = self.leases[-1]
        if place_of(lease) not in self.skipped:
            self.own[self.world.cells(lease.epoch, lease.chunk, self.at, self.at + 1)] += 1
        self.at += 1
        if self.at < self._end():
            if self.world.draw.random() < 0.05:
                self._ask("split", lease, self.at)
            return
        if self.world.weakness is Weakness.COMPLETE_WHEN_TRAINED:
            self.world.send(None, "trained", self, lease)
        if self.world.draw.random() < 0.7 or len(self.leases) > 2:
            self._report()

    def _report(self) -> None:
        """Write the difference since the last report, and hand it in."""
        self.requests += 1
        self.world.files[self.key] = self.own.copy()
        if self.world.goes_wrong(0.03, "file lost"):
            del self.world.files[self.key]
        elif self.world.goes_wrong(0.03, "file broken"):
            self.world.rotten.add(self.key)
        learned = tuple(lease for lease in self.leases if place_of(lease) not in self.skipped)
        skipped = tuple(lease for lease in self.leases if place_of(lease) in self.skipped)
        self.asked, self.asked_at = ("report", (self.key, learned, skipped, self.base)), self.world.tick
        self.world.send(None, "report", self, *self.asked[1])

    def _ask(self, kind: str, *words: Any) -> None:
        """A request under a key of its own; it is sent again until it is answered."""
        self.requests += 1
        self.asked, self.asked_at = (kind, (self.key, *words)), self.world.tick
        self.world.send(None, kind, self, *self.asked[1])

    def _heard(self, kind: str, *words: Any) -> None:
        """An answer; one to a request that is no longer open says nothing."""
        if kind == "lost":
            if any(lease in self.leases for lease in words[0]) and self.world.weakness is not Weakness.UNFENCED:
                self._back_to_anchor()
            return
        key, answer = words
        if self.asked is None or self.asked[1][0] != key:
            return
        if kind == "claimed":
            self.asked = None
            if isinstance(answer, Lease):
                self.leases.append(answer)
                if self.world.goes_wrong(0.1, "update skipped"):
                    self.skipped.add(place_of(answer))
                self.at = answer.start
            elif isinstance(answer, Idle):
                if self.leases:
                    self._report()
            elif self.leases and self.world.weakness is Weakness.UNFENCED:
                self._report()
            else:
                self.gone = True
        elif kind == "split":
            self.asked = None
            if isinstance(answer, Lease):
                self.leases[-1] = answer
                self._report()
            else:
                self._back_to_anchor()
        elif kind == "reported":
            self._back_to_anchor()  # taken: snap = weights; refused: back to the anchor

    def _end(self) -> int:
        end = self.leases[-1].end
        assert end is not None
        return end

    def _back_to_anchor(self) -> None:
        """Begin anew from the newest anchor; while the coordinator is away, from the one that is known."""
        self.own[:] = 0
        self.leases, self.skipped, self.asked = [], set(), None
        if self.world.ledger is not None:
            self.base = self.world.head()
