"""Every feature on two ranks: their weights stay equal to the bit, and the loss is that of one process with all rows.

Each feature's words are those of tests/support/features.py; the ranks are two gloo processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.support.feature_loops import STEPS, ConsumedRange, run_feature, spawned_rank, write_bases
from tests.support.features import FEATURES

pytestmark = pytest.mark.agreement

LOOSE = {
    "amp-bf16": 2e-2,
    "weights-bf16": 2e-2,
    "amp-fp16": 3e-3,
    "weights-fp16": 3e-3,
}
"""Relative tolerance where products are rounded to 8 or 11 bits: other sums round to another neighbour."""
EXACT = 1e-4
"""Float32 sums in another order, grown over the updates."""


@dataclass(frozen=True)
class Results:
    ranks: list[dict[str, ConsumedRange]]
    alone: dict[str, ConsumedRange]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """All features, in one pair of processes and in this one."""
    folder: Path = tmp_path_factory.mktemp("features")
    threads = torch.get_num_threads()
    write_bases(folder)
    mp.spawn(spawned_rank, (2, str(folder)), nprocs=2)
    ranks = [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]
    alone = {name: run_feature(name, 1, folder) for name in FEATURES}
    torch.set_num_threads(threads)
    yield Results(ranks, alone)


@pytest.mark.parametrize("name", FEATURES)
def test_ranks_stay_equal(results: Results, name: str) -> None:
    first, second = (rank[name].weights for rank in results.ranks)
    assert first.keys() == second.keys() and first
    for tensor, value in first.items():
        assert torch.equal(value, second[tensor]), tensor


@pytest.mark.parametrize("name", FEATURES)
def test_two_ranks_train_as_one_process_does(results: Results, name: str) -> None:
    together, alone = results.ranks[0][name].losses, results.alone[name].losses
    assert len(together) == len(alone) == STEPS
    assert together == results.ranks[1][name].losses
    # With dropout too, in blocks and in adapters: what a row draws does not depend on its rank.
    assert together == pytest.approx(alone, rel=LOOSE.get(name, EXACT))


@pytest.mark.parametrize("name", FEATURES)
def test_something_is_trained(results: Results, name: str) -> None:
    losses = results.alone[name].losses
    assert losses[-1] != losses[0]
