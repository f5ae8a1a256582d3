"""The search for the largest value that fits: the true edge, with few trials, on devices that differ from estimates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.search.fitting import Outcome, largest_fit, most_trials, next_trial

PROCESS = 400e6
Device = Callable[[int], Outcome]


def search(estimates: Sequence[float], device: Device, limit: float) -> list[Outcome]:
    outcomes: list[Outcome] = []
    while (index := next_trial(estimates, outcomes, limit, PROCESS)) is not None:
        assert index not in {one.index for one in outcomes}
        outcomes.append(device(index))
    return outcomes


def device_of(peaks: Sequence[float], limit: float, *, kills: bool) -> Device:
    """A device with these peaks; one that kills tells no peak of what did not fit."""

    def tried(index: int) -> Outcome:
        fits = peaks[index] <= limit
        return Outcome(index, fits, None if kills and not fits else round(peaks[index]))

    return tried


@given(
    count=st.integers(1, 200),
    edge=st.integers(-1, 200),
    kills=st.booleans(),
    wrong=st.floats(0.05, 20),
    fixed=st.floats(0, 2e9),
)
def test_any_device_gives_its_edge_within_the_bound(
    count: int, edge: int, kills: bool, wrong: float, fixed: float
) -> None:
    """However wrong estimates are: the largest value that fits, as brute force finds it, in at most 2 log2 trials."""
    edge = min(edge, count - 1)
    estimates = [1e6 * wrong * (index + 1) for index in range(count)]
    peaks = [1e9 + fixed + (index - edge - 0.5) * 1e6 for index in range(count)]
    outcomes = search(estimates, device_of(peaks, 1e9 + fixed, kills=kills), 1e9 + fixed)
    brute = max((index for index in range(count) if peaks[index] <= 1e9 + fixed), default=None)
    assert largest_fit(outcomes) == brute
    assert len(outcomes) <= max(1, 2 * math.log2(count))


@given(st.lists(st.booleans(), min_size=1, max_size=64), st.randoms())
def test_a_device_of_any_mood_ends_the_search(answers: list[bool], random: object) -> None:
    """Also one whose answers are no edge at all: each value is tried once at most, within the bound."""
    outcomes = search(
        [float(index + 1) for index in range(len(answers))], lambda index: Outcome(index, answers[index]), 10.0
    )
    found = largest_fit(outcomes)
    assert len(outcomes) <= most_trials(len(answers))
    assert found is None or answers[found]


@pytest.mark.parametrize("kills", [False, True])
def test_few_trials_where_estimates_are_as_good_as_ours(kills: bool) -> None:
    """Measured memory 0.85 to 1.35 times the estimate and noise of 2 %, 32 values: 5 trials at most in the mean."""
    rng, taken = np.random.default_rng(1), []
    for _ in range(300):
        estimates = np.cumsum(rng.uniform(5e6, 60e6) * np.ones(32)) + rng.uniform(0, 500e6)
        noise = 1 + 0.02 * rng.standard_normal(32)
        peaks = np.maximum.accumulate(rng.uniform(300e6, 550e6) + rng.uniform(0.85, 1.35) * estimates * noise)
        limit = float(rng.uniform(peaks[0] * 0.9, peaks[-1] * 1.05))
        outcomes = search(estimates.tolist(), device_of(peaks.tolist(), limit, kills=kills), limit)
        assert largest_fit(outcomes) == max((i for i in range(32) if peaks[i] <= limit), default=None)
        taken.append(len(outcomes))
    assert statistics.mean(taken) <= 5 and max(taken) <= 10


def test_what_fits_whole_takes_one_trial() -> None:
    peaks = [500e6 + 1e6 * index for index in range(32)]
    outcomes = search([1e6 * (index + 1) for index in range(32)], device_of(peaks, 1e9, kills=False), 1e9)
    assert [one.index for one in outcomes] == [31]
