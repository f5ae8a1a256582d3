"""Which kernel is chosen where, and that every kernel is asked for what the scope says.

FlashAttention is played by two functions that follow its documented contract (layout, window, alignment of queries to
the end of the keys, sequences laid end to end); FlexAttention runs uncompiled, forward only.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hrm_ray.model import attention_backends
from hrm_ray.model.attention import attend
from hrm_ray.model.attention_backends import (
    FlashAttention,
    FlexAttention,
    KernelCapabilities,
    choose_kernel,
    flash_obstacle,
    load_kernel,
)
from hrm_ray.model.build import build_model
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.layers import Attention
from hrm_ray.model.scope import AttentionScope
from hrm_ray.model.transforms.attend import use_kernel
from tests.support.tiny_models import tiny_config

HOPPER = KernelCapabilities("cuda", (9, 0), frozenset({"flash_attn", "flash_attn_interface", "triton"}), narrow=True)
AMPERE = KernelCapabilities("cuda", (8, 0), frozenset({"flash_attn", "triton"}), narrow=True)
TURING = KernelCapabilities("cuda", (7, 5), frozenset({"flash_attn", "triton"}), narrow=True)
BARE = KernelCapabilities("cuda", (9, 0), frozenset({"triton"}), narrow=True)
WINDOWS = KernelCapabilities("cuda", (9, 0), frozenset(), narrow=True)
WIDE = KernelCapabilities("cuda", (9, 0), HOPPER.libraries, narrow=False)
ONLY_THREE = KernelCapabilities("cuda", (8, 0), frozenset({"flash_attn_interface"}), narrow=True)
CPU = KernelCapabilities("cpu", (0, 0), HOPPER.libraries, narrow=True)
TEXT = tiny_config(hidden_size=64)


@pytest.mark.parametrize(
    ("asked", "config", "place", "kernel"),
    [
        (None, TEXT, HOPPER, "flash3"),
        (True, TEXT, HOPPER, "flash3"),
        (False, TEXT, HOPPER, "flex"),
        (None, TEXT, AMPERE, "flash2"),
        (True, TEXT, TURING, "flex"),
        (None, TEXT, BARE, "flex"),
        (None, TEXT, WINDOWS, "sdpa"),
        (None, TEXT, WIDE, "flex"),
        (True, TEXT, ONLY_THREE, "sdpa"),
        (True, TEXT, CPU, "sdpa"),
        (None, tiny_config(hidden_size=64, lm_mask="prefix"), HOPPER, "flex"),
        (None, tiny_config(hidden_size=1024), HOPPER, "flex"),
        (None, tiny_config(hidden_size=16), BARE, "sdpa"),
        (None, tiny_config(hidden_size=64, task="puzzle"), HOPPER, "flash3"),
        (None, tiny_config(hidden_size=64, task="puzzle"), BARE, "sdpa"),
    ],
)
def test_the_choice(asked: bool | None, config: ModelConfig, place: KernelCapabilities, kernel: str) -> None:
    assert choose_kernel(asked, config, place) == kernel


@pytest.mark.parametrize(
    ("place", "config", "reason"),
    [
        (CPU, TEXT, "CUDA"),
        (TURING, TEXT, "Ampere"),
        (BARE, TEXT, "not installed"),
        (ONLY_THREE, TEXT, "not installed"),
        (WIDE, TEXT, "16-bit"),
        (HOPPER, tiny_config(hidden_size=1024), "512"),
        (HOPPER, tiny_config(hidden_size=64, lm_mask="prefix"), "prompt"),
    ],
)
def test_the_reason(place: KernelCapabilities, config: ModelConfig, reason: str) -> None:
    found = flash_obstacle(config, place)
    assert found is not None and reason in found


def test_this_machine() -> None:
    place = KernelCapabilities.here("cpu", narrow=True)
    assert place.device == "cpu" and place.capability == (0, 0)
    assert place.libraries <= {"flash_attn", "flash_attn_interface", "triton"}


def rule_table(queries: int, keys: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """FlashAttention's rule: query i stands at i + keys - queries; -1 is no limit to a side."""
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    allowed = torch.ones(queries, keys, dtype=torch.bool) if not causal else distance >= 0
    if window[0] >= 0:
        allowed &= distance <= window[0]
    if window[1] >= 0:
        allowed &= -distance <= window[1]
    return allowed


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """[B, T, heads, d], as flash_attn's."""
    table = rule_table(q.shape[1], k.shape[1], causal, window_size)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~table, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double()).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """[tokens, heads, d] of all sequences end to end, as flash_attn's; checks what the kernel takes on trust."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) == len(v)
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    assert bool((cu_seqlens_q.diff() > 0).all())
    queries, keys, values = (
        part.split(starts.diff().tolist()) for part, starts in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    )
    return torch.cat(
        [
            flash_attn_func(a[None], b[None], c[None], causal=causal, window_size=window_size)[0]
            for a, b, c in zip(queries, keys, values, strict=True)
        ]
    )


def drawn(seed: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, 3, count, 8, generator=generator).to(dtype).requires_grad_() for count in (queries, keys, keys)
    ]


@settings(max_examples=80)
@given(
    keys=st.integers(1, 30),
    queries=st.integers(1, 30),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 30),
    cuts=st.none() | st.tuples(*[st.lists(st.integers(1, 29), max_size=4)] * 2),
    tuple_result=st.booleans(),
    seed=st.integers(0, 99),
)
def test_flash_attention(
    keys: int,
    queries: int,
    causal: bool,
    window: int | None,
    cuts: tuple[list[int], list[int]] | None,
    tuple_result: bool,
    seed: int,
) -> None:
    """bfloat16 inputs and the same float64 arithmetic on both sides: what is left is the result's own rounding."""
    queries = min(queries, keys)
    window = window if causal else None
    documents = None
    if cuts is not None:
        documents = torch.stack([(torch.arange(keys)[:, None] >= torch.tensor([0, *sorted(c)])).sum(1) for c in cuts])
    scope = AttentionScope(causal, documents, None, window)
    given_back = (lambda result: (result, None)) if tuple_result else (lambda result: result)
    kernel = FlashAttention(
        lambda *a, **k: given_back(flash_attn_func(*a, **k)),
        lambda *a, **k: given_back(flash_attn_varlen_func(*a, **k)),
    )
    parts = drawn(seed, queries, keys, torch.bfloat16)
    got = kernel(*parts, scope)
    want = attend(*[part.double() for part in parts], scope)
    assert got.shape == want.shape
    assert float((got.double() - want).detach().abs().max()) <= 2**-7
    outer = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed))
    for one, other in zip(
        torch.autograd.grad(got, parts, outer.bfloat16()),
        torch.autograd.grad(want, parts, outer.bfloat16().double()),
        strict=True,
    ):
        assert float((one.double() - other.double()).abs().max()) <= 2**-5


def refuse(*args: Any, **named: Any) -> Tensor:
    raise AssertionError("this call is not for the kernel")


@pytest.mark.parametrize("case", ["prompt", "float32"])
def test_what_flash_attention_hands_on(case: str) -> None:
    prompt = torch.ones(2, 5, dtype=torch.bool) if case == "prompt" else None
    parts = drawn(1, 5, 5, torch.float32 if case == "float32" else torch.bfloat16)
    scope = AttentionScope(causal=True, prompt=prompt)
    assert torch.equal(FlashAttention(refuse, refuse)(*parts, scope), attend(*parts, scope))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=15)
@given(
    window=st.none() | st.integers(1, 30),
    cuts=st.none() | st.tuples(*[st.lists(st.integers(1, 29), max_size=4)] * 2),
    prompts=st.none() | st.tuples(st.integers(0, 30), st.integers(0, 30)),
    seed=st.integers(0, 99),
)
def test_flex_attention(
    window: int | None, cuts: tuple[list[int], list[int]] | None, prompts: tuple[int, int] | None, seed: int
) -> None:
    """Float32 sums in another order: 1e-5 at values of about 1."""
    documents = prompt = None
    if cuts is not None:
        documents = torch.stack([(torch.arange(30)[:, None] >= torch.tensor([0, *sorted(c)])).sum(1) for c in cuts])
    if prompts is not None:
        prompt = torch.stack([(torch.arange(30) >= length) & (torch.arange(30) % 7 < 4) for length in prompts])
    scope = AttentionScope(True, documents, prompt, window)
    parts = [part.detach() for part in drawn(seed, 30, 30, torch.float32)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_backends, "WHOLE_MASK_ENTRIES", 0)
        got = FlexAttention(flex_attention, create_block_mask)(*parts, scope)
    assert float((got - attend(*parts, scope)).abs().max()) <= 1e-5


@pytest.mark.parametrize(
    ("queries", "keys", "scope"),
    [
        (600, 600, AttentionScope(causal=True)),
        (600, 600, AttentionScope()),
        (8, 8, AttentionScope(causal=True, window=3)),
        (600, 700, AttentionScope(causal=True, window=3)),
    ],
)
def test_what_flex_attention_hands_on(queries: int, keys: int, scope: AttentionScope) -> None:
    parts = drawn(1, queries, keys, torch.float32)
    assert torch.equal(FlexAttention(refuse, refuse)(*parts, scope), attend(*parts, scope))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_flex_mask_is_made_once_for_a_pass() -> None:
    made = []

    def counted(*args: Any, **named: Any) -> Any:
        made.append(args)
        return create_block_mask(*args, **named)

    kernel = FlexAttention(flex_attention, counted)
    scope = AttentionScope(causal=True, window=8)
    parts = [part.detach() for part in drawn(1, 300, 300, torch.float32)]
    for _ in range(3):
        kernel(*parts, scope)
    assert len(made) == 1


@pytest.mark.parametrize(("name", "module"), [("flash2", "flash_attn"), ("flash3", "flash_attn_interface")])
def test_loading(name: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    played = ModuleType(module)
    played.__dict__.update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, module, played)
    kernel = load_kernel(name)
    assert isinstance(kernel, FlashAttention) and kernel.whole is flash_attn_func
    assert load_kernel("sdpa") is attend
    assert isinstance(load_kernel("flex"), FlexAttention)


def test_every_attention_gets_the_kernel() -> None:
    model = build_model(tiny_config(h_layers=2, l_layers=3))
    use_kernel(model, refuse)
    kernels = [module.kernel for module in model.modules() if isinstance(module, Attention)]
    assert kernels == [refuse] * 5
