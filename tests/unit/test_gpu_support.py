"""What the GPU tests share, checked without a GPU: fake tensors of two devices refuse to meet."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hrm_ray.model.chunked import Chunking
from hrm_ray.train.fake_tensors import fake_tensors
from tests.support.chunked_cases import Shape, in_chunks, trained, whole
from tests.support.tiny_models import tiny_config, tiny_model


@pytest.mark.parametrize("chunking", [None, Chunking(10, exact=False), Chunking(10, exact=True)])
def test_training_keeps_to_one_device(chunking: Chunking | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # There is no autocast for the device "meta".
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    shape = Shape(((24,), (24,)), tiny_config(seq_len=24, window_size=5))
    with fake_tensors():
        model = tiny_model(shape.config)
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: None if t is None else _moved(t) for name, t in held.items()})  # type: ignore[arg-type]
        batch = {name: _moved(column) for name, column in shape.batch().items()}
        objective = whole(model) if chunking is None else in_chunks(model, chunking.size, exact=chunking.exact)
        result = trained(objective, batch)
    assert {gradient.device.type for gradient in result.gradients.values()} == {"meta"}


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    moved = torch.empty_like(tensor, device="meta", requires_grad=False)
    return torch.nn.Parameter(moved) if isinstance(tensor, torch.nn.Parameter) else moved


def test_they_need_no_ray() -> None:
    code = "import sys, tests.gpu.test_cuda, tests.gpu.test_long_texts; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
