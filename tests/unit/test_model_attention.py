"""Attention under any scope against a table of pairs, forward and gradient; what it holds; what a window lets through.

Compared in float64, where only the order of sums differs: 1e-12 at values of about 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrm_ray.model import attention
from hrm_ray.model.attention import attend, block_size, blockwise
from hrm_ray.model.build import build_objective
from hrm_ray.model.scope import AttentionScope, text_scope
from hrm_ray.train.storage_tracker import StorageTracker
from tests.support.tiny_models import logits_of_segments, text_batch, tiny_config, tiny_model

NEAR = 1e-12


@dataclass(frozen=True)
class Problem:
    """Random tensors and a scope: `queries` last positions of `keys`."""

    queries: int
    keys: int
    causal: bool
    window: int | None
    cuts: tuple[tuple[int, ...], ...] | None
    prompts: tuple[int, ...] | None
    seed: int

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Leaves q, k, v and a gradient for the result."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(2, 2, count, 4) for count in (self.queries, self.keys, self.keys, self.queries)]
        made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        return made[0].requires_grad_(), made[1].requires_grad_(), made[2].requires_grad_(), made[3]

    def documents(self) -> Tensor | None:
        if self.cuts is None:
            return None
        return torch.stack([(torch.arange(self.keys)[:, None] >= torch.tensor(cuts)).sum(1) for cuts in self.cuts])

    def prompt(self) -> Tensor | None:
        if self.prompts is None:
            return None
        return torch.stack([torch.arange(self.keys) % 7 < length for length in self.prompts])

    def scope(self) -> AttentionScope:
        return AttentionScope(self.causal, self.documents(), self.prompt(), self.window)

    def sees(self, row: int, query: int, key: int) -> bool:
        """The rules in words, one pair at a time."""
        documents, prompt = self.documents(), self.prompt()
        if documents is not None and documents[row, query] != documents[row, key]:
            return False
        if self.window is not None and abs(query - key) >= self.window:
            return False
        if not self.causal or key <= query:
            return True
        return prompt is not None and bool(prompt[row, query]) and bool(prompt[row, key])

    def table(self) -> Tensor:
        first = self.keys - self.queries
        rows = [
            [[self.sees(row, first + q, k) for k in range(self.keys)] for q in range(self.queries)] for row in (0, 1)
        ]
        return torch.tensor(rows)[:, None]


@st.composite
def problems(draw: st.DrawFn, most: int = 40) -> Problem:
    keys = draw(st.integers(1, most))
    queries = draw(st.integers(1, keys))
    causal = draw(st.booleans())
    places = st.lists(st.integers(1, most), max_size=4).map(lambda found: (0, *sorted(found)))
    cuts = draw(st.none() | st.tuples(places, places))
    prompts = draw(st.none() | st.tuples(st.integers(0, 7), st.integers(0, 7))) if causal else None
    window = draw(st.none() | st.integers(1, most)) if causal or cuts is not None else None
    return Problem(queries, keys, causal, window, cuts, prompts, draw(st.integers(0, 99)))


def naive(query: Tensor, keys: Tensor, values: Tensor, table: Tensor) -> Tensor:
    scores = (query @ keys.mT / math.sqrt(query.shape[-1])).masked_fill(~table, -math.inf)
    return scores.softmax(-1) @ values


def gradients(seen: Tensor, problem: tuple[Tensor, ...]) -> list[Tensor]:
    *leaves, outer = problem
    return [seen, *torch.autograd.grad(seen, leaves, outer)]


def assert_near(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert float((one - other).detach().abs().max()) <= NEAR


@settings(max_examples=150)
@given(problem=problems(), size=st.integers(1, 45))
def test_blocks_of_any_size_against_the_table(problem: Problem, size: int) -> None:
    tensors = problem.tensors()
    got = gradients(blockwise(*tensors[:3], problem.scope(), size), tensors)
    assert_near(got, gradients(naive(*tensors[:3], problem.table()), tensors))


@settings(max_examples=100)
@given(problem=problems(), small=st.booleans())
def test_attend_against_the_table(problem: Problem, small: bool) -> None:
    """Whichever way it goes: a kernel's own rule, one mask for the row, or blocks."""
    tensors = problem.tensors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "WHOLE_MASK_ENTRIES", 10**9 if small else 0)
        patch.setattr(attention, "QUERY_BLOCKS", {"cpu": 5})
        patch.setattr(attention, "SMALLEST_BLOCK", 3)
        got = gradients(attend(*tensors[:3], problem.scope()), tensors)
    assert_near(got, gradients(naive(*tensors[:3], problem.table()), tensors))


@settings(max_examples=30)
@given(problem=problems(), first=st.integers(0, 39))
def test_keys_dropped_in_front(problem: Problem, first: int) -> None:
    """Without keys that nobody sees, the scope of the rest says the same."""
    seen_from = int(problem.table().any(0).any(0).any(0).nonzero()[0, 0])
    first = min(first, seen_from)
    query, keys, values, _ = problem.tensors()
    want = attend(query, keys, values, problem.scope())
    got = attend(query, keys[:, :, first:], values[:, :, first:], problem.scope())
    part = attend(query, keys[:, :, first:], values[:, :, first:], problem.scope().part(first, problem.keys))
    assert_near([got, part], [want, want])


def test_bfloat16_adds_gradients_up_in_float32() -> None:
    """512 blocks of one query each: summed in bfloat16, a key's gradient would stand still after some hundred."""
    problem = Problem(512, 512, True, None, ((0,), (0,)), None, 1)
    exact, narrow = problem.tensors(torch.float32), problem.tensors(torch.bfloat16)
    ones = torch.ones(2, 2, 512, 4)
    want = torch.autograd.grad(blockwise(*exact[:3], problem.scope(), 512), exact[2], ones)[0]
    got = torch.autograd.grad(blockwise(*narrow[:3], problem.scope(), 1), narrow[2], ones.bfloat16())[0]
    assert float((got[:, :, 0].float() / want[:, :, 0] - 1).abs().max()) < 0.02


class TestReach:
    """How many keys each block of queries is held against."""

    @pytest.mark.parametrize("length", [1000, 4000, 16000])
    @pytest.mark.parametrize("window", [1, 50, 300])
    def test_of_a_window(self, length: int, window: int) -> None:
        scope = AttentionScope(causal=True, window=window)
        size = block_size(scope, "cpu")
        blocks = scope.blocks(length, length, size)
        pairs = sum((block.stop - block.start) * (seen.stop - seen.start) for block, seen in blocks)
        assert pairs <= length * (window + size - 1)
        assert [block.start for block, _ in blocks] == list(range(0, length, size))

    def test_of_documents(self) -> None:
        """Packed documents cost their own length, whatever the row's."""
        documents = torch.arange(4000).div(100, rounding_mode="floor").expand(2, -1)
        blocks = AttentionScope(causal=True, documents=documents).blocks(4000, 4000, 64)
        assert max(seen.stop - seen.start for _, seen in blocks) <= 100 + 64


@pytest.mark.parametrize("name", ["window", "documents", "window and documents", "later queries"])
def test_no_tensor_of_all_pairs(name: str) -> None:
    """4096 positions, 16.8 million pairs: forward and backward hold no tensor of a tenth of them, nor in sum."""
    length, window = 4096, 64
    queries = 512 if name == "later queries" else length
    documents = torch.zeros(1, length, dtype=torch.int32) if "documents" in name else None
    scope = AttentionScope(causal=True, documents=documents, window=window if "window" in name else None)
    query = torch.randn(1, 1, queries, 8, requires_grad=True)
    keys, values = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(2))
    with StorageTracker() as count:
        seen = attend(query, keys, values, scope)
        torch.autograd.grad(seen, (query, keys, values), torch.ones_like(seen))
    pairs = queries * length
    assert count.largest_bytes() < 4 * pairs / (3 if name == "later queries" else 10)
    if name == "window":
        assert count.peak_bytes() < 40 * 4 * length * 8


def test_the_count_sees_a_mask() -> None:
    """The control: one mask for all pairs is seen to be held."""
    query = torch.randn(1, 1, 1024, 8)
    scope = AttentionScope(causal=True, window=64)
    with StorageTracker() as count:
        scope.whole_mask(1024, 1024, query)
    assert count.largest_bytes() == 4 * 1024 * 1024


def test_one_mask_serves_all_attentions_of_a_pass() -> None:
    query = torch.randn(1, 1, 64, 8)
    scope = text_scope(torch.zeros(1, 64, dtype=torch.int32), None)
    assert scope.whole_mask(64, 64, query) is scope.whole_mask(64, 64, query)


ARCHITECTURES = {
    "actv1": {"h_cycles": 2, "l_cycles": 1, "halt_max_steps": 2},
    "transformer": {"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none", "h_layers": 2, "l_layers": 1},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("window", [1, 3])
def test_a_token_reaches_no_further_than_windows_do(name: str, window: int) -> None:
    """Bit-equal logits before a changed token, and behind it from where no chain of windows leads any more."""
    config = tiny_config(seq_len=40, window_size=window, **ARCHITECTURES[name])
    objective = build_objective(tiny_model(config), "softmax", supervision="rollout", halt_margin=0.01).train()
    batch = text_batch(1, [[40]])
    del batch["documents"]
    changed = batch | {"inputs": batch["inputs"].clone()}
    changed["inputs"][0, 5] = (changed["inputs"][0, 5] + 1) % 19
    attentions = 3 if name == "transformer" else config.updates_per_segment
    for segment, (old, new) in enumerate(
        zip(logits_of_segments(objective, batch), logits_of_segments(objective, changed), strict=True), start=1
    ):
        moved = (old[0] != new[0]).any(-1).nonzero().flatten().tolist()
        furthest = 5 + attentions * segment * (window - 1)
        assert moved[0] == 5 and moved[-1] <= furthest
        assert window == 1 or moved[-1] > 5, "the window does let its neighbours through"
