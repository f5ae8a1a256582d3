"""Runs of the coordinator in one process, with everything going wrong, on a real ledger and a virtual clock.

The "model" is a vector of counters: training a sequence adds 1 in its place, a report is the difference of two vectors.
So the last anchor says what was learned, whatever the ledger believes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from hrm_ray.independent.calls import AnchorRef, Claimed, Finished, Joined, News, Progress, Renewed, Report, Reported
from hrm_ray.independent.coordinator import LedgerCoordinator, Merged, MergeRequest, Rules, Stale, TrainerState
from hrm_ray.independent.decisions import LEASE_S
from hrm_ray.ledger import BlockLength, Lease, Refused, Span, State
from hrm_ray.ledger import ranges as rows
from hrm_ray.ledger.database import own
from hrm_ray.ledger.rounds import stop_all
from hrm_ray.ledger.verify import violations
from tests.support.weak_ledgers import LEDGERS, Weakness

Vector = npt.NDArray[np.int64]
FAULTY_EVENTS = 220
"""After so many events nothing more goes wrong, so that a run can end."""
LAST_EVENT = 6000
BATCH = 2


@dataclass
class Outcome:
    """Sequences that the last anchor has never or more than once learned, and what else is wrong."""

    lost: int = 0
    twice: int = 0
    wrong: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    events: int = 0

    @property
    def holds(self) -> bool:
        return not (self.lost or self.twice or self.wrong)


@dataclass
class SimulatedTrainer:
    """A trainer that learns a batch at a time, and reports when a unit is full."""

    name: str
    generation: int
    anchor: AnchorRef
    weights: Vector
    snap: Vector
    leases: list[Lease] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    updates: int = 0
    unit: int = 1
    paused: int = 0
    said: Report | None = None

    def at(self, lease: Lease) -> int:
        """The first sequence of a lease that is not trained yet."""
        ends = [span.end for span in self.spans if (span.epoch, span.chunk) == (lease.epoch, lease.chunk)]
        return max([end for end in ends if end >= lease.start], default=lease.start)


class Unfenced(LedgerCoordinator):
    """Takes a report whoever holds its ranges by now."""

    def _seen(self, trainer: str, generation: int) -> TrainerState | Refused:
        return self.trainers.setdefault(trainer, TrainerState(generation, self._clock()))

    def _stage(self, report: Report) -> None:
        try:
            super()._stage(report)
        except Stale:
            found = [rows.at(self.ledger.database, one.epoch, one.chunk, one.start) for one in report.leases]
            ends = [one for one, row in zip(report.leases, found, strict=True) if row is not None and row.end]
            if ends:
                leases = [replace(one, end=None) for one in ends]
                self.ledger.report(report.name, leases, base=None, path=report.path, checksum=report.sha256)


class CoordinatorSimulation:
    """One run from a seed."""

    def __init__(self, path: Path, seed: int, weakness: Weakness = Weakness.NONE) -> None:
        self.path, self.weakness, self.draw = path, weakness, Random(seed)
        draw = self.draw
        self.lengths = [draw.randint(0, 7) for _ in range(draw.randint(2, 5))] + [draw.randint(1, 7)]
        self.epochs = draw.randint(1, 2)
        self.first = np.cumsum([0, *self.lengths])
        self.size = int(self.first[-1]) * self.epochs
        budget = draw.randint(1, self.size) if draw.random() < 0.3 else None
        self.rules = Rules(BATCH, BATCH, draw.choice(["auto", 1, 3, "end"]), budget=budget, epochs=self.epochs)
        self.now_s, self.events, self.serial = 0.0, 0, 0
        self.files: dict[str, Vector] = {"start": np.zeros(self.size, np.int64)}
        self.newest = "start"
        self.trainers: dict[str, SimulatedTrainer] = {}
        self.old_reports: list[Report] = []
        self.out = Outcome()
        self.pending: tuple[MergeRequest, Merged] | None = None
        self.coordinator = self._opened()

    def run(self) -> Outcome:
        names = [f"t{number}" for number in range(self.draw.randint(1, 4))]
        while not self._complete():
            self.events += 1
            if self.events > LAST_EVENT:
                self.out.wrong.append("the run does not end")
                break
            self.now_s += self.draw.random() * 2
            actor = self.draw.randrange(len(names) + 2)
            if actor < len(names):
                self._act(names[actor])
            elif actor == len(names):
                self._merge()
            else:
                self._mishap()
        return self._audited()

    def _complete(self) -> bool:
        if self.weakness is Weakness.COMPLETE_WHEN_TRAINED:
            ledger = self.coordinator.ledger
            untouched = any(not one.complete and one.untouched for one in ledger.counts())
            states = Counter(state for one in ledger.counts() for state in one.states)
            begun = len(ledger.counts()) == self.epochs
            return begun and not untouched and not states[State.PENDING] and not states[State.LEASED]
        return self.coordinator.finished

    def _audited(self) -> Outcome:
        ledger = self.coordinator.ledger
        learned = self._weights_of(self.coordinator.anchor)
        expected = np.ones_like(learned)
        for one in (one for epoch in range(self.epochs) for one in rows.of_epoch(ledger.database, epoch)):
            if one.state in (State.QUARANTINED, State.SKIPPED) and one.end is not None:
                expected[self._cells(one.epoch, one.chunk, one.start, one.end)] = 0
        self.out.twice = int((learned > expected).sum())
        if self.rules.budget is None:
            self.out.lost = int((learned < expected).sum())
        elif learned.sum() != self.rules.budget and self.coordinator.ledger.epoch < self.epochs:
            self.out.wrong.append(f"{learned.sum()} of {self.rules.budget} samples were learned")
        if self.weakness is Weakness.NONE:
            self.out.wrong += violations(ledger)
            if self.coordinator.anchor.total_sequences != learned.sum():
                self.out.wrong.append(f"{self.coordinator.anchor} has learned {learned.sum()}")
        self.out.events = self.events
        ledger.close()
        return self.out

    def _opened(self) -> LedgerCoordinator:
        ledger = LEDGERS[self.weakness](own(self.path, durable=False))
        with ledger.database.transaction():
            stop_all(ledger)
        ledger.add_blocks([BlockLength(0, len(self.lengths))])
        ledger.end_data()
        head = ledger.head
        anchor = AnchorRef(0, "start", "start", 0)
        if head is not None:
            anchor = AnchorRef(head.round, head.anchor, head.checksum, head.total_sequences)
        kind = Unfenced if self.weakness is Weakness.UNFENCED else LedgerCoordinator
        return kind(ledger, anchor, self.rules, self._order, lambda: self.now_s)

    def _order(self, epoch: int, position: int) -> int:
        return (position + epoch) % len(self.lengths)

    def _weights_of(self, anchor: AnchorRef) -> Vector:
        return self.files[self.newest if self.weakness is Weakness.ANCHOR_FIRST else anchor.path]

    def _cells(self, epoch: int, chunk: int, start: int, end: int) -> slice:
        begin = epoch * int(self.first[-1]) + int(self.first[chunk])
        return slice(begin + start, begin + end)

    def _wrong(self, chance: float, what: str) -> bool:
        happens = self.events < FAULTY_EVENTS and self.draw.random() < chance
        if happens:
            self.out.faults[what] += 1
        return happens

    # Trainers

    def _act(self, name: str) -> None:
        trainer = self.trainers.get(name)
        if trainer is not None and trainer.paused:
            trainer.paused -= 1
            return
        if trainer is None:
            self._join(name)
        elif self._wrong(0.02, "trainer killed"):
            del self.trainers[name]
            if self.draw.random() < 0.7:
                self.coordinator.lost(name, "it was killed")
        elif self._wrong(0.02, "pause"):
            trainer.paused = self.draw.randint(1, 60)
        elif trainer.updates >= trainer.unit:
            self._report(trainer, keeps=True)
        else:
            self._train(trainer)

    def _join(self, name: str) -> None:
        joined = self.coordinator.join(name)
        if isinstance(joined, Joined):
            weights = self._weights_of(joined.news.anchor)
            self.trainers[name] = SimulatedTrainer(
                name, joined.generation, joined.news.anchor, weights.copy(), weights.copy(), unit=joined.report_updates
            )

    def _train(self, trainer: SimulatedTrainer) -> None:
        if self.draw.random() < 0.2:
            progress = Progress(trainer.updates, 0, 1.0, 1.0, None)
            answer = self.coordinator.renew(trainer.name, trainer.generation, trainer.leases, progress)
            if isinstance(answer, Refused):
                del self.trainers[trainer.name]
                return
            assert isinstance(answer, Renewed)
            if len(answer.leases) < len(trainer.leases):
                self._back(trainer, list(answer.leases))
            self._hear(trainer, answer.news)
        lease = next((one for one in trainer.leases if one.end is None or trainer.at(one) < one.end), None)
        if lease is None:
            self._claim(trainer)
            return
        if lease.end is None:
            measured = self.coordinator.measure(lease, self.lengths[lease.chunk])
            trainer.leases.remove(lease)
            if isinstance(measured, Lease):
                trainer.leases.append(measured)
            return
        start = trainer.at(lease)
        end = min(start + BATCH, lease.end)
        skipped = self._wrong(0.03, "update skipped")
        if not skipped:
            trainer.weights[self._cells(lease.epoch, lease.chunk, start, end)] += 1
        trainer.spans.append(Span(lease.epoch, lease.chunk, start, end, skipped))
        trainer.updates += 1

    def _claim(self, trainer: SimulatedTrainer) -> None:
        self.serial += 1
        key = f"{trainer.name} {trainer.generation} {self.serial}"
        given = self.coordinator.claim(trainer.name, trainer.generation, key, trainer.anchor.sha256)
        if self._wrong(0.05, "claim doubled"):
            again = self.coordinator.claim(trainer.name, trainer.generation, key, trainer.anchor.sha256)
            if isinstance(given, Claimed) and isinstance(again, Claimed) and again.lease.start != given.lease.start:
                self.out.wrong.append(f"one claim was answered with {given.lease} and {again.lease}")
        if isinstance(given, Refused):
            self.trainers.pop(trainer.name)
            return
        if isinstance(given, Claimed):
            trainer.leases.append(given.lease)
        elif trainer.spans or trainer.leases:
            self._report(trainer, keeps=not isinstance(given, Finished))
        self._hear(trainer, given.news)

    def _hear(self, trainer: SimulatedTrainer, news: News) -> None:
        if news.anchor != trainer.anchor or news.rejected:
            base = self._weights_of(news.anchor)
            trainer.weights = base + (trainer.weights - trainer.snap)
            trainer.snap, trainer.anchor = base.copy(), news.anchor

    def _back(self, trainer: SimulatedTrainer, leases: list[Lease]) -> None:
        """To the anchor: what was not reported is dropped."""
        trainer.weights = self._weights_of(trainer.anchor).copy()
        trainer.snap = trainer.weights.copy()
        trainer.spans, trainer.updates, trainer.leases = [], 0, leases

    def _report(self, trainer: SimulatedTrainer, *, keeps: bool) -> None:
        self.serial += 1
        name = f"{trainer.name}-{trainer.generation}-{self.serial}"
        self.files[name] = trainer.weights - trainer.snap
        report = Report(
            name=name,
            trainer=trainer.name,
            generation=trainer.generation,
            base=trainer.anchor,
            path=name,
            sha256=name,
            leases=tuple(trainer.leases),
            spans=tuple(trainer.spans),
            updates=trainer.updates,
            tokens=0,
            loss=1.0,
            seconds=1.0 * trainer.updates,
            keeps=keeps,
        )
        if self._wrong(0.05, "killed before its report"):
            del self.trainers[trainer.name]
            return
        answer = self.coordinator.report(report)
        if self._wrong(0.1, "report doubled"):
            again = self.coordinator.report(report)
            if isinstance(answer, Reported) and not isinstance(again, Reported):
                self.out.wrong.append(f"a second report was answered with {again}")
        self.old_reports.append(report)
        if self._wrong(0.03, "killed after its report"):
            del self.trainers[trainer.name]
            return
        if isinstance(answer, Refused):
            kept = self.coordinator.renew(trainer.name, trainer.generation, trainer.leases, Progress(0, 0, 1, 1, None))
            if isinstance(kept, Refused):
                self.trainers.pop(trainer.name)
            else:
                self._back(trainer, list(kept.leases))
            return
        trainer.snap = trainer.weights.copy()
        trainer.spans, trainer.updates, trainer.leases = [], 0, list(answer.rest)
        trainer.unit = answer.report_updates
        self._hear(trainer, answer.news)

    # Merger and mishaps

    def _merge(self) -> None:
        """Half of the times a merge begins, and ends with a later event; so trainers go on meanwhile."""
        if self.pending is not None:
            request, merged = self.pending
            self.pending = None
            if self._wrong(0.1, "coordinator killed before a commit"):
                self._restart()
                return
            made = self.coordinator.commit(request, merged)
            if bool(merged.accepted) != (made is not None):
                self.out.wrong.append(f"a commit of {merged.accepted} gave {made}")
            if self._wrong(0.1, "coordinator killed after a commit"):
                self._restart()
            return
        self.coordinator.tick()
        due = self.coordinator.due()
        if due is None:
            return
        if self._wrong(0.1, "merger killed"):
            self.coordinator.abandon()
            return
        rejected: dict[str, str] = {}
        lost: dict[str, str] = {}
        accepted: list[str] = []
        total = self._weights_of(due.parent).copy()
        for member in due.members:
            if self._wrong(0.05, "file lost"):
                lost[member.name] = "its file is missing"
            elif self._wrong(0.05, "rejected"):
                rejected[member.name] = "the guard rejected it"
            else:
                accepted.append(member.name)
                total += self.files[member.path]
        path = ""
        if accepted:
            self.serial += 1
            path = self.newest = f"anchor {self.serial}"
            self.files[path] = total
        self.pending = due, Merged(tuple(accepted), rejected, lost, path, path, {}, 0.1)

    def _mishap(self) -> None:
        if self._wrong(0.03, "coordinator killed"):
            self._restart()
        elif self._wrong(0.05, "long pause"):
            self.now_s += LEASE_S * self.draw.choice((0.6, 1.1))
        elif self.old_reports and self._wrong(0.2, "late report"):
            report = self.draw.choice(self.old_reports)
            self.coordinator.report(report)
            self.coordinator.report(replace(report, name=f"{report.name} again"))

    def _restart(self) -> None:
        """The coordinator's process ends, and is started again; trainers meet it with what they have."""
        self.coordinator.ledger.close()
        self.pending = None
        self.coordinator = self._opened()


def simulate(path: Path, seed: int, weakness: Weakness = Weakness.NONE) -> Outcome:
    """Play the run of that seed on a new ledger at `path`."""
    return CoordinatorSimulation(path, seed, weakness).run()
