"""Blocks run eagerly in these tests unless a test asks for compiled ones: compiling takes seconds in each of them."""

from __future__ import annotations

import pytest
import torch

from hrm_ray.model.transforms import compile as compiling
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train import assemble


@pytest.fixture(autouse=True)
def _eager_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(settings: RunSettings, device: torch.device) -> bool:
        return settings.cluster.compile is True and compiling.compiles(settings, device)

    monkeypatch.setattr(assemble, "compiles", asked)
