"""Linear layers whose weights are stored in 8 or 4 bits.

Projections and stacks of experts are replaced by layers that store integer codes with scales, and dequantise at use.
Heads, embeddings, routers and norms are not changed. The codes are frozen; gradients flow to the input.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hrm_ray.model.autocast import product_dtype
from hrm_ray.model.grouped_product import SortedChoices, grouped_product
from hrm_ray.model.layers import Projection
from hrm_ray.model.moe import StackedProjection
from hrm_ray.model.routing import Routing

Bits: TypeAlias = Literal[8, 4]

NF4_BLOCK = 64
"""Weights per scale (Dettmers et al. 2023, QLoRA)."""


class Int8Codes(nn.Module):
    """A matrix, or a stack of them, as int8 `codes` [..., out, in] and a float32 `scale` [..., out, 1] per output.

    A weight is code x scale; the scale is the largest absolute weight of its row / 127, and the error at most half of
    it.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.codes: Tensor
        self.scale: Tensor
        wide = weight.detach().float()
        # The clamp keeps a row of zeros from dividing by zero; its codes are zero whatever the scale.
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("codes", (wide / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weights."""
        return (self.codes * self.scale).to(dtype)


class Nf4Codes(nn.Module):
    """A matrix, or a stack of them, in NormalFloat of 4 bits: uint8 `codes` of two weights each, and a float32 `scale`
    for every 64 weights (Dettmers et al. 2023, arXiv 2305.14314); computed by bitsandbytes.

    The 16 values are densest where normally distributed weights are; the widest gap is 0.30 of a block's largest
    weight, so the error is at most 0.152 of it.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        from bitsandbytes.functional import quantize_4bit

        self.codes: Tensor
        self.scale: Tensor
        self.shape = weight.shape
        codes, state = quantize_4bit(weight.detach().float().reshape(-1), blocksize=NF4_BLOCK, quant_type="nf4")
        self.register_buffer("codes", codes)
        self.register_buffer("scale", state.absmax)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weights."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # Flat and padded to an even number: kernels ignore the shape, and some refuse odd lengths.
        flat = torch.Size([2 * self.codes.numel()])
        state = QuantState(self.scale, shape=flat, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
        return dequantize_4bit(self.codes, state).view(-1)[: self.shape.numel()].view(self.shape)


Codes: TypeAlias = Int8Codes | Nf4Codes
CODES: dict[Bits, type[Codes]] = {8: Int8Codes, 4: Nf4Codes}
"""By the bits of a weight."""


class QuantisedProjection(nn.Linear):
    """A projection with quantised weights. It is an nn.Linear, so that peft can add adapters to it."""

    def __init__(self, in_features: int, out_features: int, codes: Codes) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)
        self.quantised = codes

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weights [out, in], float32, computed at every access."""
        return self.quantised.weight(torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input.to(product_dtype(input)), self.quantised)
        return product


class QuantisedStack(nn.Module):
    """The projections of all experts, [E, out, in], with quantised weights."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.quantised = codes

    def forward(self, rows: Tensor, order: SortedChoices, routing: Routing | None) -> Tensor:
        """rows [A, in], sorted by expert -> [A, out]."""
        product: Tensor = _StackedProduct.apply(rows, self.quantised, order.ends)
        return product


class _Product(torch.autograd.Function):
    """x W^T; the backward pass dequantises W again, so that only one matrix is held at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Codes) -> Tensor:
        ctx.codes = codes
        return F.linear(x, codes.weight(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient @ ctx.codes.weight(gradient.dtype), None


class _StackedProduct(torch.autograd.Function):
    """The same for rows sorted by expert."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, codes: Codes, ends: Tensor) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(ends)
        return _grouped(rows, codes.weight(rows.dtype), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (ends,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        return _grouped(gradient, ctx.codes.weight(gradient.dtype).transpose(1, 2), ends), None, None


def _grouped(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows times its matrix of `stack` [E, out, in], transposed, without a graph."""
    with torch.no_grad():
        return grouped_product(rows, stack, stack, ends)


def quantise_projections(model: nn.Module, bits: Bits) -> None:
    """Quantise the weights of all projections and expert stacks to `bits`, in place, and freeze the whole model.

    One layer after the other, so that the model is never held twice.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Projection):
                codes = CODES[bits](child.weight)
                setattr(parent, name, QuantisedProjection(child.in_features, child.out_features, codes))
            elif isinstance(child, StackedProjection):
                setattr(parent, name, QuantisedStack(CODES[bits](child.weight)))
    model.requires_grad_(False)


def plain_weight(module: nn.Module) -> Tensor | None:
    """The dequantised float32 weights of a quantised layer; None for any other module."""
    if isinstance(module, QuantisedProjection | QuantisedStack):
        return module.quantised.weight(torch.float32)
    return None
