"""Which tensors are alive, counted as PyTorch makes them.

One job: watch every operation inside a context and say how many bytes were alive at once at the most, and how large the
largest tensor was. Exact, unlike a process's resident memory: what was alive before is not counted.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages from the operation that made them until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.most = 0
        self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id_of(leaf) not in given | self._known:
                self._count(leaf)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = id_of(tensor), storage.nbytes()
        self._known.add(place)
        self.now += size
        self.most, self.largest = max(self.most, self.now), max(self.largest, size)
        weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def id_of(tensor: torch.Tensor) -> int:
    """One number per storage that is alive."""
    return int(tensor.untyped_storage()._cdata)
