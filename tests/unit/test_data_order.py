"""The order of an epoch: a permutation, keyed, well mixed, and computable piece by piece."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.data.order import epoch_order

ORDER_OF_TEN = [2, 0, 4, 8, 6, 3, 1, 5, 7, 9]
ORDER_OF_A_TRILLION = [15325045489, 780878019624, 419403897333]


def whole(seed: int, epoch: int, count: int, linear: bool = False) -> np.ndarray:
    return epoch_order(seed, epoch, count, linear).at(np.arange(count))


@given(count=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_every_sample_comes_exactly_once(count: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(whole(seed, epoch, count)), np.arange(count))


@given(count=st.integers(1, 3000), linear=st.booleans(), data=st.data())
def test_any_part_can_be_asked_for_alone(count: int, linear: bool, data: st.DataObject) -> None:
    order = epoch_order(3, 1, count, linear)
    positions = np.array(data.draw(st.lists(st.integers(-1, count - 1), max_size=20)), dtype=np.int64)
    table = np.append(order.at(np.arange(count)), -1)  # position -1 reads the appended -1
    assert np.array_equal(order.at(positions), table[positions])
    assert order.at(positions.reshape(1, -1)).shape == (1, len(positions))


def test_linear_is_the_identity() -> None:
    assert np.array_equal(whole(5, 2, 100, linear=True), np.arange(100))


def test_seed_epoch_and_count_each_change_the_order() -> None:
    base = whole(0, 0, 1000)
    assert not np.array_equal(base, whole(1, 0, 1000))
    assert not np.array_equal(base, whole(0, 1, 1000))
    assert not np.array_equal(base[:900], whole(0, 0, 1001)[:900])
    assert np.array_equal(base, whole(0, 0, 1000))


def test_the_order_of_today_is_the_order_of_tomorrow() -> None:
    """A resumed run must find the order it left, on any machine and with any version."""
    assert whole(0, 0, 10).tolist() == ORDER_OF_TEN
    assert epoch_order(7, 3, 10**12, False).at(np.array([0, 1, 10**12 - 1])).tolist() == ORDER_OF_A_TRILLION


@pytest.mark.parametrize("count", [5, 64, 1000])
def test_each_place_is_as_likely_as_any_other(count: int) -> None:
    """Chi-square of where sample 0 and its right neighbour land over 1500 epochs; 5 standard deviations of slack."""
    epochs = 1500
    firsts = np.array([epoch_order(1, epoch, count, False).at(np.array([0, 1])) for epoch in range(epochs)])
    for places in (firsts[:, 0], (firsts[:, 1] - firsts[:, 0]) % count):
        cells = count if places is firsts[:, 0] or (places == 0).any() else count - 1
        seen = np.bincount(places, minlength=count)
        seen = seen if cells == count else seen[1:]
        chi_square = ((seen - epochs / cells) ** 2).sum() / (epochs / cells)
        assert abs(chi_square - (cells - 1)) < 5 * np.sqrt(2 * (cells - 1))


def test_neighbours_are_not_left_together() -> None:
    order = whole(0, 0, 100_000)
    assert np.mean(np.abs(np.diff(order)) == 1) < 1e-3  # 2e-5 expected
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02  # 6 standard deviations of 1/sqrt(n)


@pytest.mark.parametrize("position", [-2, 10])
def test_a_position_outside_the_epoch_is_refused(position: int) -> None:
    with pytest.raises(IndexError, match=r"0\.\.9"):
        epoch_order(0, 0, 10, False).at(np.array([position]))


def test_an_empty_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        epoch_order(0, 0, 0, False)
