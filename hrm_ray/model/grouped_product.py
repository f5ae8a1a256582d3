"""The operations of a mixture of experts, each with its own gradient: `dispatch` rows to their experts, multiply each
expert's rows by its matrix (`grouped_product`), and `combine` the results by weight.

No size on the host depends on the routing, so the host never waits for a GPU that has a grouped product (bfloat16,
compute capability 9 and later).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_WITH_GROUPED_PRODUCT = frozenset({"cpu", "cuda"})
"""Devices on which PyTorch has a grouped product; on a CPU it was measured to be as fast as one product of all rows. On
a GPU without such a kernel PyTorch takes one product per expert, and on other devices this module does; both wait for
the device."""

_ALIGNED_BYTES = 16
"""The grouped product needs rows whose length is a multiple of this."""


SMALLEST = 64
"""Rows of the smallest product in 16 bits on a CPU.

There oneDNN compiles and keeps code for every size, most of a megabyte each, and an expert's number of rows changes
from batch to batch: with one product per expert, a small model's memory doubled within two steps. So each product is
made of products of few sizes."""


@dataclass(frozen=True)
class SortedChoices:
    """The choices of experts, k per token (A = N * k), sorted by expert.

    `token` [A]: the token of each sorted choice; `index` [N, k]: the index of each choice among the sorted ones; `ends`
    int32 [E]: where each expert's rows end.
    """

    token: Tensor
    index: Tensor
    ends: Tensor


def sort_by_expert(experts: Tensor, totals: Tensor) -> SortedChoices:
    """Sort the choices `experts` [N, k], stably; `totals` [E] is how often each expert was chosen."""
    order = experts.reshape(-1).argsort(stable=True)
    index = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    token = order.div(experts.shape[1], rounding_mode="floor")
    return SortedChoices(token, index.view(experts.shape), totals.cumsum(0, dtype=torch.int32))


def dispatch(x: Tensor, order: SortedChoices) -> Tensor:
    """The row of `x` [N, D] of every choice, sorted by expert: [A, D]."""
    dispatched: Tensor = _Dispatch.apply(x, order.token, order.index)
    return dispatched


def combine(rows: Tensor, weights: Tensor, order: SortedChoices) -> Tensor:
    """For each token the sum over its choices of `weights` [N, k] times the experts' `rows` [A, D]: [N, D]."""
    combined: Tensor = _Combine.apply(rows, weights, order.token, order.index)
    return combined


def grouped_product(x: Tensor, trained: Tensor, stack: Tensor, ends: Tensor, expert: int | None = None) -> Tensor:
    """Each expert's rows of `x` [A, in] times its matrix of `stack` [E, out, in], transposed: [A, out].

    `stack` is a constant of x's type; the gradient of the matrices goes to `trained`: the stack as a parameter, or the
    matrix [out, in] of `expert` alone.
    """
    product: Tensor = _GroupedProduct.apply(x, trained, stack, ends, expert)
    return product


class _Dispatch(torch.autograd.Function):
    """Both directions gather: a scattered addition over a token's choices would sum in an order that varies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return gradient.index_select(0, index.view(-1)).view(*index.shape, -1).sum(1), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, token: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, token, index)
        back = rows.index_select(0, index.view(-1)).view(*index.shape, -1)
        return (back * weights.to(rows.dtype).unsqueeze(-1)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, token, index = ctx.saved_tensors
        taken = gradient.index_select(0, token)
        for_weights = (taken * rows).sum(-1, dtype=weights.dtype)[index]
        sorted_weights = torch.empty_like(weights.view(-1)).scatter_(0, index.view(-1), weights.view(-1))
        return taken * sorted_weights.to(rows.dtype).unsqueeze(-1), for_weights, None, None


class _GroupedProduct(torch.autograd.Function):
    """Saves `stack` for the gradient of x: it is shared by all calls, where a cast would be saved once per call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor, stack: Tensor, ends: Tensor, expert: int | None) -> Tensor:
        ctx.save_for_backward(x, stack, ends)
        ctx.expert, ctx.kept_as = expert, trained.dtype
        return _rows_times(x, stack.transpose(1, 2), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, stack, ends = ctx.saved_tensors
        gradient = gradient.contiguous()
        for_x = _rows_times(gradient, stack, ends) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return for_x, None, None, None, None
        for_stack = _rows_with_rows(gradient, x, ends)
        trained = for_stack if ctx.expert is None else for_stack[ctx.expert]
        return for_x, trained.to(ctx.kept_as), None, None, None


def _rows_times(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each group of `rows` [A, K] times its matrix of `matrices` [E, K, N]: [A, N]."""
    return rows_times(_aligned(rows, 1), _aligned(matrices, 2), ends)[:, : matrices.shape[2]]


def _rows_with_rows(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """For each group the product of `left`^T and `right`, [A, M] and [A, N]: [E, M, N]; zeros for an empty group."""
    return rows_with_rows(_aligned(left, 1), _aligned(right, 1), ends)[:, : left.shape[1], : right.shape[1]]


# Custom operators, since PyTorch's grouped product supports fake tensors in bfloat16 only.
@torch.library.custom_op("hrm_ray::rows_times", mutates_args=())
def rows_times(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`_rows_times` for lengths that the device's product takes."""
    if compiles_each_size(rows):
        return rows_times_in_pieces(rows, matrices, _bounds(ends))
    if rows.device.type in _WITH_GROUPED_PRODUCT:
        return F.grouped_mm(rows, matrices, offs=ends)
    return torch.cat([rows[a:b] @ matrix for (a, b), matrix in zip(_bounds(ends), matrices, strict=True)])


@rows_times.register_fake
def _(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[2])


@torch.library.custom_op("hrm_ray::rows_with_rows", mutates_args=())
def rows_with_rows(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`_rows_with_rows` for lengths that the device's product takes."""
    if compiles_each_size(left):
        return rows_with_rows_padded(left, right, _bounds(ends))
    if left.device.type in _WITH_GROUPED_PRODUCT:
        return F.grouped_mm(left.t(), right, offs=ends)
    return torch.stack([left[a:b].t() @ right[a:b] for a, b in _bounds(ends)])


@rows_with_rows.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _aligned(tensor: Tensor, dimensions: int) -> Tensor:
    """`tensor` with its last dimensions padded with zeros to a length that the grouped product supports."""
    unit = _ALIGNED_BYTES // tensor.element_size()
    missing = [-tensor.shape[-1 - number] % unit for number in range(dimensions)]
    return F.pad(tensor, [part for number in missing for part in (0, number)]) if any(missing) else tensor


def _bounds(ends: Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))


def compiles_each_size(rows: Tensor) -> bool:
    """Whether oneDNN computes products of these rows."""
    return rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float16)


def rows_times_in_pieces(rows: Tensor, matrices: Tensor, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """Each group of `rows` [A, K], contiguous within its `bounds`, times its matrix of `matrices` [E, K, N]: [A, N].
    A group's last piece is padded with rows of its neighbours."""
    product = rows.new_empty(rows.shape[0], matrices.shape[2])
    for (begin, end), matrix in zip(bounds, matrices, strict=True):
        for size in piece_sizes(end - begin):
            piece = slice(begin, min(begin + size, end))
            stop = min(begin + size, rows.shape[0])
            start = max(stop - size, 0)
            if piece == slice(start, stop):
                torch.mm(rows[piece], matrix, out=product[piece])
            else:
                product[piece] = torch.mm(rows[start:stop], matrix)[piece.start - start : piece.stop - start]
            begin = piece.stop
    return product


def rows_with_rows_padded(left: Tensor, right: Tensor, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """For each group the product of `left`^T and `right`, [A, M] and [A, N]: [E, M, N]. A group is padded with
    zeros; pieces would have to be summed, which takes longer."""
    products = left.new_empty(len(bounds), left.shape[1], right.shape[1])
    for (begin, end), product in zip(bounds, products, strict=True):
        missing = (0, 0, 0, padded_size(end - begin) - (end - begin))
        torch.mm(F.pad(left[begin:end], missing).t(), F.pad(right[begin:end], missing), out=product)
    return products


def piece_sizes(count: int) -> list[int]:
    """Powers of two, the largest first, that add up to `count` rows, or to up to SMALLEST - 1 more."""
    whole, rest = divmod(count, SMALLEST)
    sizes = [SMALLEST << bit for bit in reversed(range(whole.bit_length())) if whole >> bit & 1]
    return sizes + [SMALLEST] * (rest > 0)


def padded_size(count: int) -> int:
    """`count` rounded up to a multiple of SMALLEST, or by a quarter at most: to one of four numbers between a power of
    two and the next."""
    unit = max(SMALLEST, 1 << max(count.bit_length() - 3, 0))
    return -(-count // unit) * unit
