"""Stochastic rounding: up or down with probabilities that make the expected value the number itself.

Rounding to nearest loses every update smaller than half the distance between two narrow numbers; stochastic rounding
applies it now and then, as often as it should (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision",
section 3.1).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_CHUNK, _CPU_CHUNK = 1 << 22, 1 << 17
"""Numbers rounded at once, which bounds the temporary memory: enough to hide the launch of kernels, and on a CPU few
enough to stay in its cache."""
_EXPONENT_BITS = 0x7F800000
"""The exponent of a float32: these bits alone are the power of two at or below the number."""


def round_stochastically(wide: Tensor, narrow: Tensor, key: str) -> None:
    """Fill `narrow` with the float32 numbers `wide` (of the same shape), rounded stochastically.

    A number that the narrow type can hold stays as it is; one beyond its largest becomes infinite. The same `key` gives
    the same result on every device.
    """
    source, target = wide.view(-1), narrow.view(-1)
    chunk = _CPU_CHUNK if wide.device.type == "cpu" else _CHUNK
    for start in range(0, source.numel(), chunk):
        part = source[start : start + chunk]
        target[start : start + chunk] = _rounded(part, narrow.dtype, uniform(part.numel(), start, key, part.device))


def _rounded(wide: Tensor, dtype: torch.dtype, draws: Tensor) -> Tensor:
    limits = torch.finfo(dtype)
    # Every operation is exact: the distance of neighbours is a power of two, and float32 holds the remainder.
    power_of_two = (wide.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    distance = power_of_two.clamp_(min=limits.smallest_normal).mul_(limits.eps)
    scaled = wide / distance
    below = scaled.floor()
    return below.add_(draws < scaled - below).mul_(distance).to(dtype)


def uniform(count: int, start: int, key: str, device: torch.device) -> Tensor:
    """`count` float32 numbers in [0, 1), multiples of 2^-24, from index `start` on of the sequence `key`.

    Each number is an integer hash of index and key, hence the same on every device; a torch.Generator's sequence
    depends on the kind of GPU. Hash: "lowbias32" (Wellons, hash-prospector), keyed before and between its rounds.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    first, second = (_signed(int.from_bytes(digest[at : at + 4], "little")) for at in (0, 4))
    # int32 arithmetic wraps round.
    mixed = torch.arange(count, dtype=torch.int32, device=device).add_(_signed((first + start) % 2**32))
    mixed = _xor_shifted(mixed, 16).mul_(0x7FEB352D)
    mixed = _xor_shifted(mixed.bitwise_xor_(second), 15).mul_(_signed(0x846CA68B))
    mixed = _xor_shifted(mixed, 16)
    return mixed.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def _xor_shifted(bits: Tensor, by: int) -> Tensor:
    """bits ^ (bits >> by) with a logical shift, in place; the mask clears the copies of the sign bit."""
    return bits.bitwise_xor_((bits >> by).bitwise_and_((1 << (32 - by)) - 1))


def _signed(word: int) -> int:
    """An unsigned 32-bit number as the int32 with the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word
