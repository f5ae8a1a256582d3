"""Compiled blocks on a GPU, by inductor: the numbers of eager blocks, and no recompilation."""

from __future__ import annotations

import pytest
import torch

from hrm_ray.train.assemble import assemble
from hrm_ray.train.world import World
from tests.support.splits import Cut, Rows, config_for, settings_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> None:
    """PyTorch keeps graphs by code and shape, so a scenario of the same shapes would compile nothing."""
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("scenario", "bf16", "tolerance"),
    [
        ("text", False, 1e-4),
        ("text", True, 0.03),
        ("transformer", True, 0.03),
        ("text-experts", False, 1e-4),
        ("chunked", False, 1e-4),
        ("puzzle-carried", False, 1e-4),
        ("puzzle-carried", True, 0.03),
    ],
)
def test_losses_of_ten_steps(scenario: str, bf16: bool, tolerance: float) -> None:
    losses: list[list[float]] = []
    for compiled in (False, True):
        settings = settings_for(scenario, "sgd", Cut(1, 1, 8))
        memory = {"amp": bf16, "activations": "bf16" if bf16 else "fp32"}
        settings = settings.model_copy(
            update={
                "memory": settings.memory.model_copy(update=memory),
                "cluster": settings.cluster.model_copy(update={"compile": compiled, "strict": True}),
            }
        )
        config = config_for(settings)
        loop = assemble(settings, config, Rows(config.task), World.here("cuda", 1), 20)
        losses.append([])
        graphs = []
        for _ in range(10):
            loop.step()
            losses[-1].append(loop.flush_metrics()["objective"])
            graphs.append(loop.parts.compiled.graphs if loop.parts.compiled is not None else 0)
        assert graphs[-1] == graphs[0]
        assert compiled == (graphs[0] > 0)
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
