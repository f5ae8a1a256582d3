"""Dropout whose masks follow from the place alone: seed, step, row of the effective batch, segment, layer, position.

No generator has a state: ranks, micro-batches, chunks and recomputed blocks draw what one process with whole rows
draws, on every device. The numbers are those of SplitMix64 (Steele et al. 2014), 16 bits for each value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from hrm_ray.model.routing import Site

COLUMN = "draws"
"""Column of a batch in training: what each row draws from in the present segment, int64 [B]. Only where something is
drawn."""
_VALUES = 4
"""Values that one number of 64 bits decides on."""
_ONE = 1 << 16


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of `value`."""
    low = value & (2**64 - 1)
    return low - 2**64 if low >= 2**63 else low


_STEP, _FIRST, _SECOND = (_signed(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mixed(state: Tensor) -> Tensor:
    """SplitMix64's output for each state, int64; in place."""
    # PyTorch shifts signed numbers only, so what comes in from the left is masked away.
    state ^= (state >> 30).bitwise_and_(2**34 - 1)
    state *= _FIRST
    state ^= (state >> 27).bitwise_and_(2**37 - 1)
    state *= _SECOND
    state ^= (state >> 31).bitwise_and_(2**33 - 1)
    return state


@lru_cache(maxsize=4096)
def key_of(*numbers: int) -> int:
    """An int64 that follows from all the numbers, each in its place."""
    state = 0
    for number in numbers:
        state = (state ^ number) + _STEP & 2**64 - 1
        state = (state ^ state >> 30) * _FIRST & 2**64 - 1
        state = (state ^ state >> 27) * _SECOND & 2**64 - 1
        state ^= state >> 31
    return _signed(state)


def row_keys(seed: int, batch_idx: int, segment: int, slots: Tensor) -> Tensor:
    """What the rows in `slots` of the effective batch draw from in one segment of a step; int64, shape of `slots`."""
    return mixed(slots * _STEP + key_of(seed, batch_idx, segment))


@dataclass(frozen=True)
class Draws:
    """What the blocks of a pass draw from: the rows' keys int64 [B], the position that the pass begins with, and
    whether it is a look-ahead."""

    rows: Tensor
    start: int = 0
    ahead: bool = False

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], start: int = 0) -> Draws | None:
        """Those of a batch; None where nothing is drawn."""
        return cls(batch[COLUMN], start) if COLUMN in batch else None

    def looking_ahead(self) -> Draws:
        return replace(self, ahead=True)

    def keys(self, site: Site, number: int, width: int) -> Tensor:
        """Keys [B] of dropout `number` of a block, on values [B, T, width]."""
        return self.rows + _signed(key_of(*site, number, self.ahead) + self.start * _numbers(width) * _STEP)


def _numbers(width: int) -> int:
    """Numbers of 64 bits for `width` values."""
    return -(-width // _VALUES)


def dropout(x: Tensor, keys: Tensor, rate: float) -> Tensor:
    """x [B, T, D] with a share `rate` of its values set to 0, drawn from `keys` [B], and the others scaled up."""
    (rows, length, width), numbers = x.shape, _numbers(x.shape[-1])
    # At least one value in 65536 is dropped, and one kept.
    dropped = min(max(round(rate * _ONE), 1), _ONE - 1)
    counters = torch.arange(1, length * numbers + 1, device=x.device) * _STEP
    drawn = mixed(keys.unsqueeze(1) + counters).view(torch.int16).view(rows, length, -1)[..., :width]
    return (x * (_ONE / (_ONE - dropped))).masked_fill(drawn < dropped - _ONE // 2, 0.0)


class Dropout(nn.Module):
    """`dropout` in training; nothing in evaluation, or at a rate of 0."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        # The rate comes first: where it is 0, compiled code does not depend on the mode.
        if not self.rate or not self.training:
            return x
        if keys is None:
            raise ValueError("dropout in training draws from the batch's keys, and this batch has none")
        return dropout(x, keys, self.rate)
