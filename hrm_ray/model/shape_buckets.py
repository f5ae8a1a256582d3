"""Products per expert in 16 bits on a CPU, made of products of few sizes.

One job: `rows_times` and `rows_with_rows` of grouped_product.py where the library below compiles code for every size.
oneDNN does, and keeps it, most of a megabyte each. An expert has another number of rows in every batch: with one
product of that size per expert, a small model's memory doubled within two steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 64
"""Rows of the smallest product."""


def compiles_each_size(rows: Tensor) -> bool:
    """Whether products with these rows come from oneDNN."""
    return rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float16)


def rows_times_in_pieces(rows: Tensor, matrices: Tensor, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """Each group of `rows` [A, K], which lie one after the other within `bounds`, times its matrix of `matrices`
    [E, K, N]: [A, N]. A group's last piece is filled up with rows of its neighbours."""
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


def rows_with_rows_filled_up(left: Tensor, right: Tensor, bounds: Sequence[tuple[int, int]]) -> Tensor:
    """For each group the product of `left`^T and `right`, [A, M] and [A, N]: [E, M, N]. A group is filled up with
    zeros; pieces would have to be summed, which takes longer."""
    products = left.new_empty(len(bounds), left.shape[1], right.shape[1])
    for (begin, end), product in zip(bounds, products, strict=True):
        missing = (0, 0, 0, filled_size(end - begin) - (end - begin))
        torch.mm(F.pad(left[begin:end], missing).t(), F.pad(right[begin:end], missing), out=product)
    return products


def piece_sizes(count: int) -> list[int]:
    """Powers of two, the largest first, that together are `count` rows, or up to SMALLEST - 1 more."""
    whole, rest = divmod(count, SMALLEST)
    sizes = [SMALLEST << bit for bit in reversed(range(whole.bit_length())) if whole >> bit & 1]
    return sizes + [SMALLEST] * (rest > 0)


def filled_size(count: int) -> int:
    """`count` rounded up to a multiple of SMALLEST, or by a quarter at most: to one of four numbers between a power of
    two and the next."""
    unit = max(SMALLEST, 1 << max(count.bit_length() - 3, 0))
    return -(-count // unit) * unit
