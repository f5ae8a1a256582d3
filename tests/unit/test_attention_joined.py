"""Attention in two parts that are joined: against one softmax, forward and gradient; and where it is allowed.

In float64 only the order of sums differs: 1e-12 at values of about 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrm_ray.model import attention
from hrm_ray.model import scope as scope_module
from hrm_ray.model.attention import attend, attend_in_two
from hrm_ray.model.scope import AttentionScope

NEAR = 1e-12


def tensors(queries: int, keys: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v as layers make them, whose heads lie side by side; the keys a slice of a longer row."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, count, 3, 8, generator=generator).to(dtype).transpose(1, 2) for count in (queries, keys + 5)]
    made.append(torch.randn(2, 3, keys + 5, 8, generator=generator).to(dtype))
    return [made[0].requires_grad_(), *(each[:, :, 5:].detach().requires_grad_() for each in made[1:])]


def one_softmax(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    behind = keys.shape[2] - query.shape[2]
    hidden = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).triu(1 + behind)
    return (query @ keys.mT / math.sqrt(query.shape[-1])).masked_fill(hidden, -math.inf).softmax(-1) @ values


def with_gradients(seen: Tensor, leaves: list[Tensor], outer: Tensor) -> list[Tensor]:
    return [seen.detach(), *torch.autograd.grad(seen, leaves, outer)]


@settings(max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 60), st.integers(0, 99), st.sampled_from(["random", "transposed", "expanded"])
)
def test_against_one_softmax(queries: int, earlier: int, seed: int, outer: str) -> None:
    """Whatever the layout of the gradient that comes back."""
    leaves = tensors(queries, queries + earlier, seed)
    made: dict[str, Callable[[], Tensor]] = {
        "random": lambda: torch.randn(2, 3, queries, 8, dtype=torch.float64),
        "transposed": lambda: torch.randn(2, 3, 8, queries, dtype=torch.float64).mT,
        "expanded": lambda: torch.ones((), dtype=torch.float64).expand(2, 3, queries, 8),
    }
    gradient = made[outer]()
    got = with_gradients(attend_in_two(*leaves), leaves, gradient)
    for one, other in zip(got, with_gradients(one_softmax(*leaves), leaves, gradient), strict=True):
        assert one.shape == other.shape and float((one - other).abs().max()) <= NEAR


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str
)
def test_narrow_types(dtype: torch.dtype, most: float) -> None:
    """As near to float64 as some roundings of the type (2^-24, 2^-11, 2^-8) leave it, and as near as one kernel is to
    which a mask is given."""
    leaves = tensors(200, 700, 1, dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    outer = torch.randn(2, 3, 200, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = with_gradients(one_softmax(*wide), wide, outer.double())
    masked = with_gradients(attention.blockwise(*leaves, AttentionScope(causal=True), 64), leaves, outer)
    for got, other, want in zip(with_gradients(attend_in_two(*leaves), leaves, outer), masked, exact, strict=True):
        assert got.dtype == dtype
        off, others = (float((each.double() - want).norm() / want.norm()) for each in (got, other))
        assert off < most and off < 2 * others


def test_scores_far_apart() -> None:
    """Where one part's weight is all and the other's nothing: no overflow, no nan."""
    for sign in (-1, 1):
        query, keys, values = (leaf.detach() for leaf in tensors(4, 9, 3))
        keys[:, :, :5] = sign * 1e4 * query[:, :, :1]
        leaves = [leaf.requires_grad_() for leaf in (query, keys, values)]
        outer = torch.ones_like(query)
        got = with_gradients(attend_in_two(*leaves), leaves, outer)
        for one, other in zip(got, with_gradients(one_softmax(*leaves), leaves, outer), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_under_autocast() -> None:
    """In autocast's type, as PyTorch's own attention is, and the gradients in the type of what came in."""
    leaves = tensors(20, 50, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        seen = attend_in_two(*leaves)
    assert seen.dtype == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in torch.autograd.grad(seen.sum(), leaves))


def numbered(*cuts: tuple[int, ...], length: int = 40) -> Tensor:
    return torch.stack([(torch.arange(length)[:, None] >= torch.tensor(row)).sum(1) for row in cuts])


QUERIES, KEYS = 10, 40
SCOPES: dict[str, tuple[AttentionScope, int | None]] = {
    "causal": (AttentionScope(causal=True), 0),
    "one document": (AttentionScope(causal=True, documents=numbered((0,), (0,))), 0),
    "begun in the same place": (AttentionScope(causal=True, documents=numbered((0, 7, 12), (0, 12))), 12),
    "begun with the queries": (AttentionScope(causal=True, documents=numbered((0, 30), (0, 30))), 30),
    "begun in two places": (AttentionScope(causal=True, documents=numbered((0, 12), (0, 13))), None),
    "a border among the queries": (AttentionScope(causal=True, documents=numbered((0,), (0, 35))), None),
    "a border at the last query": (AttentionScope(causal=True, documents=numbered((0, 39), (0, 39))), None),
    "numbers that come again": (AttentionScope(causal=True, documents=numbered((0, 32), (0, 32)) % 2), None),
    "a prompt": (AttentionScope(causal=True, prompt=torch.zeros(2, 40, dtype=torch.bool)), None),
    "a window": (AttentionScope(causal=True, window=39), None),
    "a window as long": (AttentionScope(causal=True, window=40), 0),
    "a window as long as the document": (
        AttentionScope(causal=True, documents=numbered((0, 12), (0, 12)), window=28),
        12,
    ),
    "no order": (AttentionScope(documents=numbered((0,), (0,))), None),
}


@pytest.mark.parametrize("name", SCOPES)
def test_where_no_mask_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the parts are joined, or the kernel's own rule is taken; elsewhere a mask. The numbers are the same."""
    scope, first = SCOPES[name]
    assert scope.causal_from(QUERIES, KEYS) == first
    leaves = tensors(QUERIES, KEYS, 5)
    outer = torch.randn(2, 3, QUERIES, 8, dtype=torch.float64)
    masked = with_gradients(attend(*leaves, scope), leaves, outer)
    taken: list[tuple[str, int]] = []

    def noted(kind: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*words: Any, **named: Any) -> Tensor:
            taken.append((kind, words[1].shape[2]))
            return real(*words, **named)

        return call

    monkeypatch.setattr(attention, "WHOLE_MASK_ENTRIES", 0)
    monkeypatch.setattr(attention, "attend_in_two", noted("joined", attention.attend_in_two))
    monkeypatch.setattr(attention, "blockwise", noted("blocks", attention.blockwise))
    got = with_gradients(attend(*leaves, scope), leaves, outer)
    for one, other in zip(got, masked, strict=True):
        assert float((one - other).abs().max()) <= NEAR
    own_rule: list[tuple[str, int]] = []
    assert taken == ([("blocks", KEYS)] if first is None else own_rule if first == 30 else [("joined", KEYS - first)])


def test_a_whole_row_of_one_document_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WHOLE_MASK_ENTRIES", 0)
    monkeypatch.setattr(attention, "blockwise", lambda *_: pytest.fail("a mask was made"))
    leaves = tensors(KEYS, KEYS, 6)
    seen = attend(*leaves, AttentionScope(causal=True, documents=numbered((0,), (0,))))
    assert float((seen - one_softmax(*leaves)).detach().abs().max()) <= NEAR


def test_documents_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = scope_module._document_ranges
    monkeypatch.setattr(scope_module, "_document_ranges", lambda d: looked.append(1) or real(d))  # type: ignore[func-returns-value]
    for cuts in ((0,), (0, 35)):
        looked.clear()
        scope = AttentionScope(causal=True, documents=numbered(cuts, (0,)))
        assert scope.causal_from(QUERIES, KEYS) == scope.causal_from(QUERIES, KEYS)
        assert len(looked) == 1
