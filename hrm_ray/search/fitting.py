"""Finds the largest of some values that fits into memory with few trials: from the outcomes so far to the next trial.

Nothing is run here. Estimates of memory only say which value to try next; what fits is what trials say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_RATIO = 1.1
"""Measured memory of an update by its estimate, before anything is measured."""


@dataclass(frozen=True)
class Outcome:
    """A trial of the value with this index: whether it fitted, and the peak in bytes where it could be measured."""

    index: int
    fits: bool
    peak_bytes: int | None = None


def most_trials(values: int) -> int:
    """The most trials that a search among so many values takes: 2 log2 of their number, and one for a single value."""
    return max(1, math.floor(2 * math.log2(values)))


def largest_fit(outcomes: Sequence[Outcome]) -> int | None:
    """The index of the largest value that fitted; None if none has."""
    return max((one.index for one in outcomes if one.fits), default=None)


def next_trial(
    estimates: Sequence[float],
    outcomes: Sequence[Outcome],
    limit_bytes: float,
    process_bytes: float,
    known: int = 0,
) -> int | None:
    """The index of the value to try next, or None once the largest one that fits is known (`largest_fit`).

    `estimates` are the bytes of an update for each value, ascending with the value. A trial may take `limit_bytes`, of
    which the process takes about `process_bytes` without any update. The value that the outcomes so far predict as the
    largest is tried, unless the trials that are left would not suffice to halve what is open after it. The first
    `known` outcomes were known before the search.
    """
    fitted = largest_fit(outcomes)
    low = -1 if fitted is None else fitted
    high = min((one.index for one in outcomes if not one.fits), default=len(estimates)) - 1
    if low >= high:
        return None
    aim = _predicted(estimates, outcomes, limit_bytes, process_bytes)
    # After this trial at most so many answers may be open: halving them takes the trials that are then left.
    open_after = 2 ** max(0, most_trials(len(estimates)) - (len(outcomes) - known) - 1)
    aim = min(max(aim, high + 1 - open_after), low + open_after)
    return min(max(aim, low + 1), high)


def _predicted(
    estimates: Sequence[float], outcomes: Sequence[Outcome], limit_bytes: float, process_bytes: float
) -> int:
    """The index of the largest value whose memory is predicted to fit; -1 if none is."""
    fixed_bytes, ratio = _line(estimates, outcomes, limit_bytes, process_bytes)
    fitting = [index for index, size in enumerate(estimates) if fixed_bytes + ratio * size <= limit_bytes]
    aim = max(fitting, default=-1)
    if outcomes and not outcomes[-1].fits and outcomes[-1].peak_bytes is None:
        # Without a figure of how far it was too large: a larger step down each time.
        failures = 0
        for one in reversed(outcomes):
            if one.fits or one.peak_bytes is not None:
                break
            failures += 1
        aim = min(aim, outcomes[-1].index - 2 ** (failures - 1))
    return aim


def _line(
    estimates: Sequence[float], outcomes: Sequence[Outcome], limit_bytes: float, process_bytes: float
) -> tuple[float, float]:
    """Memory as (fixed bytes, ratio): a peak is fixed + ratio x estimate, through the two measured trials that are
    nearest to the limit."""
    measured = [(estimates[one.index], one.peak_bytes) for one in outcomes if one.peak_bytes is not None]
    measured.sort(key=lambda point: abs(point[1] - limit_bytes))
    if not measured:
        return process_bytes, FIRST_RATIO
    (size, peak), *others = measured
    for other_size, other_peak in others[:1]:
        slope = (peak - other_peak) / (size - other_size) if size != other_size else 0.0
        if slope > 0:
            return peak - slope * size, slope
    ratio = (peak - process_bytes) / size if size else 0.0
    # A process that is smaller than assumed says nothing about the ratio.
    return (process_bytes, ratio) if ratio > FIRST_RATIO / 4 else (peak - FIRST_RATIO * size, FIRST_RATIO)
