"""Rounding by chance: right on average, always to a neighbour, exact where the number fits, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrm_ray.train import stochastic_rounding
from hrm_ray.train.stochastic_rounding import round_stochastically, uniform

CPU = torch.device("cpu")
NARROW = [torch.bfloat16, torch.float16]


def rounded(wide: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    narrow = torch.empty(wide.shape, dtype=dtype)
    round_stochastically(wide, narrow, key)
    return narrow


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@settings(max_examples=30)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.integers(0, 99)
)
def test_always_one_of_the_two_neighbours(dtype: torch.dtype, numbers: list[float], key: int) -> None:
    """Below, above or equal, and nothing lies between the result and the number."""
    wide = torch.tensor(numbers, dtype=torch.float32).clamp(-6e4, 6e4)
    result = rounded(wide, dtype, str(key))
    for number, given_back in zip(wide.tolist(), result, strict=True):
        places = torch.tensor([-1, 0, 1], dtype=torch.int16)
        bits = given_back.abs().view(torch.int16)
        around = (bits + places).clamp(min=0).view(dtype).double() * (-1 if given_back < 0 else 1)
        distance = float(torch.diff(around).abs().max())
        assert abs(float(given_back) - number) < distance


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_fits_stays(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of the type, the smallest and the largest included, and whatever the chance."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    # float32 holds all of them; bfloat16's subnormals are float32's own, which some processors flush to zero.
    kept = every if dtype == torch.float16 else every[every.float().abs() >= torch.finfo(dtype).smallest_normal]
    assert len(kept) > 60000
    assert torch.equal(rounded(kept.float(), dtype, "any"), kept)
    monkeypatch.setattr(stochastic_rounding, "uniform", lambda count, *_: torch.zeros(count))
    assert torch.equal(rounded(kept.float(), dtype, "any"), kept)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("number", [1.001, -0.3337, 2e-5, 3e-7, 4321.7])
def test_the_mean_is_the_number(dtype: torch.dtype, number: float) -> None:
    """Of n draws with chance p of the upper neighbour the mean deviates by distance * sqrt(p (1 - p) / n), which is at
    most half the distance over sqrt(n); five of these standard deviations are met by chance once in a million."""
    draws = 1 << 16
    wide = torch.full((draws,), number)
    result = rounded(wide, dtype, f"mean {number}")
    values = result.double().unique()
    assert len(values) == 2, "both neighbours occur"
    distance = float(values[1] - values[0])
    assert float(result.double().mean()) == pytest.approx(float(wide[0]), abs=5 * distance / 2 / draws**0.5)
    nearest = wide.to(dtype).double().mean()
    assert abs(float(nearest) - number) > 5 * distance / 2 / draws**0.5, "to the nearest would be seen"


def test_the_chances_are_uniform_and_independent() -> None:
    """Moments of a uniform distribution and correlations of neighbours, of keys and of places far apart: with 2^18
    draws standard deviations are below 0.002."""
    count = 1 << 18
    draws = uniform(count, 0, "1 2 3", CPU).double()
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(draws.var()) == pytest.approx(1 / 12, abs=0.003)
    counts = np.histogram(draws.numpy(), bins=64, range=(0, 1))[0]
    assert counts.min() > count / 64 * 0.9 and counts.max() < count / 64 * 1.1
    for key in ("1 2 4", "1 3 3", "2 2 3"):
        both = torch.stack([draws, uniform(count, 0, key, CPU).double()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01, key
    for shift in (1, 2, 64, 1024):
        both = torch.stack([draws[:-shift], draws[shift:]])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01, shift


def test_the_same_key_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the work is cut, and another for another key. The first numbers are written down: a change of the hash
    would make resumed runs differ from those that were not stopped."""
    wide = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    once = rounded(wide, torch.bfloat16, "7 0 3")
    monkeypatch.setattr(stochastic_rounding, "_CPU_CHUNK", 77)
    assert torch.equal(rounded(wide, torch.bfloat16, "7 0 3"), once)
    assert not torch.equal(rounded(wide, torch.bfloat16, "7 0 4"), once)
    assert (uniform(4, 0, "0 0 0", CPU) * 2**24).long().tolist() == WRITTEN_DOWN


WRITTEN_DOWN = [5480516, 4998410, 9906661, 5373079]


def test_beyond_the_largest_number() -> None:
    assert rounded(torch.tensor([7e4, -7e4]), torch.float16, "a").tolist() == [float("inf"), float("-inf")]
    assert not rounded(torch.tensor([float("nan"), float("inf")]), torch.bfloat16, "a").isfinite().any()
