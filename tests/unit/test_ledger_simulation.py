"""The protocol, simulated: what goes wrong costs time, never a sequence; and each safeguard that is left out shows.

One run is one seed; the last anchor of the run is the audit, not the ledger's own word.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.support.ledger_simulation import RunResult, simulate
from tests.support.weak_ledgers import Weakness

FAULTS = {
    *("message doubled", "worker died", "worker paused beyond its lease", "claim given up", "contribution refused"),
    *("file lost", "file broken", "anchor rotten", "death between calls", "death in a commit", "power lost"),
    *("coordinator died", "update skipped"),
}


def outcomes(folder: Path, seeds: range, weakness: Weakness = Weakness.NONE) -> dict[int, RunResult]:
    return {seed: simulate(folder / f"{seed}.sqlite", seed, weakness) for seed in seeds}


def broken(found: dict[int, RunResult]) -> dict[int, RunResult]:
    return {seed: outcome for seed, outcome in found.items() if not outcome.holds}


@pytest.mark.parametrize("first", range(0, 80, 10))
def test_nothing_is_lost_and_nothing_counts_twice(tmp_path: Path, first: int) -> None:
    assert broken(outcomes(tmp_path, range(first, first + 10))) == {}


@pytest.mark.slow
def test_a_thousand_runs(tmp_path: Path) -> None:
    found = outcomes(tmp_path, range(1000))
    assert broken(found) == {}
    suffered = sum((Counter(outcome.faults) for outcome in found.values()), Counter())
    assert set(suffered) == FAULTS and min(suffered.values()) > 50, suffered


@pytest.mark.parametrize("weakness", [weakness for weakness in Weakness if weakness is not Weakness.NONE])
def test_the_simulation_can_fail(tmp_path: Path, weakness: Weakness) -> None:
    """Of 20 runs, without each safeguard: unfenced 11 are wrong, complete when trained 17, anchor first 11."""
    found = broken(outcomes(tmp_path, range(20), weakness))
    assert len(found) >= 5
    assert any(outcome.twice for outcome in found.values())
    if weakness is Weakness.COMPLETE_WHEN_TRAINED:
        assert any(outcome.lost for outcome in found.values())
