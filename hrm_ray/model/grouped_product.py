"""Products of rows with the matrix of the expert they were sorted to, and the way of the rows there and back.

One job: the three operations that a mixture of experts is made of, each with its own gradient: `take` rows to their
experts, `grouped_product`, `give` them back weighted. No size on the host depends on the routing, so that a GPU with a
grouped product (bfloat16, compute capability 9 and later) is never waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm_ray.model.shape_buckets import compiles_each_size, rows_times_in_pieces, rows_with_rows_filled_up

_WITH_GROUPED_PRODUCT = frozenset({"cpu", "cuda"})
"""Devices for which PyTorch has one; on a CPU it was measured to be as fast as a single product of all rows, and as a
product per expert. On a GPU without such a kernel PyTorch itself takes one product per expert; for other devices it is
done here. Either waits for the device. What a CPU does in 16 bits is in few_sizes.py."""

_ALIGNED_BYTES = 16
"""The grouped product takes rows whose length is a multiple of this."""


@dataclass(frozen=True)
class Sorted:
    """Choices of experts, each token's k one after the other (A = N * k), in the order of their experts.

    `token` [A]: whose row each sorted choice is of; `place` [N, k]: where among the sorted each choice lies; `ends`
    int32 [E]: where each expert's rows end.
    """

    token: Tensor
    place: Tensor
    ends: Tensor


def sort_by_expert(experts: Tensor, totals: Tensor) -> Sorted:
    """Sort the choices `experts` [N, k], equal ones in their order; `totals` [E] is how often each was chosen."""
    order = experts.reshape(-1).argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    token = order.div(experts.shape[1], rounding_mode="floor")
    return Sorted(token, place.view(experts.shape), totals.cumsum(0, dtype=torch.int32))


def take(x: Tensor, order: Sorted) -> Tensor:
    """Rows of `x` [N, D], one for every choice, sorted by expert: [A, D]."""
    taken: Tensor = _Take.apply(x, order.token, order.place)
    return taken


def give(rows: Tensor, weights: Tensor, order: Sorted) -> Tensor:
    """The way back: sum over its choices of `weights` [N, k] times the experts' `rows` [A, D]; [N, D]."""
    given: Tensor = _Give.apply(rows, weights, order.token, order.place)
    return given


def grouped_product(x: Tensor, trained: Tensor, stack: Tensor, ends: Tensor, expert: int | None = None) -> Tensor:
    """Each expert's rows of `x` [A, in] times its matrix of `stack` [E, out, in], transposed: [A, out].

    `stack` is a constant of x's type; the gradient of the matrices goes to `trained`, which is the stack in the type
    that it is kept in, or [out, in], the matrix of `expert` alone.
    """
    product: Tensor = _GroupedProduct.apply(x, trained, stack, ends, expert)
    return product


class _Take(torch.autograd.Function):
    """Both directions gather: the sum over a token's choices is no scattered addition, whose order may vary."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return gradient.index_select(0, place.view(-1)).view(*place.shape, -1).sum(1), None, None


class _Give(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, token, place)
        back = rows.index_select(0, place.view(-1)).view(*place.shape, -1)
        return (back * weights.to(rows.dtype).unsqueeze(-1)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, token, place = ctx.saved_tensors
        taken = gradient.index_select(0, token)
        for_weights = (taken * rows).sum(-1, dtype=weights.dtype)[place]
        sorted_weights = torch.empty_like(weights.view(-1)).scatter_(0, place.view(-1), weights.view(-1))
        return taken * sorted_weights.to(rows.dtype).unsqueeze(-1), for_weights, None, None


class _GroupedProduct(torch.autograd.Function):
    """Keeps `stack` for the gradient of x, whatever types the pass is in: not one cast copy for each call."""

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


# Operators of their own, since PyTorch's grouped product has shapes without content for bfloat16 alone.
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
        return rows_with_rows_filled_up(left, right, _bounds(ends))
    if left.device.type in _WITH_GROUPED_PRODUCT:
        return F.grouped_mm(left.t(), right, offs=ends)
    return torch.stack([left[a:b].t() @ right[a:b] for a, b in _bounds(ends)])


@rows_with_rows.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _aligned(tensor: Tensor, dimensions: int) -> Tensor:
    """The last dimensions filled up with zeros to a length that the grouped product takes."""
    unit = _ALIGNED_BYTES // tensor.element_size()
    missing = [-tensor.shape[-1 - number] % unit for number in range(dimensions)]
    return F.pad(tensor, [part for number in missing for part in (0, number)]) if any(missing) else tensor


def _bounds(ends: Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))
