"""Weights held in 8 and 4 bits: the storage, the error, the products and gradients, and what stays as it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hrm_ray.model.build import build_objective
from hrm_ray.model.grouped_product import sort_by_expert
from hrm_ray.model.layers import Projection
from hrm_ray.model.moe import StackedProjection
from hrm_ray.model.transforms.quantise import (
    CODES,
    Bits,
    Int8Codes,
    Nf4Codes,
    QuantisedProjection,
    QuantisedStack,
    quantise_projections,
)
from hrm_ray.train.storage_tracker import StorageTracker, storage_bytes
from tests.support.tiny_models import backward_all, text_batch, tiny_config, tiny_model

BITS: list[Bits] = [8, 4]
NF4_VALUES = [
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
]
"""The sixteen numbers of NormalFloat (QLoRA, appendix E), rounded to seven digits."""


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 10


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_int8_is_off_by_half_a_scale_at_most(shape: list[int], scale: float, seed: int) -> None:
    """The bound of the format, with a millionth on top for the float32 product."""
    weight = weights(*shape, seed=seed) * scale
    codes = Int8Codes(weight)
    assert codes.codes.dtype == torch.int8 and codes.codes.shape == weight.shape
    assert codes.scale.shape == (*shape[:-1], 1)
    largest = weight.abs().amax(-1, keepdim=True)
    assert bool(((codes.weight(torch.float32) - weight).abs() <= largest * (1 / 254 + 1e-6)).all())
    assert int(codes.codes.abs().max()) == 127


@settings(max_examples=20)
@given(shape=st.lists(st.integers(1, 9), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_nf4_against_its_table(shape: list[int], seed: int) -> None:
    """Every weight is the block's largest times the nearest of the sixteen numbers (to their seven digits), for any
    shape: also where a line is odd or the last block is not full."""
    weight = weights(*shape, seed=seed)
    codes = Nf4Codes(weight)
    assert codes.codes.dtype == torch.uint8
    assert codes.codes.numel() == -(-weight.numel() // 2)
    got = codes.weight(torch.float32)
    assert got.shape == weight.shape
    table = torch.tensor(NF4_VALUES)
    for start in range(0, weight.numel(), 64):
        block, found = weight.flatten()[start : start + 64], got.flatten()[start : start + 64]
        largest = block.abs().max()
        nearest = table[(block.unsqueeze(-1) / largest - table).abs().argmin(-1)] * largest
        # A number in the middle between two may go either way.
        gap = (block - found).abs() - (block - nearest).abs()
        assert float(gap.max()) <= 1e-5 * float(largest)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits: Bits) -> None:
    codes = CODES[bits](torch.zeros(4, 64))
    assert codes.weight(torch.float32).eq(0).all()
    assert codes.scale.isfinite().all() and (bits == 4 or codes.scale.gt(0).all()), "no code is 0 / 0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_products_and_gradients_are_those_of_the_weights(bits: Bits, dtype: torch.dtype) -> None:
    """Against a projection with the dequantised weights: the same kernels on the same numbers."""
    dense = Projection(96, 80)
    nn.init.normal_(dense.weight)
    held = QuantisedProjection(96, 80, CODES[bits](dense.weight))
    dense.weight.data = held.weight
    x = weights(2, 5, 96).to(dtype)
    results = []
    for layer in (dense, held):
        given_x = x.clone().requires_grad_()
        y = layer(given_x)
        assert y.dtype == dtype and y.shape == (2, 5, 80)
        (y * weights(2, 5, 80, seed=1)).sum().backward()
        assert given_x.grad is not None
        results.append((y.detach(), given_x.grad))
    for dense_result, held_result in zip(*results, strict=True):
        torch.testing.assert_close(held_result, dense_result, rtol=0, atol=0)
    assert list(held.parameters()) == [] and set(dict(held.named_buffers())) == {
        "quantised.codes",
        "quantised.scale",
    }


@pytest.mark.parametrize("bits", BITS)
def test_under_autocast(bits: Bits) -> None:
    held = QuantisedProjection(64, 32, CODES[bits](weights(32, 64)))
    x = weights(3, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), StorageTracker() as live:
        y = held(x)
    assert bits == 8 or live.largest_bytes() <= 2 * 32 * 64, "the weights are made in the narrow type"
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, torch.nn.functional.linear(x.bfloat16(), held.weight.bfloat16()), rtol=0, atol=0)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("bits", BITS)
def test_experts(bits: Bits) -> None:
    """Rows sorted by expert, one expert without any, against the stack of dequantised weights."""
    dense = StackedProjection(4, 24, 40)
    nn.init.normal_(dense.weight)
    held = QuantisedStack(CODES[bits](dense.weight))
    dense.weight.data = held.quantised.weight(torch.float32)
    experts = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0]])
    order = sort_by_expert(experts, torch.bincount(experts.flatten(), minlength=4))
    results = []
    for layer in (dense, held):
        rows = weights(8, 24).requires_grad_()
        y = layer(rows, order, None)
        (y * weights(8, 40, seed=1)).sum().backward()
        assert rows.grad is not None
        results.append((y.detach(), rows.grad))
    for dense_result, held_result in zip(*results, strict=True):
        torch.testing.assert_close(held_result, dense_result, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("changes", [{}, {"num_experts": 4}, {"arch": "transformer"}], ids=str)
def test_what_a_model_holds(bits: Bits, changes: dict[str, int | str]) -> None:
    """Every projection in codes and nothing else: heads, embeddings, router and states to the bit, all of it frozen.
    Bytes as the formats say: 1 + 4 / width per weight, or 1/2 + 4/64."""
    config = tiny_config(**changes, hidden_size=64, intermediate_size=128)
    model, plain = tiny_model(config), tiny_model(config)
    quantise_projections(model, bits)
    assert not [m for m in model.modules() if isinstance(m, Projection | StackedProjection)]
    assert not any(p.requires_grad for p in model.parameters())
    own = dict(plain.state_dict())
    for name, tensor in model.state_dict().items():
        if ".quantised." not in name:
            assert torch.equal(tensor, own[name]), name
    kept = {name for name in own if name in model.state_dict()}
    assert {"lm_head.weight", "embedding.embed_tokens.weight"} <= kept
    gone = {name: tensor for name, tensor in own.items() if name not in kept}
    assert {name.split(".")[-2] for name in gone} >= {"q_proj", "o_proj", "down_proj"}
    number = sum(tensor.numel() for tensor in gone.values())
    rows = sum(tensor.numel() // tensor.shape[-1] for tensor in gone.values())
    wanted = number + 4 * rows if bits == 8 else number // 2 + 4 * number // 64
    codes = [buffer for name, buffer in model.named_buffers() if ".quantised." in name]
    assert storage_bytes(codes) == wanted
    assert wanted / (4 * number) == pytest.approx(0.2617 if bits == 8 else 0.1406, abs=0.01)
    for name, module in model.named_modules():
        if isinstance(module, Int8Codes):
            assert module.codes.dtype == torch.int8, name
        if isinstance(module, Nf4Codes):
            assert module.codes.dtype == torch.uint8, name


@pytest.mark.parametrize("bits", BITS)
def test_a_whole_model_computes_nearly_the_same(bits: Bits) -> None:
    """Relative errors of the weights are 0.8 % and 9 % (root mean square, normal weights); those of the loss stay far
    below, since they do not add up."""
    config = tiny_config(hidden_size=64, intermediate_size=128, num_experts=4)
    batch = text_batch(0, [[12], [5, 7]])
    losses = []
    for quantised in (False, True):
        model = tiny_model(config)
        if quantised:
            quantise_projections(model, bits)
            model.lm_head.weight.requires_grad_(True)
        objective = build_objective(model, "softmax", supervision="rollout", halt_margin=0.01)
        losses.append(backward_all(objective, batch))
        assert model.lm_head.weight.grad is not None
    assert losses[1] == pytest.approx(losses[0], rel=0.01 if bits == 8 else 0.1)
    assert losses[1] != losses[0]


@pytest.mark.parametrize("bits", BITS)
def test_no_dequantised_weight_is_kept_for_the_backward_pass(bits: Bits) -> None:
    """Ten layers in a row: between forward and backward live the inputs of the layers, not their weights."""
    layers = [QuantisedProjection(128, 128, CODES[bits](weights(128, 128, seed=s))) for s in range(10)]
    x = weights(4, 128).requires_grad_()
    with StorageTracker() as live:
        y = x
        for layer in layers:
            y = layer(y)
        between = live.live_bytes("other") - storage_bytes(b for layer in layers for b in layer.buffers())
        y.sum().backward()
    assert between < 2 * 4 * 128 * 128
    assert live.largest_bytes() <= 4 * 128 * 128


@pytest.mark.parametrize("bits", BITS)
def test_codes_survive_a_state_dict(bits: Bits) -> None:
    first, second = (QuantisedProjection(70, 9, CODES[bits](weights(9, 70, seed=s))) for s in (0, 1))
    assert not torch.equal(first.weight, second.weight)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.weight, second.weight)
