"""The block both levels are made of: attention, gated FFN, norm, rotary positions.

One job: one layer's arithmetic (ACTV1_SPEC, section 4). It knows nothing of cycles, segments or losses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hrm_ray.model.config import ModelConfig

Site = tuple[int, int]
"""Which attention (or FFN) of a segment: the number of the update in time order, and of the layer in its level."""


class KeyValueExchange(Protocol):
    """What a key/value cache does at one attention of a segment: takes the new keys and values, gives those to use."""

    def exchange(self, site: Site, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`keys`, `values` [B, heads, T_new, d] -> [B, heads, T_all, d].

        Called in time order; once more with the same numbers where a block is recomputed in the backward pass.
        """


@dataclass(frozen=True)
class AttentionScope:
    """Which positions see which: a boolean mask [B or 1, 1, T_query, T_key] (True = sees), or a rule without one."""

    mask: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines [T, d] of the rotary positions in use."""

    cos: Tensor
    sin: Tensor


class RotaryTable(nn.Module):
    """Rotary angles of all positions, in float32; not part of the saved weights ("half" layout)."""

    def __init__(self, positions: int, head_dim: int, theta: float) -> None:
        super().__init__()
        inverse = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse)
        angles = torch.cat((angles, angles), dim=-1)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        # The sign of the rotated half is kept in the table: x*cos + roll(x, d/2)*sin then needs no negation.
        sign = torch.ones(head_dim)
        sign[: head_dim // 2] = -1
        self.register_buffer("sin", angles.sin() * sign, persistent=False)

    def at(self, start: int, stop: int) -> Rotation:
        return Rotation(self.cos[start:stop], self.sin[start:stop])


@dataclass(frozen=True)
class Context:
    """What every layer of a pass is told: who sees whom, the positions, where keys and values go, which update it is.

    `update` counts the L and H updates of a segment in time order.
    """

    scope: AttentionScope
    rotation: Rotation | None
    cache: KeyValueExchange | None = None
    update: int = 0

    def at(self, update: int) -> Context:
        return replace(self, update=update)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn pairs (x_j, x_{j+d/2}) of `x` [B, heads, T, d] by their position's angle, in float32."""
    wide = x.float()
    turned = wide * rotation.cos + wide.roll(x.shape[-1] // 2, dims=-1) * rotation.sin
    return turned.to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with the float32 weight cast to the activations' type at use (ACTV1_SPEC, section 8)."""
    return F.linear(x, weight.to(x.dtype))


class Projection(nn.Linear):
    """A linear map without bias whose weight follows the activations' type."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32, without a weight."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with separate q, k, v, o projections; scale 1/sqrt(head_dim), no dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = Projection(hidden_size, hidden_size)
        self.k_proj = Projection(hidden_size, hidden_size)
        self.v_proj = Projection(hidden_size, hidden_size)
        self.o_proj = Projection(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        batch, length, hidden = x.shape
        split = (batch, length, self.num_heads, hidden // self.num_heads)
        query = self.q_proj(x).view(split).transpose(1, 2)
        keys = self.k_proj(x).view(split).transpose(1, 2)
        values = self.v_proj(x).view(split).transpose(1, 2)
        if context.rotation is not None:
            query, keys = rotate(query, context.rotation), rotate(keys, context.rotation)
        if context.cache is not None:
            keys, values = context.cache.exchange((context.update, layer), keys, values)
        scope = context.scope
        seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=scope.mask, is_causal=scope.causal)
        return self.o_proj(seen.transpose(1, 2).reshape(batch, length, hidden))


class GatedFeedForward(nn.Module):
    """SwiGLU: down( silu(gate x) * up x )."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Projection(config.hidden_size, config.intermediate_size)
        self.up_proj = Projection(config.hidden_size, config.intermediate_size)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        # Most updates of a segment keep no graph; these, the widest tensors of a layer, are then changed in place.
        return self.down_proj(F.silu(gate, inplace=True).mul_(up))


class Block(nn.Module):
    """Post-norm layer: x <- N(x + Attention(x)); x <- N(x + FFN(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedFeedForward(config)
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        """x [B, T, D] -> [B, T, D]; `layer` is the block's number in its level."""
        x = rms_norm(x + self.self_attn(x, context, layer), self.eps)
        return rms_norm(x + self.mlp(x), self.eps)


class Level(nn.Module):
    """A stack of blocks that takes an injection once, at its entry.

    With `recompute` the backward pass computes each block again from its input instead of keeping what is inside it
    (gradient checkpointing); set by `transforms.recompute`.
    """

    def __init__(self, layers: int, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(layers))
        self.recompute = False

    def forward(self, x: Tensor, injection: Tensor | None, context: Context) -> Tensor:
        """x, injection [B, T, D] -> [B, T, D]."""
        if injection is not None:
            x = x + injection
        keeps = not (self.recompute and torch.is_grad_enabled())
        for number, layer in enumerate(self.layers):
            x = layer(x, context, number) if keeps else checkpoint(layer, x, context, number, use_reentrant=False)
        return x
