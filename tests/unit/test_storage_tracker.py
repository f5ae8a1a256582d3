"""Bytes of tensors alive, against a script whose every allocation is known; on real tensors and on fake ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from hrm_ray.train.storage_tracker import StorageTracker, storage_bytes

KB = 1024
pytestmark = pytest.mark.parametrize("kind", ["real", "fake"])


@pytest.fixture(autouse=True)
def tensors(kind: str) -> Iterator[None]:
    context: AbstractContextManager[object] = nullcontext() if kind == "real" else FakeTensorMode()
    with context:
        yield


def kilobytes(count: int) -> torch.Tensor:
    return torch.zeros(count * KB // 4)


def test_storages_come_and_go(kind: str) -> None:
    with StorageTracker() as live:
        first = kilobytes(3)
        second = first + 1
        assert live.live_bytes() == 6 * KB
        view = second[:7].view(-1, 1)
        del second
        assert live.live_bytes() == 6 * KB, "a view keeps its storage"
        first.mul_(2)
        first.add(1)
        assert (live.live_bytes(), live.peak_bytes()) == (6 * KB, 9 * KB)
        del view
        assert live.live_bytes() == 3 * KB
    assert live.peak_bytes() == 9 * KB and live.largest_bytes() == 3 * KB
    del first
    assert live.live_bytes() == 0, "it is seen outside the context too"


def test_what_was_there_before_counts_once_it_is_read_or_named(kind: str) -> None:
    read, named, neither = kilobytes(1), kilobytes(2), kilobytes(4)
    live = StorageTracker()
    live.name("kept", [named, named.view(2, -1)])
    with live:
        result = read + 1
    assert live.live_bytes() == 4 * KB and live.live_bytes("kept") == 2 * KB
    assert live.at(live.moment) == {"kept": 2 * KB, "other": 2 * KB}
    del result, neither


def test_a_name_counts_for_a_whole_life(kind: str) -> None:
    """The gradient is named after the pass that made it, and is no activation of that pass."""
    weight = torch.ones(8 * KB, requires_grad=True)
    live = StorageTracker()
    live.name("weights", [weight])
    with live:
        begun = live.moment
        (weight * 2).sum().backward()
        passed = live.moment
        assert weight.grad is not None
        live.name("gradients", [weight.grad])
        scratch = kilobytes(500)
        del scratch
    # The product of 32 KB, and a few scalars.
    within = live.peak_bytes(beside=("weights", "gradients"), since=begun, until=passed)
    assert 32 * KB <= within <= 33 * KB
    assert live.peak_bytes(beside=("weights", "gradients")) == 500 * KB
    assert live.peak_bytes() == 564 * KB
    assert live.live_bytes("gradients") == 32 * KB


def test_the_peak_of_a_stretch_counts_what_it_begins_with(kind: str) -> None:
    with StorageTracker() as live:
        first = kilobytes(10)
        begun = live.moment
        assert live.peak_bytes(since=begun) == 10 * KB
        del first
        assert live.peak_bytes(since=live.moment) == 0
        second = kilobytes(3)
    assert live.peak_bytes(since=begun) == 10 * KB
    del second


def test_it_sees_into_recomputation(kind: str) -> None:
    """Kept whole, five layers of 32 KB are alive at once; recomputed, their common input and one layer's inside."""

    def peak(recomputed: bool) -> int:
        x = torch.ones(8 * KB, requires_grad=True)

        def layers(x: torch.Tensor) -> torch.Tensor:
            for _ in range(5):
                x = x.sin()
            return x

        live = StorageTracker()
        with live:
            y = checkpoint(layers, x, use_reentrant=False) if recomputed else layers(x)
            in_forward = live.live_bytes()
            y.sum().backward()
        return in_forward

    assert peak(False) == 6 * 32 * KB
    assert peak(True) == 2 * 32 * KB


def test_storages_of_tensors(kind: str) -> None:
    whole = kilobytes(4)
    assert storage_bytes([whole, whole[:3], whole.view(2, -1), kilobytes(1)]) == 5 * KB
    assert storage_bytes([]) == 0
