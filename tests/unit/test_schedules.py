"""The learning rate at known updates."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.train.schedules import SCHEDULES, Schedule


def schedule(kind: str, warmup: int = 10, total: int = 110, ratio: float = 0.1, decay: float = 0.2) -> Schedule:
    return Schedule(kind, warmup, total, ratio, decay)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warm_up_is_linear_from_the_first_update(kind: str) -> None:
    """Update 1 already moves: 1/10 of the rate; update 10 has all of it."""
    factors = [schedule(kind).factor(step) for step in range(1, 11)]
    assert factors == pytest.approx([step / 10 for step in range(1, 11)], rel=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_without_warm_up_the_first_update_is_nearly_full(kind: str) -> None:
    assert schedule(kind, warmup=0).factor(1) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("kind", sorted(set(SCHEDULES) - {"constant"}))
def test_the_end_is_the_least_ratio_and_stays(kind: str) -> None:
    for step in (110, 111, 5000):
        assert schedule(kind).factor(step) == pytest.approx(0.1, rel=1e-12)
    assert schedule(kind).factor(109) > 0.1


@given(step=st.integers(1, 400), warmup=st.integers(0, 50), rest=st.integers(1, 300), ratio=st.floats(0, 1))
def test_cosine_is_the_formula_of_the_reference(step: int, warmup: int, rest: int, ratio: float) -> None:
    """ACTV1_SPEC, section 11, inside the run."""
    total = warmup + rest
    step = min(step, total)
    want = (
        step / warmup
        if step < warmup
        else ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    )
    assert schedule("cosine", warmup, total, ratio).factor(step) == pytest.approx(want, rel=1e-12, abs=1e-15)


def test_the_ratio_of_the_reference_keeps_the_rate() -> None:
    """Its default, lr_min_ratio 1, is a constant rate after the warm-up."""
    assert [schedule("cosine", ratio=1.0).factor(step) for step in (10, 50, 110)] == [1.0, 1.0, 1.0]


def test_linear_by_hand() -> None:
    assert [schedule("linear").factor(step) for step in (10, 35, 60, 110)] == pytest.approx([1.0, 0.775, 0.55, 0.1])


def test_constant() -> None:
    assert {schedule("constant").factor(step) for step in (10, 60, 110, 200)} == {1.0}


def test_wsd_holds_then_falls_linearly() -> None:
    """Without warm-up: 100 updates, the last 20 of them fall from 1 to the least ratio."""
    falls = schedule("wsd", warmup=0, total=100)
    assert [falls.factor(step) for step in (1, 50, 79, 80)] == pytest.approx([1.0] * 4, rel=1e-12)
    assert [falls.factor(step) for step in (85, 90, 100)] == pytest.approx([0.775, 0.55, 0.1], rel=1e-12)


def test_wsd_that_only_falls() -> None:
    falls = schedule("wsd", warmup=0, total=100, decay=1.0)
    assert [falls.factor(step) for step in (25, 50, 100)] == pytest.approx([0.775, 0.55, 0.1], rel=1e-12)


def test_wsd_share_is_of_all_updates() -> None:
    """`--wsd-decay-ratio`: share of all weight updates. 10 of warm-up and 90 more: the fall takes 20, from 80 on."""
    falls = schedule("wsd", warmup=10, total=100)
    assert [falls.factor(step) for step in (80, 90, 100)] == pytest.approx([1.0, 0.55, 0.1], rel=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_odd_lengths_do_not_divide_by_zero(kind: str) -> None:
    """A warm-up as long as the run, a run of one update, and a length that was not known."""
    for warmup, total in ((10, 10), (0, 1), (0, 0), (5, 0)):
        for step in (1, 2, 9, 10, 11):
            assert 0 < schedule(kind, warmup, total).factor(step) <= 1
