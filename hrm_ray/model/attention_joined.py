"""Causal attention of a row's last positions to all of it, on a CPU, without a mask.

One job: the queries against the keys before them, which all of them see, and against their own under the kernel's
causal rule; the two are joined. PyTorch's kernel for CPUs has no rule for fewer queries than keys, and with a mask its
backward pass takes twice as long.

Each part is a softmax of its own keys; weighted by its share of the normaliser, which the kernel gives as a log-sum, it
is a part of the softmax of all. The kernel's backward pass goes by a result and its log-sum alone: given those of the
whole it gives the exact gradients of a part (Dao et al. 2022, FlashAttention, algorithms 2 and 4). The kernel's own
graph does not: it takes log-sums for constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm_ray.model.autocast import product_dtype

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_in_two(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`query` [B, heads, Tq, d], the last of `keys`, `values` [B, heads, Tk > Tq, d], each seeing itself and all before
    it -> [B, heads, Tq, d]; on a CPU, scaled by 1/sqrt(d)."""
    dtype = product_dtype(query)
    seen: Tensor = _Joined.apply(query.to(dtype), keys.to(dtype), values.to(dtype))
    return seen


class _Joined(torch.autograd.Function):
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
        d_query: Tensor | None = None
        for part, causal in ((slice(0, earlier), False), (slice(earlier, None), True)):
            pair = (keys[:, :, part], values[:, :, part])
            found, d_keys[:, :, part], d_values[:, :, part] = _BACKWARD(
                gradient, query, *pair, joined, log_sum, 0.0, causal
            )
            d_query = found if d_query is None else d_query.add_(found)
        assert d_query is not None
        return d_query, d_keys, d_values
