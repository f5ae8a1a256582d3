"""Norm and clipping of gradients of any type, and the average of narrow weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hrm_ray.train.strategies.single import Ema, clip_factor, total_norm


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_wide_gradients_as_pytorch_clips_them(max_norm: float) -> None:
    """To the bit."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.zeros(size)) for size in ((3, 5), (64,), (2, 2, 2))]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    own = [weight.grad.clone() for weight in weights if weight.grad is not None]
    norm = total_norm(own)
    factor = clip_factor(norm, max_norm)
    assert torch.equal(norm, nn.utils.get_total_norm(own))
    if max_norm:
        nn.utils.clip_grad_norm_(weights, max_norm)
    for weight, gradient in zip(weights, own, strict=True):
        assert weight.grad is not None and torch.equal(weight.grad, gradient * factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_norm_of_narrow_gradients_is_wide(dtype: torch.dtype) -> None:
    """10,000 gradients of 3000 have a norm of 300,000, beyond float16 (bfloat16 rounds 3000 itself to 2992: 3e-3); 3001
    ones have one that the eight bits of bfloat16 do not hold to 1e-4, and float32 does."""
    norm = total_norm([torch.full((5000,), 3000.0, dtype=dtype), torch.full((5000,), 3000.0, dtype=dtype)])
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(3000 * 100, rel=3e-3)
    many = total_norm([torch.ones(3000, dtype=dtype), torch.ones(1, dtype=dtype)])
    assert float(many) == pytest.approx(3001**0.5, rel=1e-4)


def test_a_gradient_that_is_not_finite_is_seen() -> None:
    for bad in (float("inf"), float("nan")):
        assert not total_norm([torch.ones(3), torch.tensor([1.0, bad], dtype=torch.float16)]).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_average_is_wide_and_of_what_is_trained(dtype: torch.dtype) -> None:
    """Decay 0.999 towards weights that moved from 1 to 2: after 100 updates 2 - 0.999^100 = 1.0952; each moves the
    average by less than a bfloat16 can tell. Float32 rounds a hundred times, by 1e-7 each."""
    model = nn.Linear(4, 2).to(dtype)
    model.bias.requires_grad_(False)
    nn.init.ones_(model.weight)
    ema = Ema({"weight": model.weight}, 0.999)
    assert ema.average.keys() == {"weight"} and ema.average["weight"].dtype == torch.float32
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(100):
        ema.update()
    expected = 2 - 0.999**100
    assert ema.average["weight"].flatten().tolist() == pytest.approx([expected] * 8, abs=2e-5)
    bias = model.bias.clone()
    with ema.in_place():
        assert model.weight.dtype == dtype
        assert model.weight.flatten().tolist() == pytest.approx([expected] * 8, rel=max(torch.finfo(dtype).eps, 2e-5))
        assert torch.equal(model.bias, bias)
    assert bool((model.weight == 2).all())
