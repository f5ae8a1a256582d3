"""Rotary positions against their plain formula, the types of norms and rotations, and a block under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hrm_ray.model.layers import Block, Context, RotaryTable, Rotation, rms_norm, rotate
from hrm_ray.model.scope import CAUSAL
from tests.support.tiny_models import tiny_config, tiny_model


def by_roll(x: Tensor, rotation: Rotation) -> Tensor:
    wide = x.float()
    return (wide * rotation.cos + wide.roll(x.shape[-1] // 2, dims=-1) * rotation.sin).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_and_its_gradient_equal_the_formula_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rotation = RotaryTable(20, 32, 10000.0).at(3, 20)
    given = torch.randn(2, 17, 4, 32).to(dtype)
    gradient = torch.randn(2, 4, 17, 32).to(dtype)
    found = []
    for formula in (rotate, by_roll):
        x = given.clone().requires_grad_()
        turned = formula(x.transpose(1, 2), rotation)
        turned.backward(gradient)
        assert x.grad is not None
        found.append((turned.detach(), x.grad))
    assert found[0][0].dtype == dtype
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_taken_in_float32_and_equals_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (100 * torch.randn(3, 5, 64)).to(dtype)
    wide = x.float()
    plain = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        normed = rms_norm(x, 1e-5)
    assert normed.dtype == dtype
    assert torch.equal(normed, plain)


def test_one_graph_serves_all_blocks_updates_and_segments() -> None:
    """Nothing in a dense block's inputs changes what torch.compile makes of it."""
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = tiny_model(tiny_config(h_layers=2, l_layers=2))
    compiled = torch.compile(Block.forward, backend=counting, fullgraph=True)
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    assert len(blocks) == 4
    for _ in range(2):
        context = Context(CAUSAL, model.rotation(0, 12))
        for update in range(model.config.updates_per_segment):
            for layer, block in enumerate(blocks):
                compiled(block, torch.randn(2, 12, 16), context.at(update), layer)
    assert len(graphs) == 1
