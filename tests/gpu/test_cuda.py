"""The same step on a CUDA device as on the CPU; skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hrm_ray.train.optimizers import sum_by_identifier
from tests.support.feature_loops import run_feature, write_bases
from tests.support.features import FEATURES
from tests.support.splits import CUTS, SCENARIOS, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradients_and_losses_are_those_of_the_cpu(scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other kernels sum in another order: 1e-3 of a tensor's largest gradient with TF32 off; losses drift with them."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    cpu = run(scenario, "sgd", CUTS["1x2x4"])
    gpu = run(scenario, "sgd", CUTS["1x2x4"], device="cuda")
    assert cpu.gradients.keys() == gpu.gradients.keys()
    for name, gradient in cpu.gradients.items():
        scale = float(gradient.abs().max())
        assert float((gpu.gradients[name] - gradient).abs().max()) <= 1e-3 * max(scale, 1e-3), name
    assert gpu.losses == pytest.approx(cpu.losses, rel=1e-2)


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_trains_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    """Losses of four updates. Products in 8 or 11 bits and the first loss scale's overflow differ between devices,
    hence the width; what is wrong by a scale or a mask is off by far more."""
    write_bases(tmp_path)
    cpu = run_feature(name, 1, tmp_path)
    gpu = run_feature(name, 1, tmp_path, device="cuda")
    assert gpu.losses == pytest.approx(cpu.losses, rel=0.1, nan_ok=True)


def test_rows_of_the_puzzle_table_are_summed_to_the_same_bits() -> None:
    """Ranks take the sign of sums that each makes itself: every run, and the CPU, gives the same."""
    draw = torch.Generator().manual_seed(1)
    # Of few identifiers, whose atomic additions would meet.
    identifiers, rows = torch.randint(0, 7, (20_000,), generator=draw), torch.randn(20_000, 64, generator=draw)
    want = sum_by_identifier(identifiers, rows)
    for _ in range(5):
        got = sum_by_identifier(identifiers.cuda(), rows.cuda())
        assert all(torch.equal(one.cpu(), other) for one, other in zip(got, want, strict=True))
