"""--activations: states and residuals in bfloat16 beside float32 weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hrm_ray.settings.memory import MemorySettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.memory_estimate import memory_estimate
from hrm_ray.train.precision import activation_dtype
from hrm_ray.train.world import World
from tests.support.runs import PUZZLE, puzzle_file, train
from tests.support.splits import Cut, Rows, config_for, settings_for
from tests.unit.test_run_narrow import stored_types

CPU = torch.device("cpu")


def test_what_the_settings_mean() -> None:
    assert activation_dtype(MemorySettings(), CPU) == "float32"
    assert activation_dtype(MemorySettings(activations="bf16"), CPU) == "bfloat16"
    assert activation_dtype(MemorySettings(activations="bf16", amp=False), CPU) == "bfloat16"
    assert activation_dtype(MemorySettings(model_dtype="fp16"), CPU) == "float16"


@pytest.mark.parametrize(("bf16", "amp", "expected"), [(True, True, "bfloat16"), (True, False, "float32")])
def test_the_default_on_a_gpu(bf16: bool, amp: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert activation_dtype(MemorySettings(amp=amp), torch.device("cuda")) == expected
    assert activation_dtype(MemorySettings(amp=amp, activations="fp32"), torch.device("cuda")) == "float32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert activation_dtype(MemorySettings(amp=amp), torch.device("cuda")) == "float32"


def test_what_a_run_leaves(tmp_path: Path) -> None:
    """Weights and moments in float32, carries in bfloat16, and a bundle that does not depend on the device."""
    train(puzzle_file(tmp_path), tmp_path / "b", *PUZZLE, "--steps", "2", "--activations", "bf16")
    folder = tmp_path / "b" / "checkpoints" / "step_2"
    weights = stored_types(folder / "model.safetensors")
    assert {name for name, kind in weights.items() if kind != "F32"} == {"H_init", "L_init"}
    moments = stored_types(folder / "optimizer.safetensors")
    assert {kind for name, kind in moments.items() if name.endswith("|exp_avg")} == {"F32"}
    assert stored_types(folder / "slots_00000000.safetensors")["carry.z_h"] == "BF16"
    assert json.loads((tmp_path / "b" / "config.json").read_text())["forward_dtype"] == "float32"


def loop_with(**memory: Any) -> TrainingLoop:
    settings = settings_for("text", "sgd", Cut(1, 1, 8))
    settings = settings.model_copy(update={"memory": settings.memory.model_copy(update=memory)})
    return assemble(settings, config_for(settings), Rows("text"), World.here("cpu", 1), 10)


def test_gradients_are_those_of_float32_within_the_types_precision() -> None:
    found = []
    for activations in ("fp32", "bf16"):
        loop = loop_with(activations=activations, amp=False)
        norms = []
        for _ in range(3):
            report = loop.step()
            assert report is not None
            norms.append(report.norm)
        found.append([*norms, loop.flush_metrics()["objective"]])
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert found[1] != found[0]


def test_the_estimate_of_memory_knows_them() -> None:
    settings = settings_for("text", "sgd", Cut(1, 1, 64))
    config = config_for(settings)
    sizes = []
    for activations in ("fp32", "bf16"):
        memory = settings.memory.model_copy(update={"activations": activations, "gradient_checkpointing": False})
        sizes.append(memory_estimate(settings.model_copy(update={"memory": memory}), config).activations_bytes)
    assert sizes[1] < 0.9 * sizes[0]
