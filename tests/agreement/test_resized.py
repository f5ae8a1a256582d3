"""A run on 2, 3 and 1 gloo processes one after the other trains as one process does, whatever the strategy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests.support.resized_runs import PATH, STEPS, Case, Ended, in_processes, undisturbed

pytestmark = [pytest.mark.agreement, pytest.mark.slow]

_PUZZLE: dict[str, Any] = {
    "model": {"dropout_rate": 0.2, "halt_exploration_prob": 0.5},
    "optimizer": {"ema": 0.9, "grad_clip": 0.3},
}
_TEXT: dict[str, Any] = {"model": {"dropout_rate": 0.2}, "adapt": {"use_peft": True, "lora_dropout": 0.3}}
CASES = {
    **{
        f"puzzle, {strategy}": Case("puzzle-embedding", strategy, _PUZZLE)
        for strategy in ("ddp", "sharded-optimizer", "zero2", "zero3", "fsdp")
    },
    "text, ddp": Case("text", "ddp", _TEXT),
}
Results = dict[str, Ended]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Results, Results]]:
    folder: Path = tmp_path_factory.mktemp("resized")
    threads = torch.get_num_threads()
    resized: Results = {}
    for phase, ranks in enumerate(PATH):
        mp.spawn(in_processes, (phase, folder, CASES), nprocs=ranks)
        for name, found in torch.load(folder / f"phase{phase}.pt", weights_only=False).items():
            before = resized[name].figures if phase else []
            resized[name] = Ended([*before, *found.figures], found.weights)
    alone = {name: undisturbed(case) for name, case in CASES.items()}
    torch.set_num_threads(threads)
    yield resized, alone


@pytest.mark.parametrize("name", CASES)
def test_a_resized_run_trains_as_one_process(results: tuple[Results, Results], name: str) -> None:
    """Carried rows, halting with exploration, the sparse table, dropout of blocks and adapters, the moving average, and
    a window of the adaptive learning rate that begins with one number of ranks and ends with another. Float32 sums in
    another order, nine updates long: 1e-5 of weights of size 1, and 5e-5 of a norm."""
    resized, alone = results[0][name], results[1][name]
    assert len(resized.figures) == len(alone.figures) == STEPS * len(PATH)
    for ours, theirs in zip(resized.figures, alone.figures, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-5)
    rates = {figures[2] for figures in alone.figures}
    assert len(rates) > 1, "the adaptive learning rate should have acted"
    assert resized.weights.keys() == alone.weights.keys()
    for tensor, value in alone.weights.items():
        torch.testing.assert_close(resized.weights[tensor].float(), value.float(), rtol=0, atol=1e-5)
