"""A loader over ranges that a block trainer has claimed. Which sample goes to which trainer is the ledger's; how the
samples of a range become batches is decided here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hrm_ray.ledger import Lease
from hrm_ray.train.claimed_rows import ClaimedRows, TakenRange
from hrm_ray.train.loaders import BatchLoader, BatchSize, HaltedSlots, StopCondition
from hrm_ray.types import Columns


class ClaimedLoader(BatchLoader):
    """BatchLoader of claimed ranges: every step takes as many samples as there are halted slots, in the order of the
    ranges, from one range into the next, but never from two epochs.

    While it is `draining`, and when no range is left, it takes none: in carried supervision the rows that are running
    go on until the last has halted, then the loop's step returns None.
    """

    def __init__(
        self,
        rows: ClaimedRows,
        shape: BatchSize,
        *,
        carried: bool,
        explore: Callable[[int, npt.NDArray[np.int64]], npt.NDArray[np.int32]] | None = None,
    ) -> None:
        """`explore`: see SlotLoader; None where nothing is explored."""
        super().__init__(shape, StopCondition())
        self.rows = rows
        self.draining = False
        self.position: dict[str, npt.NDArray[np.int64]] = {}
        """For a checkpoint that a strategy goes on from: the position that its loader begins with."""
        self._carried, self._explore = carried, explore
        self._ranges: deque[TakenRange] = deque()
        """What is left of each range."""
        self._taken: list[TakenRange] = []
        self._last: list[TakenRange] = []
        """What the last batch took; its update may still be skipped."""

    def add(self, lease: Lease) -> None:
        """Add a range, which has its end, behind the others."""
        if lease.end is None:
            raise ValueError(f"chunk {lease.chunk} was not measured")
        self._ranges.append(TakenRange(lease, lease.start, lease.end))

    def replace(self, leases: Iterable[Lease]) -> None:
        """Train `leases` from their starts, in the order of the epoch, in place of the ranges so far: what was taken
        before is forgotten."""
        self._ranges.clear()
        self._taken, self._last = [], []
        for lease in sorted(leases, key=lambda lease: (lease.epoch, lease.position, lease.start)):
            self.add(lease)

    @property
    def left(self) -> int:
        """Samples that were not taken yet."""
        return sum(one.end - one.start for one in self._ranges)

    @property
    def unfinished(self) -> list[Lease]:
        """The leases of which something is left."""
        return [one.lease for one in self._ranges]

    def taken(self) -> list[TakenRange]:
        """What was taken since the last `replace`, in order, each part in one lease; skipped updates are marked."""
        self._keep_last()
        return list(self._taken)

    def next_batch(self, halted: HaltedSlots, step: int) -> list[Columns]:
        self._keep_last()  # the last batch was not skipped
        places = np.flatnonzero(np.concatenate(halted))
        taken = [] if self.draining else self._take(len(places))
        places = places[: sum(one.end - one.start for one in taken)]
        columns = self.rows.columns(taken, places, self.shape.per_rank)
        self._last = taken
        if self._explore is not None:
            columns = columns | {"min_steps": self._explore(step, self.shape.slots().reshape(-1))}
        size = self.shape.batch_size
        return [
            {name: values[first : first + size] for name, values in columns.items()}
            for first in range(0, self.shape.per_rank, size)
        ]

    def start_epoch(self, trained: bool) -> bool:
        """See BatchLoader. The next epoch comes with its ranges."""
        return False

    def mark_skipped(self) -> None:
        # In carried supervision the rows stay in their slots and are trained on in the next steps.
        if not self._carried:
            self._last = [replace(one, skipped=True) for one in self._last]
        self._keep_last()

    def state_dict(self) -> dict[str, npt.NDArray[np.int64]]:
        """`position`, mostly empty: the ledger knows what is left."""
        return self.position

    def load_state_dict(self, epoch: int, state_dict: dict[str, npt.NDArray[np.int64]]) -> None:
        """See BatchLoader."""
        self.epoch = epoch

    def take_notes(self) -> list[str]:
        return self.rows.take_notes()

    def close(self) -> None:
        self.rows.close()

    def _take(self, count: int) -> list[TakenRange]:
        """The next `count` samples; fewer where the ranges, or their epoch, end before."""
        taken: list[TakenRange] = []
        while count and self._ranges:
            first = self._ranges[0]
            if taken and first.lease.epoch != taken[0].lease.epoch:
                break
            end = min(first.start + count, first.end)
            count -= end - first.start
            if first.start < end:
                taken.append(replace(first, end=end))
            self._ranges.popleft()
            if end < first.end:
                self._ranges.appendleft(replace(first, start=end))
        if taken:
            self.epoch = taken[0].lease.epoch
        return taken

    def _keep_last(self) -> None:
        for one in self._last:
            before = self._taken[-1] if self._taken else None
            if before is not None and replace(before, start=before.end, end=one.end) == one:
                self._taken[-1] = replace(before, end=one.end)
            else:
                self._taken.append(one)
        self._last = []
