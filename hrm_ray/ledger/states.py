"""The states of a range of a chunk, and the transitions between them, as pure functions.

A transition takes a range and gives the range that it becomes; a state that does not allow it is a bug of the caller
and a ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntEnum

MAX_ATTEMPTS = 5
"""Failed attempts (expiry, death of the worker, a lost file) after which a range is quarantined."""
MAX_REJECTIONS = 2
"""Rejected contributions after which a range is quarantined."""


class State(IntEnum):
    """The state of a range. The numbers are stored in the file.

    SKIPPED ranges were read in a weight update that was skipped (non-finite gradients): the weights of the round that
    committed them have passed over them and have not learned them.
    """

    PENDING = 0
    LEASED = 1
    TRAINED = 2
    MERGED = 3
    QUARANTINED = 4
    SKIPPED = 5


class Idle(Enum):
    """Why a claim returns no lease."""

    MORE_DATA = "all known chunks are claimed, and the end of the data is not known yet"
    OTHERS = "the remaining ranges are leased, or wait for their round"
    DONE = "every range of the requested epochs is merged, skipped or quarantined"


@dataclass(frozen=True)
class Refused:
    """Why a call changed nothing: a stale lease, for example, or a head that has moved."""

    reason: str


@dataclass(frozen=True)
class Span:
    """The packed sequences [start, end) of a chunk in an epoch. `skipped`: their update was skipped."""

    epoch: int
    chunk: int
    start: int
    end: int
    skipped: bool = False

    @property
    def sequences(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Lease:
    """What a worker trains: sequences [start, end) of a chunk, with the fence (generation, attempt) for its report.

    `end` is None until the chunk has been measured: then the lease goes to the chunk's end. `chunk` counts from the
    start of the data, `chunk_in_block` from the start of its block; `position` is the chunk's place in the epoch's
    order. `expiry_s` is on the ledger owner's clock; None: never.
    """

    worker: str
    generation: int
    attempt: int
    epoch: int
    position: int
    block: int
    chunk_in_block: int
    chunk: int
    start: int
    end: int | None
    expiry_s: float | None

    def measured(self, sequences: int) -> Lease:
        """This lease once the chunk is known to have that many sequences."""
        return self if self.end is not None else replace(self, end=sequences)


@dataclass(frozen=True)
class Range:
    """Sequences [start, end) of a chunk in an epoch, and their state; one row of the ledger.

    `end` is None until the chunk has been measured. `attempt` counts the leases that any of its sequences ever had, so
    that it rises with every lease of a sequence, through splits and rollbacks too: that makes (generation, attempt) a
    fence. `failures` and `rejections` are those since the range was last merged. `contribution` is the number of
    the report it was trained in. `reason` says why it is QUARANTINED, or why its update was skipped.
    """

    epoch: int
    position: int
    start: int
    chunk: int
    end: int | None
    state: State = State.PENDING
    worker: str | None = None
    generation: int | None = None
    attempt: int = 0
    expiry_s: float | None = None
    failures: int = 0
    rejections: int = 0
    contribution: int | None = None
    reason: str | None = None

    @property
    def sequences(self) -> int:
        """The number of sequences; 0 while unknown."""
        return 0 if self.end is None else self.end - self.start


def fenced(held: Range, lease: Lease) -> bool:
    """Whether `lease` is no longer the lease of `held`."""
    return (held.state, held.worker, held.generation, held.attempt) != (
        State.LEASED,
        lease.worker,
        lease.generation,
        lease.attempt,
    )


def lease(pending: Range, worker: str, generation: int, expiry_s: float | None) -> Range:
    """PENDING to LEASED: the next attempt at it."""
    _require(pending, State.PENDING)
    return replace(
        pending,
        state=State.LEASED,
        worker=worker,
        generation=generation,
        attempt=pending.attempt + 1,
        expiry_s=expiry_s,
    )


def renew(held: Range, expiry_s: float | None) -> Range:
    """LEASED stays LEASED, for longer."""
    _require(held, State.LEASED)
    return replace(held, expiry_s=expiry_s)


def release(held: Range) -> Range:
    """LEASED to PENDING, without a failed attempt."""
    _require(held, State.LEASED)
    return _pending(held)


def lose(held: Range, reason: str) -> Range:
    """LEASED (expired, worker died) or TRAINED (its file is lost) to PENDING; after MAX_ATTEMPTS to QUARANTINED."""
    _require(held, State.LEASED, State.TRAINED)
    return _aside_if_hopeless(replace(held, failures=held.failures + 1), reason)


def split(held: Range, at: int) -> tuple[Range, Range]:
    """LEASED to LEASED [start, at) and PENDING [at, end); the progress clears the failures of the rest."""
    _require(held, State.LEASED)
    if held.end is None or not held.start < at < held.end:
        raise ValueError(f"sequences [{held.start}, {held.end}) cannot be split at {at}")
    return replace(held, end=at), replace(_pending(held), start=at, failures=0, rejections=0)


def train(held: Range, contribution: int, skipped: str | None = None) -> Range:
    """LEASED to TRAINED, by the report of that number; `skipped` is the reason why its update was skipped."""
    _require(held, State.LEASED)
    if held.end is None:
        raise ValueError(f"chunk {held.chunk} is reported before it was measured")
    return replace(_pending(held), state=State.TRAINED, contribution=contribution, reason=skipped)


def merge(trained: Range) -> Range:
    """TRAINED to MERGED, or to SKIPPED where its update was skipped; failures are cleared."""
    _require(trained, State.TRAINED)
    state = State.MERGED if trained.reason is None else State.SKIPPED
    return replace(trained, state=state, failures=0, rejections=0)


def reject(trained: Range, reason: str) -> Range:
    """TRAINED to PENDING because its contribution was rejected; after MAX_REJECTIONS to QUARANTINED."""
    _require(trained, State.TRAINED)
    return _aside_if_hopeless(replace(trained, rejections=trained.rejections + 1), reason)


def undo(changed: Range) -> Range:
    """LEASED, TRAINED, MERGED or SKIPPED to PENDING after a rollback, without a failed attempt."""
    _require(changed, State.LEASED, State.TRAINED, State.MERGED, State.SKIPPED)
    return _pending(changed)


def requeue(aside: Range) -> Range:
    """QUARANTINED to PENDING; failures are cleared."""
    _require(aside, State.QUARANTINED)
    return replace(_pending(aside), failures=0, rejections=0)


def join(first: Range, second: Range) -> Range:
    """Join two neighbouring PENDING ranges of a chunk, with the larger of each count."""
    _require(first, State.PENDING)
    _require(second, State.PENDING)
    if (first.epoch, first.chunk, first.end) != (second.epoch, second.chunk, second.start):
        raise ValueError(f"{first} and {second} are not neighbours")
    return replace(
        first,
        end=second.end,
        attempt=max(first.attempt, second.attempt),
        failures=max(first.failures, second.failures),
        rejections=max(first.rejections, second.rejections),
    )


def _pending(held: Range) -> Range:
    return replace(
        held, state=State.PENDING, worker=None, generation=None, expiry_s=None, contribution=None, reason=None
    )


def _aside_if_hopeless(failed: Range, reason: str) -> Range:
    pending = _pending(failed)
    if pending.failures >= MAX_ATTEMPTS:
        return replace(
            pending,
            state=State.QUARANTINED,
            reason=f"{pending.failures} attempts failed; the last: {reason}",
        )
    if pending.rejections >= MAX_REJECTIONS:
        return replace(
            pending,
            state=State.QUARANTINED,
            reason=f"rejected {pending.rejections} times; the last: {reason}",
        )
    return pending


def _require(found: Range, *allowed: State) -> None:
    if found.state not in allowed:
        raise ValueError(f"a range in state {found.state.name} does not allow this transition: {found}")
