"""Losses and gradients per token do not depend on how many scores are held at once, and few are held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hrm_ray.model.losses import CROSS_ENTROPIES, LossKind
from hrm_ray.model.scoring import score_tokens
from hrm_ray.types import IGNORE_LABEL

ALL_AT_ONCE = 2**40


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.numel())
        return out


def problem(rows: int, length: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (rows, length), generator=draw)
    labels[torch.rand(rows, length, generator=draw) < 0.3] = IGNORE_LABEL
    hidden = torch.randn(rows, length, 8, generator=draw)
    return hidden, torch.randn(vocabulary, 8, generator=draw), labels


def gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, kind: LossKind, bytes_at_once: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    scored = score_tokens(hidden, weight, labels, kind, bytes_at_once)
    # Every token has another weight, so that a piece in the wrong place shows.
    (scored.loss * torch.arange(1, labels.numel() + 1).view(labels.shape)).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return scored.loss.detach(), scored.hit, hidden.grad, weight.grad


@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(2, 11), st.integers(1, 7),
    st.sampled_from(["softmax", "stablemax"]), st.integers(0, 99),
)  # fmt: skip
def test_pieces_give_the_numbers_of_the_whole(
    rows: int, length: int, vocabulary: int, tokens: int, kind: LossKind, seed: int
) -> None:
    """Within float32 rounding of sums over at most 27 tokens (1e-5 of the largest)."""
    parts = problem(rows, length, vocabulary, seed)
    whole = gradients(*parts, kind, ALL_AT_ONCE)
    pieces = gradients(*parts, kind, tokens * 4 * vocabulary)
    assert torch.equal(whole[1], pieces[1])
    for one, other in zip((whole[0], *whole[2:]), (pieces[0], *pieces[2:]), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert float((one - other).abs().max()) <= 1e-5 * max(1.0, float(one.abs().max()))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_scores_are_never_held_whole(autocast: bool) -> None:
    hidden, weight, labels = problem(2, 64, 1000, 3)
    with Largest() as largest, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, _, to_hidden, to_weight = gradients(hidden, weight, labels, "softmax", 16 * 4 * 1000)
    assert largest.elements <= 16 * 1000
    assert to_hidden.dtype == to_weight.dtype == torch.float32


@pytest.mark.parametrize("tokens", [16, 128])
def test_under_autocast_the_product_is_taken_in_its_type(tokens: int) -> None:
    """Both ways round the scores to bfloat16 in the same place, so losses agree to float32 rounding."""
    hidden, weight, labels = problem(2, 64, 50, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = score_tokens(hidden, weight, labels, "softmax", tokens * 4 * 50).loss
    rounded = CROSS_ENTROPIES["softmax"](hidden.bfloat16() @ weight.bfloat16().t(), labels)
    assert float((loss - rounded).abs().max()) <= 1e-5
    exact = score_tokens(hidden, weight, labels, "softmax", tokens * 4 * 50).loss
    assert float((loss - exact).abs().max()) > 1e-4


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, labels = problem(1, 8, 5, 5)
    hidden.requires_grad_()
    score_tokens(hidden, weight, labels, "softmax", 2 * 4 * 5).loss.sum().backward()
    assert hidden.grad is not None and weight.grad is None
