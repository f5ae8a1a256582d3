"""What is lost where the factors of LoRA adapters are averaged apart: the mean of products is not their product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hrm_ray.merging.members import OpenMember
from hrm_ray.merging.tensor_file import Array, TensorFile

_A, _B = ".lora_A.", ".lora_B."


@dataclass(frozen=True)
class LoraResidual:
    """Frobenius norms over all layers, without the adapters' common scale: of sum w_k B_k A_k - B A, where A and B are
    the averaged factors, and of B A."""

    residual: float
    product: float


def lora_residual(anchor: TensorFile, members: Sequence[OpenMember], window_bytes: int) -> LoraResidual | None:
    """The residual of averaging `members`; None without LoRA factors.

    With changes a_k and b_k of the factors it is sum w_k b_k a_k - b a, whatever the anchor; members of a series are
    one. Its norm comes from the products of the factors with themselves, which are as small as the ranks.
    """
    series: dict[str | int, list[OpenMember]] = {}
    for number, member in enumerate(members):
        series.setdefault(number if member.series is None else member.series, []).append(member)
    apart = list(series.values())
    squares, products, found = 0.0, 0.0, False
    for name, stored in anchor.tensors.items():
        other = name.replace(_A, _B)
        if _A not in name or other not in anchor.tensors or len(stored.shape) != 2:
            continue
        found = True
        inner, own_inner = _gram(anchor, apart, name, window_bytes, rows_are_ranks=True)
        outer, own_outer = _gram(anchor, apart, other, window_bytes, rows_are_ranks=False)
        squares += max(0.0, float((inner * outer).sum()))
        products += max(0.0, float((own_inner * own_outer).sum()))
    return LoraResidual(squares**0.5, products**0.5) if found else None


def _gram(
    anchor: TensorFile, apart: Sequence[Sequence[OpenMember]], name: str, window_bytes: int, *, rows_are_ranks: bool
) -> tuple[Array, Array]:
    """The inner products of all rank vectors of one factor, float64: of the changes and their mean together, which
    stand in the residual as w_1 b_1 a_1 + ... - b a, and of the averaged factor itself."""
    rows, columns = anchor.tensors[name].shape
    rank, length = (rows, columns) if rows_are_ranks else (columns, rows)
    together = (len(apart) + 1) * rank
    changes, own = np.zeros((together, together)), np.zeros((rank, rank))
    weights = [one[0].weight for one in apart]
    step = max(1, window_bytes // (8 * together))
    for first in range(0, length, step):
        count = min(step, length - first)

        def part(file: TensorFile, first: int = first, count: int = count) -> Array:
            return _vectors(file, name, first, count, columns, rank, rows_are_ranks)

        parts = [np.zeros((rank, count)) for _ in apart]
        for total, one in zip(parts, apart, strict=True):
            for member in one:
                total += part(member.file)
                if member.base is not None:
                    total -= part(member.base)
        weighed = [weight * total for weight, total in zip(weights, parts, strict=True)]
        mean = np.sum(weighed, axis=0)
        stacked = np.concatenate([*parts, mean] if rows_are_ranks else [*weighed, -mean])
        changes += stacked @ stacked.T
        averaged = part(anchor) + mean
        own += averaged @ averaged.T
    return changes, own


def _vectors(
    file: TensorFile, name: str, first: int, count: int, columns: int, rank: int, rows_are_ranks: bool
) -> Array:
    """Places `first` and on of the rank vectors of a factor, float64 [rank, count]."""
    found = np.empty((rank, count))
    if rows_are_ranks:
        for number in range(rank):
            file.read_floats(name, number * columns + first, found[number])
        return found
    block = np.empty((count, rank))
    file.read_floats(name, first * rank, block.reshape(-1))
    found[...] = block.T
    return found
