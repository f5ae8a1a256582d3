"""The coordinator, simulated with faults: what goes wrong costs time, never a sequence; and each safeguard that is left
out shows. The last anchor of a run is the audit, not the ledger's own word."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.support.coordinator_simulation import Outcome, simulate
from tests.support.weak_ledgers import Weakness


def outcomes(folder: Path, seeds: range, weakness: Weakness = Weakness.NONE) -> dict[int, Outcome]:
    return {seed: simulate(folder / f"{seed}.sqlite", seed, weakness) for seed in seeds}


def broken(found: dict[int, Outcome]) -> dict[int, Outcome]:
    return {seed: outcome for seed, outcome in found.items() if not outcome.holds}


def test_nothing_is_lost_and_nothing_counts_twice(tmp_path: Path) -> None:
    assert broken(outcomes(tmp_path, range(1000, 1050))) == {}


@pytest.mark.slow
def test_a_thousand_runs(tmp_path: Path) -> None:
    found = outcomes(tmp_path, range(1000))
    assert broken(found) == {}
    suffered = sum((outcome.faults for outcome in found.values()), Counter[str]())
    assert min(suffered.values()) > 10 and len(suffered) == 15, suffered


@pytest.mark.parametrize("weakness", [weakness for weakness in Weakness if weakness is not Weakness.NONE])
def test_the_simulation_can_fail(tmp_path: Path, weakness: Weakness) -> None:
    assert len(broken(outcomes(tmp_path, range(30), weakness))) >= 5
