"""Counts the bytes of live tensors by category, exactly, at every operation inside a context.

Real and fake tensors are counted alike. What an operation returns is seen, not what a kernel allocates while it runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "other"
"""Category of storages without a name: in a training step activations and temporaries."""


@dataclass
class Allocation:
    """One storage: its size, its category, and the moments at which it was allocated and freed (None: it is alive)."""

    bytes: int
    category: str
    allocated: int
    freed: int | None = None
    finalizer: weakref.finalize | None = field(default=None, repr=False)  # type: ignore[type-arg]

    def alive_at(self, moment: int) -> bool:
        """Whether it was alive after the changes of `moment`."""
        return self.allocated <= moment and (self.freed is None or self.freed > moment)


class StorageTracker(TorchDispatchMode):
    """Counts storages while the context is open, which may be opened several times, one after the other.

    A storage that exists already counts from the beginning, as soon as `name` names it or an operation reads it. One
    that is named late (gradients, after the backward pass that made them) counts under that name from its allocation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocations: list[Allocation] = []
        """Everything counted so far, in the order in which it was seen."""
        self.moment = 0
        """The number of changes so far: the present time for the limits of `peak_bytes`."""
        self._alive: dict[int, Allocation] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._count(tensor, OTHER, allocated=0)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._count(tensor, OTHER, allocated=self.moment + 1)
        return result

    def name(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Set the category of these tensors; those not seen yet count from the beginning."""
        for tensor in tensors:
            self._count(tensor, category, allocated=0).category = category

    def live_bytes(self, *categories: str) -> int:
        """Bytes alive now, of some categories or of all."""
        return sum(one.bytes for one in self._alive.values() if not categories or one.category in categories)

    def peak_bytes(self, *, beside: Iterable[str] = (), since: int = 0, until: int | None = None) -> int:
        """The most bytes alive at once after moment `since`, up to `until`, without the categories `beside`."""
        before, most = 0, 0
        for moment, total in self._totals(frozenset(beside)):
            if moment <= since:
                before = total
            elif until is None or moment <= until:
                most = max(most, total)
        return max(before, most)

    def at(self, moment: int) -> dict[str, int]:
        """Bytes by category that were alive after the changes of `moment`."""
        found: dict[str, int] = {}
        for one in self.allocations:
            if one.alive_at(moment):
                found[one.category] = found.get(one.category, 0) + one.bytes
        return found

    def largest_bytes(self, category: str = OTHER) -> int:
        """Bytes of the largest storage that a category ever had."""
        return max((one.bytes for one in self.allocations if one.category == category), default=0)

    def _totals(self, beside: frozenset[str]) -> Iterator[tuple[int, int]]:
        """(moment, bytes alive after its changes), in order, without the categories `beside`."""
        changes: dict[int, int] = {}
        for one in self.allocations:
            if one.category not in beside:
                changes[one.allocated] = changes.get(one.allocated, 0) + one.bytes
                if one.freed is not None:
                    changes[one.freed] = changes.get(one.freed, 0) - one.bytes
        total = 0
        for moment in sorted(changes):
            total += changes[moment]
            yield moment, total

    def _count(self, tensor: Tensor, category: str, allocated: int) -> Allocation:
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        found = self._alive.get(key)
        if found is None:
            self.moment = max(self.moment, allocated)
            found = Allocation(storage.nbytes(), category, allocated)
            found.finalizer = weakref.finalize(storage, self._freed, key)
            found.finalizer.atexit = False
            self.allocations.append(found)
            self._alive[key] = found
        return found

    def _freed(self, key: int) -> None:
        self.moment += 1
        one = self._alive.pop(key)
        one.freed, one.finalizer = self.moment, None


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
