"""The block of both levels: attention, FFN, norms, dropout and rotary positions (ACTV1_SPEC, section 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hrm_ray.model.activations import inner_values
from hrm_ray.model.attention import AttentionKernel, attend
from hrm_ray.model.attention_backends import FlexAttention
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.dropout import Draws, Dropout
from hrm_ray.model.moe import MixtureOfExperts
from hrm_ray.model.routing import Routing
from hrm_ray.model.routing import Site as Site
from hrm_ray.model.scope import AttentionScope

KeysValues = tuple[Tensor, Tensor]
"""Keys and values [B, heads, T, d]."""

KVCache = Callable[[Site, Tensor, Tensor], KeysValues]
"""Takes the new keys and values of one attention of a segment, and gives all that the new positions attend to.

It is called in time order, and once more with the same numbers where a block is recomputed in the backward pass.
"""


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
        # The sign of the rotated half is kept in the table, so that the rotation needs no negation.
        sign = torch.ones(head_dim)
        sign[: head_dim // 2] = -1
        self.register_buffer("sin", angles.sin() * sign, persistent=False)

    def at(self, start: int, stop: int) -> Rotation:
        return Rotation(self.cos[start:stop], self.sin[start:stop])


@dataclass(frozen=True)
class Context:
    """The state that the layers of a pass share: attention scope, rotary positions, key/value cache, update, routers'
    record, and what dropout draws from.

    `update` counts the L and H updates of a segment in time order. `routing` collects what the routers of a model with
    experts do; None collects nothing. `draws` is None where nothing is dropped out.
    """

    scope: AttentionScope
    rotation: Rotation | None
    cache: KVCache | None = None
    update: int = 0
    routing: Routing | None = None
    draws: Draws | None = None

    def at(self, update: int) -> Context:
        return replace(self, update=update)


class _Rotate(torch.autograd.Function):
    """The rotation of `rotate`, whose gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cos  # in float32, the type of the tables, without a float32 copy of a bf16 `x`
    # A product per half: no kernel that moves halves about, and addcmul would round once less on some CPUs.
    turned[..., :half] += x[..., half:] * sin[..., :half]
    turned[..., half:] += x[..., :half] * sin[..., half:]
    return turned.to(x.dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate pairs (x_j, x_{j+d/2}) of `x` [B, heads, T, d] by their position's angle, in float32 (Su et al. 2021)."""
    if torch.compiler.is_compiling():
        # The same numbers in the form that inductor makes one kernel of; of halves it makes two, with a float32 copy.
        wide = x.float()
        return (wide * rotation.cos + wide.roll(x.shape[-1] // 2, dims=-1) * rotation.sin).to(x.dtype)
    if not torch.is_grad_enabled():
        return _rotated(x, rotation.cos, rotation.sin)  # a decoded token is so little that the detour shows
    turned: Tensor = _Rotate.apply(x, rotation.cos, rotation.sin)
    return turned


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with the float32 weight cast to the activations' type at use (ACTV1_SPEC, section 8)."""
    # Where `x` has 16 bits each use casts the weight anew, so that gradients of several uses are added in float32.
    return F.linear(x, weight.to(x.dtype))


class Projection(nn.Linear):
    """A linear map without bias whose weight follows the activations' type."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32, without a weight."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def call(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` as it is; `transforms.compile` puts compiled functions in its place."""
    return function(*args)


class Attention(nn.Module):
    """Multi-head attention with separate q, k, v, o projections; scale 1/sqrt(head_dim), no dropout.

    `kernel` computes it; `transforms.attend` sets another one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = Projection(hidden_size, hidden_size)
        self.k_proj = Projection(hidden_size, hidden_size)
        self.v_proj = Projection(hidden_size, hidden_size)
        self.o_proj = Projection(hidden_size, hidden_size)
        self.kernel: AttentionKernel = attend
        self.call = call

    def is_plain(self, x: Tensor, context: Context) -> bool:
        """Whether whole rows attend to themselves by PyTorch's kernel without a mask."""
        if context.cache is not None or not (self.kernel is attend or isinstance(self.kernel, FlexAttention)):
            return False
        length = x.shape[1]
        return context.scope.is_plain_causal(length, length) or context.scope.sees_all(length, length)

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        """x [B, T, D] -> the heads' results [B, heads, T, d], before the output projection."""
        query, keys, values = self.call(project, self, x, context.rotation)
        if context.cache is not None:
            keys, values = context.cache((context.update, layer), keys, values)
        return self.kernel(query, keys, values, context.scope)


def project(attention: Attention, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, D] -> queries, keys and values [B, heads, T, d], queries and keys rotated."""
    batch, length, hidden = x.shape
    split = (batch, length, attention.num_heads, hidden // attention.num_heads)
    query = attention.q_proj(x).view(split).transpose(1, 2)
    keys = attention.k_proj(x).view(split).transpose(1, 2)
    values = attention.v_proj(x).view(split).transpose(1, 2)
    if rotation is not None:
        query, keys = rotate(query, rotation), rotate(keys, rotation)
    return query, keys, values


class RmsNorm(nn.Module):
    """RMSNorm without a weight, as in the reference."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias, as PyTorch's, in float32 (Ba et al. 2016)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        wide = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return wide.to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU, down( act(gate x) * up x ); without a gate down( act(up x) ), of the same inner width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_proj = Projection(config.hidden_size, config.intermediate_size) if config.swiglu else None
        self.up_proj = Projection(config.hidden_size, config.intermediate_size)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        gate = self.gate_proj(x) if self.gate_proj is not None else None
        return self.down_proj(inner_values(self.activation, self.up_proj(x), gate))


DropoutKeys = tuple[Tensor | None, Tensor | None]
"""What the two branches of a block draw from, each [B]."""


class Block(nn.Module):
    """Post-norm layer: x <- N(x + Attention(x)); x <- N(x + FFN(x)); in training with dropout on both branches.

    Each call draws its own dropout, also in updates without a graph and in the look-ahead of puzzles: a segment in
    training is the same computation whether it carries gradient or not.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = RmsNorm if config.rmsnorm else LayerNorm
        self.self_attn = Attention(config)
        self.attn_norm = norm(config)
        self.mlp = MixtureOfExperts(config) if config.num_experts else FeedForward(config)
        self.mlp_norm = norm(config)
        self.dropout = Dropout(config.dropout_rate)
        self.call = call

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        """x [B, T, D] -> [B, T, D]; `layer` is the block's number in its level."""
        sparse = isinstance(self.mlp, MixtureOfExperts)
        causal = context.scope.is_plain_causal(x.shape[1], x.shape[1])
        keys = self._dropout_keys(context, layer, x.shape[2])
        if self.self_attn.is_plain(x, context):
            x = self.call(attention_layer if sparse else dense_block, self, x, context.rotation, causal, keys)
        else:
            # Attention stays outside what is compiled: masks, caches and sites would each be compiled for.
            attended = self.self_attn(x, context, layer)
            x = self.call(add_attention if sparse else add_both, self, x, attended, keys)
        if not sparse:
            return x
        fed = self.mlp(x, (context.update, layer), context.routing)
        return add_feed_forward(self, x, fed, keys)

    def _dropout_keys(self, context: Context, layer: int, width: int) -> DropoutKeys:
        draws = context.draws
        if draws is None or not self.dropout.rate:
            return None, None
        site = (context.update, layer)
        return draws.keys(site, 0, width), draws.keys(site, 1, width)


def attention_layer(block: Block, x: Tensor, rotation: Rotation | None, causal: bool, keys: DropoutKeys) -> Tensor:
    """x [B, T, D] -> N(x + Attention(x)) over whole rows, by PyTorch's kernel without a mask."""
    attended = F.scaled_dot_product_attention(*project(block.self_attn, x, rotation), is_causal=causal)
    return add_attention(block, x, attended, keys)


def dense_block(block: Block, x: Tensor, rotation: Rotation | None, causal: bool, keys: DropoutKeys) -> Tensor:
    """A block without experts over whole rows."""
    x = attention_layer(block, x, rotation, causal, keys)
    return add_feed_forward(block, x, block.mlp(x), keys)


def add_attention(block: Block, x: Tensor, attended: Tensor, keys: DropoutKeys) -> Tensor:
    """x [B, T, D] and the heads' results [B, heads, T, d] -> N(x + Attention(x))."""
    joined = block.self_attn.o_proj(attended.transpose(1, 2).reshape(x.shape))
    result: Tensor = block.attn_norm(x + block.dropout(joined, keys[0]))
    return result


def add_feed_forward(block: Block, x: Tensor, fed: Tensor, keys: DropoutKeys) -> Tensor:
    """x and FFN(x) -> N(x + FFN(x))."""
    result: Tensor = block.mlp_norm(x + block.dropout(fed, keys[1]))
    return result


def add_both(block: Block, x: Tensor, attended: Tensor, keys: DropoutKeys) -> Tensor:
    """The part after attention of a block without experts."""
    x = add_attention(block, x, attended, keys)
    return add_feed_forward(block, x, block.mlp(x), keys)


class Level(nn.Module):
    """A stack of blocks; the injection is added once, to its input.

    With `recompute` the backward pass computes each block again from its input instead of saving its activations
    (gradient checkpointing, set by `transforms.activation_checkpointing`).
    """

    def __init__(self, layers: int, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(layers))
        self.recompute = False

    def forward(self, x: Tensor, injection: Tensor | None, context: Context) -> Tensor:
        """x, injection [B, T, D] -> [B, T, D]."""
        if injection is not None:
            x = x + injection
        if not (self.recompute and torch.is_grad_enabled()):
            for number, layer in enumerate(self.layers):
                x = layer(x, context, number)
            return x
        for number, layer in enumerate(self.layers):
            # What a block draws follows from its place, so no state of a generator is kept.
            x = checkpoint(layer, x, context, number, use_reentrant=False, preserve_rng_state=False)
        return x
