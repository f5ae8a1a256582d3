"""Training in chunks against training on whole rows: losses, states and gradients, for any chunk size.

Float32 on both sides, sums in another order: 2e-5 of a tensor's largest value; a forgotten key or gradient shows at
1e-2 and more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrm_ray.model import attention
from hrm_ray.model.attention import attend
from hrm_ray.model.objective import AnyObjective
from hrm_ray.model.scope import AttentionScope
from hrm_ray.model.transforms.activation_checkpointing import apply_activation_checkpointing
from hrm_ray.model.transforms.attend import use_kernel
from tests.support.chunked_cases import (
    NEAR,
    Shape,
    assert_same_forward,
    assert_same_gradients,
    gap,
    in_chunks,
    shapes,
    trained,
    whole,
)
from tests.support.tiny_models import tiny_actv1, tiny_config, tiny_model

SHAPES = shapes() | shapes(transformer=True)


@settings(max_examples=40)
@given(shape=SHAPES, size=st.integers(1, 15), exact=st.booleans())
def test_forward_is_that_of_whole_rows(shape: Shape, size: int, exact: bool) -> None:
    model = tiny_model(shape.config)
    batch = shape.batch()
    assert_same_forward(trained(in_chunks(model, size, exact=exact), batch), trained(whole(model), batch))


@settings(max_examples=40)
@given(shape=SHAPES, size=st.integers(1, 15), recompute=st.booleans())
def test_exact_gradients_are_those_of_whole_rows(shape: Shape, size: int, recompute: bool) -> None:
    model = tiny_model(shape.config)
    batch = shape.batch()
    want = trained(whole(model), batch)
    if recompute:
        apply_activation_checkpointing(model)
    assert_same_gradients(trained(in_chunks(model, size, exact=True), batch), want)


@settings(max_examples=40)
@given(shape=SHAPES, size=st.integers(1, 15), recompute=st.booleans())
def test_without_masks_they_are_too(shape: Shape, size: int, recompute: bool) -> None:
    """As in long rows, where attention makes none that it can do without: states, losses and exact gradients."""
    model = tiny_model(shape.config)
    batch = shape.batch()
    want = trained(whole(model), batch)
    if recompute:
        apply_activation_checkpointing(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "WHOLE_MASK_ENTRIES", 0)
        got = trained(in_chunks(model, size, exact=True), batch)
    assert_same_forward(got, want)
    assert_same_gradients(got, want)


def cut_off(size: int) -> Any:
    """Attention over whole rows whose earlier chunks' keys and values carry no gradient."""

    def kernel(query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope) -> Tensor:
        seen = []
        for start in range(0, query.shape[2], size):
            stop = min(start + size, query.shape[2])
            own = slice(start, stop)
            there = [torch.cat((part[:, :, :start].detach(), part[:, :, own]), dim=2) for part in (keys, values)]
            seen.append(attend(query[:, :, own], *there, scope.part(0, stop)))
        return torch.cat(seen, dim=2)

    return kernel


@settings(max_examples=40)
@given(shape=SHAPES, size=st.integers(1, 15), recompute=st.booleans())
def test_truncated_gradients_stop_at_the_borders_and_nowhere_else(shape: Shape, size: int, recompute: bool) -> None:
    model = tiny_model(shape.config)
    batch = shape.batch()
    use_kernel(model, cut_off(size))
    want = trained(whole(model), batch)
    use_kernel(model, attend)
    if recompute:
        apply_activation_checkpointing(model)
    assert_same_gradients(trained(in_chunks(model, size, exact=False), batch), want)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_one_chunk_is_normal_training_to_the_bit(exact: bool, window: int | None) -> None:
    shape = Shape(((7, 5), (12,)), tiny_config(window_size=window, halt_max_steps=3))
    model = tiny_actv1(shape.config)
    got = trained(in_chunks(model, 12, exact=exact), shape.batch())
    want = trained(whole(model), shape.batch())
    assert got.loss == want.loss and got.terms == want.terms and got.metrics == want.metrics
    assert torch.equal(got.z_h, want.z_h)
    for name, gradient in want.gradients.items():
        assert torch.equal(got.gradients[name], gradient), name


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("size", "window"), [(5, 3), (4, 7), (3, 12), (2, 6)])
def test_windows_that_end_inside_a_chunk(size: int, window: int, recompute: bool) -> None:
    shape = Shape(((12,), (9, 3)), tiny_config(window_size=window, bp_steps=4))
    model = tiny_actv1(shape.config)
    want = trained(whole(model), shape.batch())
    use_kernel(model, cut_off(size))
    want_truncated = trained(whole(model), shape.batch())
    use_kernel(model, attend)
    if recompute:
        apply_activation_checkpointing(model)
    for got in (trained(in_chunks(model, size, exact=exact), shape.batch()) for exact in (True, False)):
        assert_same_forward(got, want)
    assert_same_gradients(trained(in_chunks(model, size, exact=True), shape.batch()), want)
    assert_same_gradients(trained(in_chunks(model, size, exact=False), shape.batch()), want_truncated)


def test_the_two_kinds_of_gradients_differ() -> None:
    """The control: with a border in the row, what truncation leaves out is not nothing."""
    shape = Shape(((12,), (12,)), tiny_config())
    model = tiny_actv1(shape.config)
    truncated = trained(in_chunks(model, 5, exact=False), shape.batch())
    exact = trained(in_chunks(model, 5, exact=True), shape.batch())
    name = "L_level.layers.0.self_attn.k_proj.weight"
    assert gap(truncated.gradients[f"model.{name}"], exact.gradients[f"model.{name}"]) > 1e-2


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_capacity_factor": 0.7}


@pytest.mark.parametrize("arch", ["actv1", "transformer"])
@pytest.mark.parametrize("size", [3, 5, 12])
def test_experts_with_exact_gradients(arch: str, size: int) -> None:
    """Capacity and drops count from the row's beginning, an expert's share is that of whole rows."""
    one_pass = {"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none"} if arch == "transformer" else {}
    shape = Shape(((7, 5), (4, 8)), tiny_config(bp_steps=3 if arch == "actv1" else 1, **EXPERTS, **one_pass))
    model = tiny_model(shape.config)
    batch = shape.batch()
    want = trained(whole(model), batch)
    assert want.metrics["expert_usage_dropped"] > 0, "nothing was dropped, so nothing is compared"
    got = trained(in_chunks(model, size, exact=True), batch)
    assert_same_forward(got, want)
    assert_same_gradients(got, want)


def test_experts_with_truncated_gradients() -> None:
    """The language model's loss is that of whole rows; shares are known up to a chunk's end only."""
    shape = Shape(((7, 5), (4, 8)), tiny_config(**EXPERTS))
    model = tiny_actv1(shape.config)
    want, got = trained(whole(model), shape.batch()), trained(in_chunks(model, 5, exact=False), shape.batch())
    assert got.terms["segment_loss"] == pytest.approx(want.terms["segment_loss"], rel=NEAR)
    assert got.terms["router_z_loss"] == pytest.approx(want.terms["router_z_loss"], rel=NEAR)
    assert got.terms["moe_balance_loss"] != pytest.approx(want.terms["moe_balance_loss"], rel=1e-3)
    assert got.metrics["expert_usage_dropped"] == want.metrics["expert_usage_dropped"]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("arch", ["actv1", "transformer"])
@pytest.mark.parametrize("recompute", [True, False])
def test_mixed_precision(arch: str, exact: bool, recompute: bool) -> None:
    """Every weight gets its gradient, within bfloat16's rounding of the one in float32 (2 percent of the largest)."""
    one_pass = {"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none"} if arch == "transformer" else {}
    shape = Shape(((7, 5), (12,)), tiny_config(**one_pass))
    model = tiny_model(shape.config)
    want = trained(in_chunks(model, 5, exact=exact), shape.batch())
    if recompute:
        apply_activation_checkpointing(model)
    objective = in_chunks(model, 5, exact=exact)
    got = trained(UnderAutocast(objective), shape.batch())
    assert got.gradients.keys() == {f"inner.{name}" for name in want.gradients}
    for name, gradient in want.gradients.items():
        assert gap(got.gradients[f"inner.{name}"], gradient) <= 0.05, name


class UnderAutocast(torch.nn.Module):
    """As a strategy computes an objective's passes under mixed precision: the forward pass, not the backward."""

    def __init__(self, inner: AnyObjective) -> None:
        super().__init__()
        self.inner = inner
        self.initial_carry, self.weights = inner.initial_carry, inner.weights
        self.passes_per_step = inner.passes_per_step

    def forward(self, *args: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(*args)


def test_passes_of_a_step() -> None:
    model = tiny_actv1(tiny_config(seq_len=12, halt_max_steps=3))
    assert [in_chunks(model, size, exact=False).passes_per_step for size in (1, 5, 6, 12, 99)] == [36, 9, 6, 3, 3]
