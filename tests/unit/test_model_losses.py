"""Cross entropies and their gradients against the plain formulas, and at the extremes of the number range."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hrm_ray.model.losses import CROSS_ENTROPIES, softmax_cross_entropy, stablemax_cross_entropy
from hrm_ray.types import IGNORE_LABEL


def naive_softmax(scores: list[float], label: int) -> float:
    return math.log(sum(math.exp(s - max(scores)) for s in scores)) + max(scores) - scores[label]


def naive_stablemax(scores: list[float], label: int) -> float:
    s = [x + 1 if x >= 0 else 1 / (1 - x + 1e-30) for x in scores]
    return -math.log(s[label] / sum(s))


NAIVE = {"softmax": naive_softmax, "stablemax": naive_stablemax}
# float32 softmax against float64; stablemax is float64 itself and its input float32 is exact.
TOLERANCE = {"softmax": 2e-6, "stablemax": 1e-12}


def draw_logits(seed: int, spread: float, vocab: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, spread, (2, 5, vocab)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, vocab, (2, 5)).astype(np.int32))
    labels[0, 1] = labels[1, 4] = IGNORE_LABEL
    return logits, labels


@pytest.mark.parametrize("kind", CROSS_ENTROPIES)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.01, 1.0, 8.0]), vocab=st.integers(2, 9))
def test_values(kind: str, seed: int, spread: float, vocab: int) -> None:
    logits, labels = draw_logits(seed, spread, vocab)
    losses = CROSS_ENTROPIES[kind](logits, labels)  # type: ignore[index]
    assert losses.shape == labels.shape
    for row in range(2):
        for place in range(5):
            label = int(labels[row, place])
            want = 0.0 if label == IGNORE_LABEL else NAIVE[kind](logits[row, place].tolist(), label)
            assert float(losses[row, place]) == pytest.approx(want, rel=TOLERANCE[kind], abs=1e-6)


@pytest.mark.parametrize("kind", CROSS_ENTROPIES)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 3.0]))
def test_gradients_by_finite_differences(kind: str, seed: int, spread: float) -> None:
    """Central differences of the naive float64 formula; h = 1e-5 leaves an error of about 1e-9, float32 one of 1e-6."""
    logits, labels = draw_logits(seed, spread, 4)
    # The kink of stablemax at 0 has equal slopes on both sides but another curvature; keep the stencil off it.
    logits = torch.where(logits.abs() < 1e-3, 0.1, logits).requires_grad_()
    weights = torch.arange(1.0, 11.0).view(2, 5)
    (CROSS_ENTROPIES[kind](logits, labels) * weights).sum().backward()  # type: ignore[index]
    assert logits.grad is not None
    for row, place in np.ndindex(2, 5):
        label = int(labels[row, place])
        for token in range(4):
            scores = logits[row, place].tolist()
            up, down = list(scores), list(scores)
            up[token] += 1e-5
            down[token] -= 1e-5
            slope = 0.0
            if label != IGNORE_LABEL:
                slope = (NAIVE[kind](up, label) - NAIVE[kind](down, label)) / 2e-5
            want = slope * float(weights[row, place])
            assert float(logits.grad[row, place, token]) == pytest.approx(want, rel=2e-4, abs=2e-5)


EXTREMES = [
    [0.0, 0.0, 0.0],
    [-0.0, 1e-30, -1e-30],
    [1.0, 2.0, -1.0],
    [1e30, -1e30, 0.0],
    [3e38, 3e38, 3e38],
    [-3e38, -3e38, -3e38],
    [1e4, -1e4, 50.0],
    [-1.0, -2.0, -3.0],
]


@pytest.mark.parametrize("kind", CROSS_ENTROPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label", [0, 1, 2, IGNORE_LABEL])
@pytest.mark.parametrize("scores", EXTREMES)
def test_extreme_logits_stay_finite(kind: str, dtype: torch.dtype, label: int, scores: list[float]) -> None:
    """x = 1 among them: the unused branch of stablemax, 1/(1 - x), would divide by zero there."""
    logits = torch.tensor([[scores]]).to(dtype).requires_grad_()
    loss = CROSS_ENTROPIES[kind](logits, torch.tensor([[label]], dtype=torch.int32))  # type: ignore[index]
    loss.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(loss).all() and torch.isfinite(logits.grad).all()
    if label == IGNORE_LABEL:
        assert float(loss.detach().sum()) == 0.0 and not logits.grad.any()


def test_precision_of_the_losses() -> None:
    """softmax in float32, stablemax in float64, whatever the activations' type (ACTV1_SPEC, section 7)."""
    logits, labels = draw_logits(0, 1.0, 5)
    assert softmax_cross_entropy(logits.bfloat16(), labels).dtype == torch.float32
    assert stablemax_cross_entropy(logits.bfloat16(), labels).dtype == torch.float64


def test_stablemax_of_zero_and_below() -> None:
    """By hand: s(0) = 1, s(1) = 2, s(-1) = 1/2, so p = 2/7, 4/7, 1/7."""
    logits = torch.tensor([[[0.0, 1.0, -1.0]]])
    for label, p in enumerate((2 / 7, 4 / 7, 1 / 7)):
        loss = stablemax_cross_entropy(logits, torch.tensor([[label]]))
        assert float(loss) == pytest.approx(-math.log(p), rel=1e-12)
