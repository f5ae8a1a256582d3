"""Products per expert in 16 bits on a CPU: the numbers of one product per group, made of products of few sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.model.grouped_product import (
    SMALLEST,
    padded_size,
    piece_sizes,
    rows_times,
    rows_times_in_pieces,
    rows_with_rows,
    rows_with_rows_padded,
)

COUNTS = st.one_of(st.just(0), st.integers(1, 3), st.integers(50, 70), st.integers(1, 300))
GROUPS = st.lists(COUNTS, min_size=1, max_size=5)


def bounds_of(counts: list[int]) -> list[tuple[int, int]]:
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


@given(GROUPS, st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 9))
def test_they_are_the_products_of_the_groups(counts: list[int], dtype: torch.dtype, seed: int) -> None:
    """Sums of whole numbers that both types hold, so to the bit; and nothing of a neighbour reaches a group, not even
    what is no number."""
    generator, bounds = torch.Generator().manual_seed(seed), bounds_of(counts)
    rows, other = (torch.randint(-1, 2, (sum(counts), width), generator=generator).to(dtype) for width in (8, 16))
    matrices = torch.randint(-2, 3, (len(counts), 8, 24), generator=generator).to(dtype)
    ends = torch.tensor([end for _, end in bounds], dtype=torch.int32)
    for product in (rows_times(rows, matrices, ends), rows_times_in_pieces(rows, matrices, bounds)):
        assert torch.equal(product, torch.cat([rows[a:b] @ m for (a, b), m in zip(bounds, matrices, strict=True)]))
    for products in (rows_with_rows(rows, other, ends), rows_with_rows_padded(rows, other, bounds)):
        assert torch.equal(products, torch.stack([rows[a:b].t() @ other[a:b] for a, b in bounds]))
    poisoned = rows.clone()
    begin, end = bounds[0]
    poisoned[begin:end] = float("nan")
    later = slice(end, None)
    assert torch.equal(rows_times(poisoned, matrices, ends)[later], rows_times(rows, matrices, ends)[later])
    assert torch.equal(rows_with_rows(poisoned, other, ends)[1:], rows_with_rows(rows, other, ends)[1:])


@given(st.integers(0, 100_000))
def test_sizes_cover_the_rows_and_little_more(count: int) -> None:
    sizes = piece_sizes(count)
    assert 0 <= sum(sizes) - count < SMALLEST
    assert 0 <= padded_size(count) - count <= max(SMALLEST - 1, count / 4)


def test_there_are_few_sizes() -> None:
    """Of every number of rows up to 8192: eight powers of two, and four numbers for each of them."""
    assert {size for count in range(8193) for size in piece_sizes(count)} == {SMALLEST << bit for bit in range(8)}
    assert len({padded_size(count) for count in range(1, 8193)}) <= 4 * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_other_size_is_multiplied(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all rows together are fewer than the smallest product has: then it is those."""
    met: set[int] = set()
    real = torch.mm

    def counting(left: torch.Tensor, right: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        met.add(max(left.shape))
        return real(left, right, **named)

    monkeypatch.setattr(torch, "mm", counting)
    for counts in ([500, 0, 131, 393], [7, 3]):
        rows, ends = torch.ones(sum(counts), 8, dtype=dtype), torch.tensor(counts).cumsum(0).int()
        rows_times(rows, torch.ones(len(counts), 8, 8, dtype=dtype), ends)
        rows_with_rows(rows, rows, ends)
    assert met == {64, 128, 256, 10} | {512, 192, 448, 8}
