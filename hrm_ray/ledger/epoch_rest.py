"""What of an epoch is trained, where independent trainers have taken ranges from all over it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from hrm_ray.ledger.ranges import of_epoch
from hrm_ray.ledger.reader import LedgerReader
from hrm_ray.ledger.states import Range, State

_TRAINED = (State.MERGED, State.SKIPPED, State.QUARANTINED)


@dataclass(frozen=True)
class TrainedRange:
    """Sequences [start, end) of a chunk, and the position of the chunk in the order of claims."""

    position: int
    chunk: int
    start: int
    end: int


@dataclass(frozen=True)
class EpochRest:
    """Where an epoch stands: `trained` has its ranges that are trained (or set aside, and so are not trained again) in
    the order of claims, `sequences` how many that are, and `position` that of the first chunk with something left."""

    epoch: int
    position: int
    sequences: int
    trained: tuple[TrainedRange, ...]


def rest_of_epoch(ledger: LedgerReader) -> EpochRest:
    """Where the first epoch stands that is not complete; at its very start the end of the one before, after which a
    run may end. Staged reports count as not trained."""
    epoch = ledger.epoch
    found = _rest(ledger, epoch)
    return _rest(ledger, epoch - 1) if epoch and not found.trained else found


def _rest(ledger: LedgerReader, epoch: int) -> EpochRest:
    trained: list[TrainedRange] = []
    position: int | None = None
    beyond = 0
    by_position = sorted(of_epoch(ledger.database, epoch), key=lambda one: (one.position, one.start))
    for place, each in groupby(by_position, key=lambda one: one.position):
        ranges = list(each)
        trained += _joined(ranges)
        if position is None and any(one.state not in _TRAINED for one in ranges):
            position = place
        beyond = place + 1
    sequences = sum(one.end - one.start for one in trained)
    return EpochRest(epoch, beyond if position is None else position, sequences, tuple(trained))


def _joined(ranges: Iterable[Range]) -> list[TrainedRange]:
    """The trained ranges of a chunk, neighbours as one."""
    joined: list[TrainedRange] = []
    for one in ranges:
        if one.state not in _TRAINED or one.end is None:
            continue
        start = joined.pop().start if joined and joined[-1].end == one.start else one.start
        joined.append(TrainedRange(one.position, one.chunk, start, one.end))
    return joined
