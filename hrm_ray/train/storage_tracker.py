"""How many bytes of tensors are alive, and what they are.

One job: watch every operation inside a context and account for storages from the operation that made them until they
are freed. It works on real tensors and on fake ones alike, sees what operations give out, and not what a kernel keeps
to itself while it runs. The accounting is exact, unlike a process's resident memory.
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
"""Category of every storage that nobody has named: in a training step activations and temporaries."""


@dataclass
class Allocation:
    """One storage's life: its size, what it is for, and the moments at which it came and went (None: it has not)."""

    bytes: int
    category: str
    born: int
    died: int | None = None
    watch: weakref.finalize | None = field(default=None, repr=False)  # type: ignore[type-arg]

    def alive_at(self, moment: int) -> bool:
        """Whether it was there after the changes of `moment`."""
        return self.born <= moment and (self.died is None or self.died > moment)


class StorageTracker(TorchDispatchMode):
    """Counts storages while the context is open; may be opened several times, one after the other.

    What exists already is counted from the beginning, once it is named with `name` or an operation reads it. A storage
    may be named at any time while it lives (gradients, say, after the backward pass that made them) and then counts
    under that name for its whole life, before it was named too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lives: list[Allocation] = []
        self._alive: dict[int, Allocation] = {}
        self._clock = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._count(tensor, OTHER, born=0)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._count(tensor, OTHER, born=self._clock + 1)
        return result

    def name(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Say what these tensors are; what is not known yet was there from the beginning."""
        for tensor in tensors:
            self._count(tensor, category, born=0).category = category

    def live_bytes(self, *categories: str) -> int:
        """Bytes alive now, of some categories or of all."""
        return sum(life.bytes for life in self._alive.values() if not categories or life.category in categories)

    @property
    def moment(self) -> int:
        """A number for now, for the limits of `peak_bytes`."""
        return self._clock

    def peak_bytes(self, *, beside: Iterable[str] = (), since: int = 0, until: int | None = None) -> int:
        """The most bytes alive at once, after moment `since` and up to `until`, without the categories `beside`."""
        before, most = 0, 0
        for moment, total in self._course(frozenset(beside)):
            if moment <= since:
                before = total
            elif until is None or moment <= until:
                most = max(most, total)
        return max(before, most)

    def at_peak(self) -> dict[str, int]:
        """Bytes by category at the first moment when the most were alive."""
        course = list(self._course(frozenset()))
        return self.at(max(course, key=lambda point: point[1])[0]) if course else {}

    def at(self, moment: int) -> dict[str, int]:
        """Bytes by category that were alive after the changes of `moment`."""
        found: dict[str, int] = {}
        for life in self._lives:
            if life.alive_at(moment):
                found[life.category] = found.get(life.category, 0) + life.bytes
        return found

    @property
    def lives(self) -> tuple[Allocation, ...]:
        """All that has been counted, in the order in which it was seen."""
        return tuple(self._lives)

    def largest_bytes(self, category: str = OTHER) -> int:
        """Bytes of the largest storage of a category that ever lived."""
        return max((life.bytes for life in self._lives if life.category == category), default=0)

    def _course(self, beside: frozenset[str]) -> Iterator[tuple[int, int]]:
        """(moment, bytes alive after its changes), in order."""
        changes: dict[int, int] = {}
        for life in self._lives:
            if life.category not in beside:
                changes[life.born] = changes.get(life.born, 0) + life.bytes
                if life.died is not None:
                    changes[life.died] = changes.get(life.died, 0) - life.bytes
        total = 0
        for moment in sorted(changes):
            total += changes[moment]
            yield moment, total

    def _count(self, tensor: Tensor, category: str, born: int) -> Allocation:
        storage = tensor.untyped_storage()
        place = int(storage._cdata)
        life = self._alive.get(place)
        if life is None:
            if born:
                self._clock = born
            life = Allocation(storage.nbytes(), category, born)
            life.watch = weakref.finalize(storage, self._freed, place)
            life.watch.atexit = False
            self._lives.append(life)
            self._alive[place] = life
        return life

    def _freed(self, place: int) -> None:
        self._clock += 1
        life = self._alive.pop(place)
        life.died, life.watch = self._clock, None


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
