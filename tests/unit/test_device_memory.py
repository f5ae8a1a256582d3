"""Each kind of accelerator is asked for its own figures."""

from __future__ import annotations

import pytest
import torch

from hrm_ray.metrics.meters import DeviceMemory
from hrm_ray.train.metric_logger import accelerator_memory


def test_the_cpu_has_none() -> None:
    assert accelerator_memory(torch.device("cpu")) is None


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_allocated_peak_and_reserved(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for number, name in enumerate(("memory_allocated", "max_memory_allocated", "memory_reserved"), start=1):
        monkeypatch.setattr(f"torch.{kind}.{name}", lambda device, number=number: asked.append(device) or number)
    read = accelerator_memory(torch.device(kind, 1))
    assert read is not None and read() == DeviceMemory(1, 2, 3)
    assert asked == [torch.device(kind, 1)] * 3


def test_metal_has_no_peak_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.mps.current_allocated_memory", lambda: 5)
    monkeypatch.setattr("torch.mps.driver_allocated_memory", lambda: 8)
    read = accelerator_memory(torch.device("mps"))
    assert read is not None and read() == DeviceMemory(5, 5, 8)
