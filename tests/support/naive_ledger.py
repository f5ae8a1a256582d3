"""A ledger that is plainly right: every sequence by itself, in dictionaries.

One job: say what the real ledger must answer. No ranges, no cursor, no file; slow and short.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hrm_ray.ledger import State
from hrm_ray.ledger.states import MAX_ATTEMPTS, MAX_REJECTIONS

KernelCapabilities = tuple[int, int, int]
"""Epoch, position, sequence."""


@dataclass
class Cell:
    """One sequence of an epoch; `holder` is (worker, generation, attempt), `report` the contribution it is in."""

    state: State = State.PENDING
    holder: tuple[str, int, int] | None = None
    expiry_s: float | None = None
    attempt: int = 0
    failures: int = 0
    rejections: int = 0
    report: str | None = None
    skipped: bool = False

    def back(self, state: State = State.PENDING) -> None:
        self.state, self.holder, self.expiry_s, self.report, self.skipped = state, None, None, None, False

    def back_or_aside(self) -> None:
        hopeless = self.failures >= MAX_ATTEMPTS or self.rejections >= MAX_REJECTIONS
        self.back(State.QUARANTINED if hopeless else State.PENDING)


@dataclass
class Given:
    """A lease as the naive ledger gives it: whose, and which cells."""

    holder: tuple[str, int, int]
    epoch: int
    position: int
    start: int
    end: int

    @property
    def places(self) -> list[KernelCapabilities]:
        return [(self.epoch, self.position, at) for at in range(self.start, self.end)]


@dataclass
class NaiveLedger:
    """`lengths[p]` is the number of sequences of the chunk at position p, the same in all epochs."""

    lengths: list[int]
    epochs: int
    cells: dict[KernelCapabilities, Cell] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)
    rounds: list[tuple[int, list[str]]] = field(default_factory=list)
    reports: dict[str, list[KernelCapabilities]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for epoch in range(self.epochs):
            for position, length in enumerate(self.lengths):
                self.cells.update({(epoch, position, at): Cell() for at in range(length)})

    def start_worker(self, worker: str, number: int) -> None:
        for cell in self.cells.values():
            if cell.holder is not None and cell.holder[0] == worker:
                cell.failures += 1
                cell.back_or_aside()
        self.generations[worker] = number

    def stop_worker(self, worker: str, failed: bool) -> None:
        for cell in self.cells.values():
            if cell.holder is not None and cell.holder[0] == worker:
                cell.failures += failed
                cell.back_or_aside()
        self.generations.pop(worker, None)

    def claim(self, worker: str, now_s: float, lease_s: float | None) -> Given | None:
        """The first PENDING sequence and those PENDING right after it in its chunk."""
        self.expire(now_s)
        pending = sorted(place for place, cell in self.cells.items() if cell.state is State.PENDING)
        if not pending:
            return None
        epoch, position, start = pending[0]
        end = start
        while (epoch, position, end) in self.cells and self.cells[epoch, position, end].state is State.PENDING:
            end += 1
        cells = [self.cells[epoch, position, at] for at in range(start, end)]
        attempt = 1 + max(cell.attempt for cell in cells)
        failures, rejections = max(cell.failures for cell in cells), max(cell.rejections for cell in cells)
        holder = (worker, self.generations[worker], attempt)
        for cell in cells:
            cell.state, cell.holder, cell.attempt = State.LEASED, holder, attempt
            cell.failures, cell.rejections = failures, rejections
            cell.expiry_s = None if lease_s is None else now_s + lease_s
        return Given(holder, epoch, position, start, end)

    def expire(self, now_s: float) -> None:
        for cell in self.cells.values():
            if cell.state is State.LEASED and cell.expiry_s is not None and cell.expiry_s <= now_s:
                cell.failures += 1
                cell.back_or_aside()

    def holds(self, given: Given) -> bool:
        return all(self.cells[place].holder == given.holder for place in given.places)

    def renew(self, given: Given, until_s: float) -> bool:
        if not self.holds(given):
            return False
        for place in given.places:
            self.cells[place].expiry_s = until_s
        return True

    def release(self, given: Given) -> bool:
        if not self.holds(given):
            return False
        for place in given.places:
            self.cells[place].back()
        return True

    def split(self, given: Given, at: int) -> Given | None:
        if not self.holds(given):
            return None
        for place in given.places:
            if place[2] >= at:
                cell = self.cells[place]
                cell.back()
                cell.failures = cell.rejections = 0
        return Given(given.holder, given.epoch, given.position, given.start, at)

    def report(self, name: str, leases: list[Given], skipped: list[Given]) -> bool:
        if not all(self.holds(given) for given in (*leases, *skipped)):
            return False
        self.reports[name] = [place for given in (*leases, *skipped) for place in given.places]
        for place in self.reports[name]:
            cell = self.cells[place]
            cell.back(State.TRAINED)
            cell.report = name
            cell.skipped = any(place in given.places for given in skipped)
        return True

    def learned(self, name: str) -> int:
        return sum(not self.cells[place].skipped for place in self.reports[name])

    @property
    def staged(self) -> list[str]:
        taken = {name for _, names in self.rounds for name in names}
        return [name for name in self.reports if name not in taken]

    def reject(self, name: str, lost: bool) -> None:
        for place in self.reports.pop(name):
            cell = self.cells[place]
            cell.failures += lost
            cell.rejections += not lost
            cell.back_or_aside()

    def commit(self, number: int, accepted: list[str], rejected: list[str]) -> None:
        for name in rejected:
            self.reject(name, lost=False)
        for name in accepted:
            for place in self.reports[name]:
                cell = self.cells[place]
                cell.state = State.SKIPPED if cell.skipped else State.MERGED
                cell.failures = cell.rejections = 0
        self.rounds.append((number, accepted))

    def rollback(self, to: int | None) -> None:
        kept = 0 if to is None else 1 + [number for number, _ in self.rounds].index(to)
        if kept == len(self.rounds):
            return
        del self.rounds[kept:]
        surviving = {name for _, names in self.rounds for name in names}
        for cell in self.cells.values():
            if cell.state in (State.LEASED, State.TRAINED) or (
                cell.report is not None and cell.report not in surviving
            ):
                cell.back()
        self.reports = {name: places for name, places in self.reports.items() if name in surviving}
        self.generations.clear()

    def reopen(self) -> None:
        for cell in self.cells.values():
            if cell.state is State.LEASED:
                cell.back()
        self.generations.clear()

    def requeue(self) -> None:
        for cell in self.cells.values():
            if cell.state is State.QUARANTINED:
                cell.back()
                cell.failures = cell.rejections = 0
