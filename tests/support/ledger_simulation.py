"""A whole run of parallel training in one process, with everything going wrong, on a real ledger.

One job: play one run from a seed. The "model" is a vector of counters: training a sequence adds 1 in its place, a
contribution is the difference of two vectors, the anchor their sum. So the last anchor says what was learned, whatever
the ledger believes. Time is ticks; messages are late, doubled and out of order; workers die, or pause beyond their
lease and go on as if nothing had been; files vanish and rot; the coordinator dies between any two statements of a
commit, and power loss takes what did not wait for the disk, while the workers' machines live on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from hrm_ray.ledger import BlockLength, Contribution, Lease, Ledger, Refused, Round, State, delete_ledger
from hrm_ray.ledger import ranges as rows
from hrm_ray.ledger.database import own
from hrm_ray.ledger.rounds import stop_all
from hrm_ray.ledger.verify import violations
from tests.support.simulated_trainer import LEASE_TICKS, Trainer
from tests.support.weak_ledgers import LEDGERS, CompleteWhenTrained, Weakness

FAULTY_TICKS = 250
"""After this many nothing more goes wrong, so that a run can end."""
LAST_TICK = 4000

Vector = npt.NDArray[np.int64]


class CoordinatorDied(BaseException):
    """Thrown where the coordinator's process ends; what was not committed is gone."""


@dataclass
class RunResult:
    """How a run went: sequences that the last anchor has never or more than once learned, and what else is wrong."""

    lost: int = 0
    twice: int = 0
    wrong: list[str] = field(default_factory=list)
    ticks: int = 0
    faults: dict[str, int] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return not (self.lost or self.twice or self.wrong)


class Simulation:
    """One run from a seed."""

    def __init__(self, path: Path, seed: int, weakness: Weakness) -> None:
        self.path, self.weakness, self.draw = path, weakness, Random(seed)
        draw = self.draw
        self.lengths = [draw.randint(1, 5) for _ in range(draw.randint(3, 7))]
        self.epochs = draw.randint(1, 2)
        self.shift = draw.randrange(len(self.lengths))
        self.first = np.cumsum([0, *self.lengths])
        self.names = [f"w{number}" for number in range(draw.randint(2, 4))]
        self.tick = self.serial = self.written = 0
        self.messages: list[tuple[int, int, Trainer | None, str, tuple[Any, ...]]] = []
        self.trainers: list[Trainer] = []
        self.files: dict[str, Vector] = {}
        self.newest_anchor: str | None = None
        self.rotten: set[str] = set()
        self.ledger: Ledger | None = None
        self.on_disk: sqlite3.Connection | None = None
        self.up_at = 0
        self.outcome = RunResult()

    def run(self) -> RunResult:
        """Play until all epochs are complete; then read the last anchor."""
        while True:
            self.tick += 1
            try:
                if self._coordinate():
                    break
            except CoordinatorDied:
                self._stop()
            for trainer in self.trainers:
                if not trainer.gone and self.tick >= trainer.paused_until:
                    trainer.live()
            if self.tick >= LAST_TICK:
                self.outcome.wrong.append("the run does not end")
                break
        return self._audited()

    def _audited(self) -> RunResult:
        """What the last anchor has learned, against once each."""
        ledger = self.ledger
        assert ledger is not None
        learned = self._anchor()
        expected = np.ones_like(learned)
        for one in (one for epoch in range(self.epochs) for one in rows.of_epoch(ledger.database, epoch)):
            if one.state in (State.QUARANTINED, State.SKIPPED):
                expected[self.cells(one.epoch, one.chunk, one.start, one.end or one.start)] = 0
        self.outcome.lost = int((learned < expected).sum())
        self.outcome.twice = int((learned > expected).sum())
        if self.weakness is Weakness.NONE:
            self.outcome.wrong += violations(ledger)
            head = ledger.head
            if head is not None and head.total_sequences != learned.sum():
                self.outcome.wrong.append(f"{head} has learned {learned.sum()} sequences")
        self.outcome.ticks = self.tick
        ledger.close()
        if self.on_disk is not None:
            self.on_disk.close()
        return self.outcome

    # The network

    def send(self, to: Trainer | None, kind: str, *words: Any) -> None:
        """A message to a trainer, or to the coordinator: late, out of order, sometimes twice."""
        copies = 2 if self.goes_wrong(0.1, "message doubled") else 1
        for _ in range(copies):
            self.serial += 1
            late = self.draw.choice((1, 1, 1, 2, 3, 6)) if self.tick < FAULTY_TICKS else 1
            self.messages.append((self.tick + late, self.serial, to, kind, words))

    def received(self, to: Trainer | None) -> list[tuple[str, tuple[Any, ...]]]:
        """What has arrived for one, taken off the wire."""
        arrived = [one for one in self.messages if one[2] is to and one[0] <= self.tick]
        if arrived:
            self.messages = [one for one in self.messages if not (one[2] is to and one[0] <= self.tick)]
        return [(kind, words) for _, _, _, kind, words in sorted(arrived, key=lambda one: one[:2])]

    def goes_wrong(self, chance: float, what: str) -> bool:
        happens = self.tick < FAULTY_TICKS and self.draw.random() < chance
        if happens:
            self._count(what)
        return happens

    def _count(self, what: str) -> None:
        self.outcome.faults[what] = self.outcome.faults.get(what, 0) + 1

    # The coordinator: ledger, merger, and who lives

    def _coordinate(self) -> bool:
        """One tick; True once all is done."""
        if self.ledger is None:
            self.received(None)  # lost with the process
            if self.tick >= self.up_at:
                self._start()
            return False
        for kind, words in self.received(None):
            self._answer(kind, *words)
            self._may_die(0.003)
        if self.tick % 3 == 0:
            self.ledger.expire(self.tick)
        if self.tick % 11 == 0:
            self._merge()
        self._replace_the_dead()
        return all(self.ledger.complete(epoch) for epoch in range(self.epochs)) and not self.ledger.staged()

    def _stop(self) -> None:
        """The coordinator's process ends, or all of its machine."""
        self._count("coordinator died")
        assert self.ledger is not None
        self.ledger.close()
        self.ledger, self.up_at = None, self.tick + self.draw.randint(1, 10)
        if self.on_disk is not None and self.draw.random() < 0.4:
            self._count("power lost")
            delete_ledger(self.path)
            with closing(sqlite3.connect(self.path)) as restored:
                self.on_disk.backup(restored)

    def _on_disk(self) -> None:
        """What has been committed by now outlives power loss: the last call waited for it."""
        assert self.ledger is not None
        if self.on_disk is not None:
            self.on_disk.close()
        self.on_disk = sqlite3.connect(":memory:")
        self.ledger.database._connection.backup(self.on_disk)

    def _start(self) -> None:
        """Open the file; the head says which anchor counts, and where that is broken, the newest one that is not."""
        self.ledger = LEDGERS[self.weakness](own(self.path, durable=False))
        with self.ledger.database.transaction():
            stop_all(self.ledger)
        self._on_disk()
        self.ledger.add_blocks([BlockLength(0, len(self.lengths))])
        self.ledger.end_data()
        head = self.ledger.head
        if head is not None and self.weakness is Weakness.NONE:
            if self.goes_wrong(0.1, "anchor rotten"):
                self.rotten.add(head.anchor)
            whole = next((one for one in self.ledger.lineage() if one.anchor not in self.rotten), None)
            self.ledger.rollback(None if whole is None else whole.round)
            self._on_disk()
            self.outcome.wrong += violations(self.ledger)
        for name in self.names:
            self._start_trainer(name)

    def _start_trainer(self, name: str) -> None:
        assert self.ledger is not None
        generation = self.ledger.start_worker(name)
        self._on_disk()
        self.trainers.append(Trainer(self, name, generation, self.head()))

    def _replace_the_dead(self) -> None:
        """Those whose death is noticed, and some that only seem dead, get a successor."""
        assert self.ledger is not None
        for name in self.names:
            newest = [trainer for trainer in self.trainers if trainer.name == name][-1]
            silent = newest.gone or self.tick < newest.paused_until
            if silent and self.draw.random() < 0.1:
                if self.draw.random() < 0.5:
                    self.ledger.stop_worker(name, newest.generation, "it fell silent")
                self._start_trainer(name)

    def _answer(self, kind: str, trainer: Trainer, *words: Any) -> None:
        ledger = self.ledger
        assert ledger is not None
        if kind == "claim":
            (key,) = words
            given = ledger.claim(
                *(trainer.name, trainer.generation, self._order),
                **{"epochs": self.epochs, "now_s": self.tick, "lease_s": LEASE_TICKS, "key": key},
            )
            if isinstance(given, Lease):
                ledger.measure(given.chunk, self.lengths[given.chunk])
                given = given.measured(self.lengths[given.chunk])
            self.send(trainer, "claimed", key, given)
        elif kind == "renew":
            if any(isinstance(ledger.renew(lease, self.tick, LEASE_TICKS), Refused) for lease in words[0]):
                self.send(trainer, "lost", words[0])
        elif kind == "split":
            key, lease, at = words
            self.send(trainer, "split", key, ledger.split(lease, at))
        elif kind == "trained" and isinstance(ledger, CompleteWhenTrained):
            ledger.strike_off(words[0])
        elif kind == "report":
            key, learned, skipped, base = words
            answer = ledger.report(key, learned, skipped=skipped, base=base, path=key, checksum="sum")
            self.send(trainer, "reported", key, answer)

    def _merge(self) -> None:
        """One round: check the files, guard, sum up, write the anchor, commit; death may come between any two."""
        ledger = self.ledger
        assert ledger is not None
        accepted: list[Contribution] = []
        rejected: dict[str, str] = {}
        for one in ledger.staged():
            if one.path not in self.files or one.path in self.rotten:
                ledger.reject(one.name, "its file is missing or broken", lost=True)
            elif self.goes_wrong(0.03, "contribution refused"):
                rejected[one.name] = "the guard refused it"
            elif self.tick >= FAULTY_TICKS or self.draw.random() < 0.8:
                accepted.append(one)
        if not accepted and not rejected:
            return
        self._may_die(0.05)
        head = self.head()
        anchor = self._anchor() + sum((self.files[one.path] for one in accepted), np.zeros(self.size, np.int64))
        self.written += 1
        name = f"anchor {self.written}"
        self.files[name] = anchor
        self.newest_anchor = name
        self._may_die(0.05)
        names = [one.name for one in accepted]
        number = (head or 0) + 1

        def commit() -> Round | Refused:
            return ledger.commit(number, parent=head, accepted=names, rejected=rejected, anchor=name, checksum="sum")

        if self.goes_wrong(0.15, "death in a commit"):
            self._dying_after(self.draw.randint(0, 15 + 3 * len(names)))
        made = commit()
        self._on_disk()
        if commit() != made or isinstance(made, Refused):
            self.outcome.wrong.append(f"a commit gave {made}")
        self._may_die(0.05)

    def _may_die(self, chance: float) -> None:
        if self.goes_wrong(chance, "death between calls"):
            raise CoordinatorDied

    def _dying_after(self, statements: int) -> None:
        """Let the ledger's process end before the statement of that number."""
        assert self.ledger is not None
        database = self.ledger.database
        left = [statements]

        def mortal(genuine: Callable[..., Any]) -> Callable[..., Any]:
            def call(*words: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise CoordinatorDied
                return genuine(*words)

            return call

        database.rows = mortal(database.rows)  # type: ignore[method-assign]
        database.write = mortal(database.write)  # type: ignore[method-assign]

    def head(self) -> int | None:
        assert self.ledger is not None
        head = self.ledger.head
        return None if head is None else head.round

    def _anchor(self) -> Vector:
        """The anchor that the coordinator goes on from."""
        assert self.ledger is not None
        head = self.ledger.head
        name = head.anchor if head is not None else None
        if self.weakness is Weakness.ANCHOR_FIRST:
            name = self.newest_anchor
        return np.zeros(self.size, np.int64) if name is None else self.files[name]

    # Places

    def _order(self, epoch: int, position: int) -> int:
        return (position + self.shift * epoch) % len(self.lengths)

    @property
    def size(self) -> int:
        return int(self.first[-1]) * self.epochs

    def cells(self, epoch: int, chunk: int, start: int, end: int) -> slice:
        begin = epoch * int(self.first[-1]) + int(self.first[chunk])
        return slice(begin + start, begin + end)


def simulate(path: Path, seed: int, weakness: Weakness = Weakness.NONE) -> RunResult:
    """Play the run of that seed on a new ledger at `path`."""
    return Simulation(path, seed, weakness).run()
