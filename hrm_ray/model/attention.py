"""Attention by PyTorch's own kernels, on any device: softmax(q k^T / sqrt(d)) v over the keys that a scope allows.

Other kernels that may take its place are in attention_backends.py; projections and rotary positions are in layers.py.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm_ray.model.autocast import product_dtype
from hrm_ray.model.scope import AttentionScope

WHOLE_MASK_ENTRIES = 256 * 256
"""Up to so many pairs of query and key, one mask is made for the whole row; above, for a block of queries at a time."""

QUERY_BLOCKS = {"cpu": 128}
"""Queries of a block by kind of device, enough to keep a kernel busy; measured on a CPU."""
QUERY_BLOCK = 512
"""Queries of a block on any other device."""
SMALLEST_BLOCK = 64
"""A block much wider than the window computes mostly masked pairs; one narrower than this is mostly overhead."""

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class AttentionKernel(Protocol):
    """A way to compute attention. All give the same numbers, up to their precision."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope) -> Tensor:
        """`query` [B, heads, Tq, d]; `keys`, `values` [B, heads, Tk >= Tq, d] -> [B, heads, Tq, d]."""


def attend(query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope) -> Tensor:
    """Attention by PyTorch's scaled_dot_product_attention, which every device has.

    Long rows need no mask where the causal rule alone holds (on a CPU also for fewer queries than keys). Elsewhere they
    are computed a block of queries at a time against the keys that the block can see, forward and backward:
    O(S x window) with a window, and never a tensor of S x S.
    """
    queries, total = query.shape[2], keys.shape[2]
    if scope.sees_all(queries, total):
        return F.scaled_dot_product_attention(query, keys, values)
    if scope.is_plain_causal(queries, total):
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True)
    if queries * total <= WHOLE_MASK_ENTRIES:
        mask = scope.whole_mask(queries, total, query)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    first = scope.causal_from(queries, total)
    if first == total - queries:
        return F.scaled_dot_product_attention(query, keys[:, :, first:], values[:, :, first:], is_causal=True)
    if first is not None and query.device.type == "cpu":
        return attend_in_two(query, keys[:, :, first:], values[:, :, first:])
    return blockwise(query, keys, values, scope, block_size(scope, query.device.type))


def block_size(scope: AttentionScope, device: str) -> int:
    """Queries per block: as many as the window has keys, within bounds."""
    widest = QUERY_BLOCKS.get(device, QUERY_BLOCK)
    return widest if scope.window is None else max(SMALLEST_BLOCK, min(widest, scope.window))


def blockwise(query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope, size: int) -> Tensor:
    """Attention in blocks of `size` queries; see `attend`."""
    result: Tensor = _Blockwise.apply(query, keys, values, scope, size)
    return result


class _Blockwise(torch.autograd.Function):
    """Saves queries, keys and values only; the backward pass computes each block again, with its own mask.

    Gradients of keys and values are summed in one buffer: with a slice per block in the graph, autograd would make a
    tensor of the whole row for each block.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope, size: int) -> Tensor:
        ctx.save_for_backward(query, keys, values)
        ctx.scope, ctx.size = scope, size
        queries, total = query.shape[2], keys.shape[2]
        output = torch.empty_like(query)
        for block, reach in scope.blocks(queries, total, size):
            mask = scope.block_mask(block, reach, queries, total, size, query)
            output[:, :, block] = F.scaled_dot_product_attention(
                query[:, :, block], keys[:, :, reach], values[:, :, reach], attn_mask=mask
            )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values = ctx.saved_tensors
        scope: AttentionScope = ctx.scope
        queries, total = query.shape[2], keys.shape[2]
        # A key's gradient is a sum over blocks, so it is taken in float32 whatever the type of the attention.
        wide = torch.promote_types(keys.dtype, torch.float32)
        d_query = torch.empty_like(query)
        d_keys, d_values = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
        for block, reach in scope.blocks(queries, total, ctx.size):
            mask = scope.block_mask(block, reach, queries, total, ctx.size, query)
            parts = (query[:, :, block], keys[:, :, reach], values[:, :, reach])
            leaves = [part.detach().requires_grad_() for part in parts]
            with torch.enable_grad():
                seen = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], attn_mask=mask)
            d_query[:, :, block], for_keys, for_values = torch.autograd.grad(seen, leaves, gradient[:, :, block])
            d_keys[:, :, reach] += for_keys
            d_values[:, :, reach] += for_values
        return d_query, d_keys.to(keys.dtype), d_values.to(values.dtype), None, None


def attend_in_two(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention on a CPU, without a mask, of the last Tq positions of a row to all of it.

    `query` [B, heads, Tq, d]; `keys`, `values` [B, heads, Tk > Tq, d] -> [B, heads, Tq, d]. The queries attend to the
    keys before them, all of which they see, and to their own under the kernel's causal rule, and the two are joined:
    PyTorch's kernel for CPUs has no rule for fewer queries than keys, and with a mask its backward pass takes twice as
    long.
    """
    dtype = product_dtype(query)
    output: Tensor = _Joined.apply(query.to(dtype), keys.to(dtype), values.to(dtype))
    return output


class _Joined(torch.autograd.Function):
    """Attention to earlier and to own keys, joined by log-sum-exp.

    Each part is a softmax over its own keys; weighted by its share of the normaliser, which the kernel returns as a
    log-sum, it is its part of the softmax over all keys. The kernel's backward pass reads a result and its log-sum
    alone: given those of the whole it gives the exact gradients of a part (Dao et al. 2022, FlashAttention, algorithms
    2 and 4). The kernel's own graph does not, since it treats log-sums as constants.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        earlier = keys.shape[2] - query.shape[2]
        before, sum_before = _FORWARD(query, keys[:, :, :earlier], values[:, :, :earlier], 0.0, False)
        own, sum_own = _FORWARD(query, keys[:, :, earlier:], values[:, :, earlier:], 0.0, True)
        log_sum = torch.logaddexp(sum_before, sum_own)
        # The log-sums are float32 at least, and so is the sum of both parts.
        joined = before * (sum_before - log_sum).exp_().unsqueeze(-1)
        joined += own * (sum_own - log_sum).exp_().unsqueeze(-1)
        joined = joined.to(query.dtype)
        ctx.save_for_backward(query, keys, values, joined, log_sum)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, keys, values, joined, log_sum = ctx.saved_tensors
        earlier = keys.shape[2] - query.shape[2]
        d_keys, d_values = torch.empty_like(keys), torch.empty_like(values)
        d_queries = []
        for part, causal in ((slice(0, earlier), False), (slice(earlier, None), True)):
            pair = (keys[:, :, part], values[:, :, part])
            d_query, d_keys[:, :, part], d_values[:, :, part] = _BACKWARD(
                gradient, query, *pair, joined, log_sum, 0.0, causal
            )
            d_queries.append(d_query)
        return d_queries[0].add_(d_queries[1]), d_keys, d_values
