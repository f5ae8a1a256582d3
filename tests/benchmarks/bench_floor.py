"""The matrix products of a training step, executed alone: the lower bound of a step's time.

The products of one step are recorded with shapes and strides, and exactly those are executed on random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # the only home of the documented class

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Size and stride of an operand."""


@dataclass(frozen=True)
class Product:
    """left @ right, both of two dimensions, or both of three with a batch in front."""

    left: Layout
    right: Layout

    @property
    def flops(self) -> int:
        """Multiplications and additions, counted as two."""
        *batch, rows, inner = self.left[0]
        return 2 * rows * inner * self.right[0][-1] * (batch[0] if batch else 1)


class ProductRecorder(TorchDispatchMode):
    """Records every matrix product that runs inside it, forward and backward.

    Attention kernels count as the products they stand for: two forward, four backward (the kernel's own recomputation
    of the scores is not part of the floor). With a causal rule half of the keys count, which is the triangle's work.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            first = _PRODUCTS[name]
            self.products.append(Product(_layout(args[first]), _layout(args[first + 1])))
        elif name in _ATTENTION:
            self.products += _ATTENTION[name](_arguments(func, args, given))
        elif name in _NOT_COUNTED or "scaled_dot_product" in name:
            raise NotImplementedError(f"the floor does not know how to count {name}")
        return func(*args, **given)


def _layout(tensor: Tensor) -> Layout:
    return tuple(tensor.shape), tensor.stride()


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the operator's schema, those left out too."""
    declared = func._schema.arguments
    named = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    named.update(zip((argument.name for argument in declared), args, strict=False))
    return named | kwargs


def _attention_sizes(given: dict[str, Any]) -> tuple[int, int, int, int]:
    """Batch times heads, queries, keys in work, head size."""
    batch, heads, queries, size = given["query"].shape
    keys = given["key"].shape[2]
    return batch * heads, queries, (keys + 1) // 2 if given["is_causal"] else keys, size


def _contiguous(*sizes: int) -> Layout:
    return sizes, torch.empty(sizes, device="meta").stride()


def _transposed(batch: int, rows: int, columns: int) -> Layout:
    """The layout [batch, columns, rows] of a transposed contiguous [batch, rows, columns]."""
    return (batch, columns, rows), (rows * columns, 1, columns)


def _attention_forward(given: dict[str, Any]) -> list[Product]:
    """Scores Q K^T and results P V."""
    batch, queries, keys, size = _attention_sizes(given)
    return [
        Product(_contiguous(batch, queries, size), _transposed(batch, keys, size)),
        Product(_contiguous(batch, queries, keys), _contiguous(batch, keys, size)),
    ]


def _attention_backward(given: dict[str, Any]) -> list[Product]:
    """dP = dO V^T, dV = P^T dO, dQ = dS K, dK = dS^T Q."""
    batch, queries, keys, size = _attention_sizes(given)
    wide, scores = _contiguous(batch, queries, size), _contiguous(batch, queries, keys)
    turned = _transposed(batch, queries, keys)
    return [
        Product(wide, _transposed(batch, keys, size)),
        Product(turned, wide),
        Product(scores, _contiguous(batch, keys, size)),
        Product(turned, wide),
    ]


_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Operators that are one product, and at which argument its operands begin."""
_ATTENTION: dict[str, Callable[[dict[str, Any]], list[Product]]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention_forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
_NOT_COUNTED = frozenset({"matmul", "linear", "mv", "addmv", "dot", "addbmm", "convolution"})


class Floor:
    """Executes the recorded products in their order, on random operands, into memory allocated before."""

    def __init__(self, products: list[Product]) -> None:
        self.flops = sum(product.flops for product in products)
        self.count = len(products)
        made: dict[Layout, Tensor] = {}
        results: dict[Product, Tensor] = {}
        self._work: list[tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]] = []
        for product in products:
            left, right = (made.setdefault(layout, _random(layout)) for layout in (product.left, product.right))
            if product not in results:
                results[product] = left @ right
            self._work.append((torch.mm if left.dim() == 2 else torch.bmm, left, right, results[product]))

    @torch.no_grad()
    def run(self) -> None:
        """All products once."""
        for multiply, left, right, result in self._work:
            multiply(left, right, out=result)


def _random(layout: Layout) -> Tensor:
    size, stride = layout
    reach = 1 + sum((count - 1) * jump for count, jump in zip(size, stride, strict=True))
    return torch.randn(reach).as_strided(size, stride)


@contextmanager
def recorded_products() -> Iterator[list[Product]]:
    """The products of what runs inside the context."""
    with ProductRecorder() as recorder:
        yield recorder.products
