"""Linear layers whose weights are held in 8 or 4 bits.

One job: replace the projections of a model, and its stacks of experts, by layers that keep integer codes with scales
and make the weights of them at use. Heads, embeddings, routers and norms stay as they are. The codes are frozen:
gradients pass through to the input.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hrm_ray.model.autocast import product_dtype
from hrm_ray.model.grouped_product import Sorted, grouped_product
from hrm_ray.model.layers import Projection
from hrm_ray.model.moe import StackedProjection
from hrm_ray.model.routing import Routing

Bits: TypeAlias = Literal[8, 4]

NF4_BLOCK = 64
"""Weights that share a scale (Dettmers et al. 2023, QLoRA)."""


class Int8Codes(nn.Module):
    """A matrix, or a stack of them, as int8 `codes` [..., out, in] and a float32 `scale` [..., out, 1] per output.

    A weight is code x scale; the scale is its row's largest absolute weight / 127, and a weight is off by half of it at
    most.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.codes: Tensor
        self.scale: Tensor
        wide = weight.detach().float()
        # A row of zeros has codes of zero whatever its scale.
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("codes", (wide / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weights that the codes stand for."""
        return (self.codes * self.scale).to(dtype)


class Nf4Codes(nn.Module):
    """A matrix, or a stack of them, in NormalFloat of 4 bits: uint8 `codes` of two weights each, and a float32 `scale`
    for every 64 weights (Dettmers et al. 2023, arXiv 2305.14314); computed by bitsandbytes.

    The 16 values lie closest where normally distributed weights are; the widest gap is 0.30 of a block's largest
    weight, so that a weight is off by 0.152 of that at most.
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
        """The weights that the codes stand for."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        # In one line, filled up to an even number: kernels have no use for the shape, and some take no odd lines.
        flat = torch.Size([2 * self.codes.numel()])
        state = QuantState(self.scale, shape=flat, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
        return dequantize_4bit(self.codes, state).view(-1)[: self.shape.numel()].view(self.shape)


Codes: TypeAlias = Int8Codes | Nf4Codes
CODES: dict[Bits, type[Codes]] = {8: Int8Codes, 4: Nf4Codes}
"""How weights are held, by their bits."""


class QuantisedProjection(nn.Linear):
    """A projection whose weights are codes. It counts as a linear layer, so that adapters can be laid beside it."""

    def __init__(self, in_features: int, out_features: int, codes: Codes) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)
        self.quantised = codes

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights as they are used, [out, in], float32; made anew at every look."""
        return self.quantised.weight(torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input.to(product_dtype(input)), self.quantised)
        return product


class QuantisedStack(nn.Module):
    """The projections of all experts, [E, out, in], as codes."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.quantised = codes

    def forward(self, rows: Tensor, order: Sorted, routing: Routing | None) -> Tensor:
        """rows [A, in], sorted by expert -> [A, out]."""
        product: Tensor = _StackedProduct.apply(rows, self.quantised, order.ends)
        return product


class _Product(torch.autograd.Function):
    """x W^T; the backward pass makes W of its codes again, so that no more than one matrix is whole at a time."""

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
    """Hold the weights of all projections and expert stacks in `bits`, in place, and freeze what else there is.

    One layer after the other, so that no second copy of the model is made.
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
    """The float32 weights that a quantised layer stands for; None for any other module."""
    if isinstance(module, QuantisedProjection | QuantisedStack):
        return module.quantised.weight(torch.float32)
    return None
