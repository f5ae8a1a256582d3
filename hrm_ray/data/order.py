"""The order in which an epoch's samples are taken: a keyed permutation of the position.

Position -> sample (or chunk, or sequence) is a pure function of (seed, epoch, count). There is no table of samples, so
memory does not grow with the data, any worker can compute any part, and resuming needs nothing but the position."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
# Feistel halves of one or two bits mix badly, so small counts walk inside a domain of at least 64 values.
_MIN_BITS = 6


@dataclass(frozen=True)
class Order:
    """An epoch's order over `count` items: the identity when `linear`, else a permutation keyed by (seed, epoch, count,
    `of`, the kind of the items)."""

    seed: int
    epoch: int
    count: int
    linear: bool
    of: str = ""

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sample indices at `positions` (int64, any shape, each in 0..count-1); the same shape comes back.

        Position -1 means "no sample" and stays -1, so that a padded batch can be asked for directly.
        Raises IndexError for any other position outside the epoch.

        The permutation is a Feistel network over the smallest power of two that holds `count`, walked until the value
        lies inside (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < -1 or positions.max() >= self.count):
            raise IndexError(f"positions must lie in 0..{self.count - 1}, got {positions.min()}..{positions.max()}")
        if self.linear:
            return positions.copy()
        indices = positions.copy()
        flat = indices.reshape(-1)
        keys = self._round_keys()
        open_slots = np.flatnonzero(flat >= 0)
        walking = flat[open_slots].astype(np.uint64)
        while open_slots.size:
            walking = _feistel(walking, keys, self._bits())
            inside = walking < np.uint64(self.count)
            flat[open_slots[inside]] = walking[inside].astype(np.int64)
            open_slots, walking = open_slots[~inside], walking[~inside]
        return flat.reshape(positions.shape)

    def _bits(self) -> int:
        return max(_MIN_BITS, (self.count - 1).bit_length())

    def _round_keys(self) -> npt.NDArray[np.uint64]:
        digest = hashlib.blake2b(
            f"order {self.seed} {self.epoch} {self.count}{self.of}".encode(), digest_size=8 * _ROUNDS
        ).digest()
        return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def epoch_order(seed: int, epoch: int, count: int, linear: bool) -> Order:
    """The order of one epoch; `count` is the number of samples (at least 1). Raises ValueError for an empty epoch."""
    if count < 1:
        raise ValueError(f"an epoch needs at least one sample, got {count}")
    return Order(seed=seed, epoch=epoch, count=count, linear=linear)


class ChunkOrder:
    """The order in which an epoch takes chunks: blocks are shuffled, and the chunks inside each block.

    A block is finished before the next one begins. Memory is one number per block.
    """

    def __init__(self, seed: int, epoch: int, block_sizes: Sequence[int]) -> None:
        """`block_sizes`: chunks of each block, at least one in all."""
        self._seed, self._epoch = seed, epoch
        sizes = np.array(block_sizes, dtype=np.int64)
        blocks = np.arange(len(sizes), dtype=np.int64)
        self._blocks = Order(seed, epoch, len(sizes), False, " blocks").at(blocks)
        self._sizes = sizes[self._blocks]
        self._ends = np.cumsum(self._sizes)
        self._firsts = (np.cumsum(sizes) - sizes)[self._blocks]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def at(self, position: int) -> tuple[int, bool]:
        """The number of the chunk at a position of the epoch, and whether its block ends with it."""
        block = int(np.searchsorted(self._ends, position, side="right"))
        size, end = int(self._sizes[block]), int(self._ends[block])
        within = Order(self._seed, self._epoch, size, False, f" chunks of {self._blocks[block]}")
        chosen = int(within.at(np.array([position - (end - size)]))[0])
        return int(self._firsts[block]) + chosen, position + 1 == end


class WindowOrder:
    """The order of `count` sequences in a shuffle buffer. Where a chunk is larger than the buffer, it is divided into
    `parts`, each shuffled in itself."""

    def __init__(self, seed: int, epoch: int, window: int, count: int, parts: int = 1) -> None:
        """`window` is the position of the window in its epoch."""
        self._length = max(1, -(-count // max(1, parts)))
        self._key = (seed, epoch)
        self._window, self._count = window, count

    def at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The sequences at `positions` (int64 [N], each in 0..count-1)."""
        part = positions // self._length
        found = np.empty_like(positions)
        for number in np.unique(part).tolist():
            first = number * self._length
            length = min(self._length, self._count - first)
            order = Order(*self._key, length, False, f" window {self._window}.{number}")
            inside = part == number
            found[inside] = first + order.at(positions[inside] - first)
        return found


def _feistel(values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], bits: int) -> npt.NDArray[np.uint64]:
    """One pass of the network over `bits`-bit values. The halves may differ by one bit; an even number of rounds
    brings each back to its own width."""
    low_bits, high_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(low_bits), values & _mask(low_bits)
    left_bits, right_bits = high_bits, low_bits
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & _mask(left_bits))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(low_bits)) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014); array arithmetic wraps modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
