"""Real faults in turn within one run of two Ray workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from hrm_ray.launch.resources import usable_cpus
from tests.chaos import run_with_faults
from tests.support.faults import SURVIVED, fail_at, random_faults

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(usable_cpus() < 2, reason="two workers need two CPUs"),
]


def test_faults_of_every_kind_cost_no_row_and_no_weight(tmp_path: Path) -> None:
    faults = random_faults(1, len(SURVIVED))
    assert {fault.kind for fault in faults} == set(SURVIVED) and len(faults) == 10
    result = run_with_faults(tmp_path, faults)
    assert {row.cause for row in result.restarts} == {
        *("worker lost", "crash", "disk", "data unreadable", "actor lost", "cluster lost"),
    }  # fmt: skip


def test_faults_cost_no_carry_under_a_strategy_that_divides_the_optimizer(tmp_path: Path) -> None:
    faults = [fail_at(rank=1, step=4), fail_at(rank=0, step=7, kind="disk", attempt=1)]
    result = run_with_faults(tmp_path, faults, "zero1", "puzzle")
    assert [row.cause for row in result.restarts] == ["worker lost", "disk"]
