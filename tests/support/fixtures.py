"""Finds and opens the reference's fixtures, whatever they are called.

One job: discovery and reading. What is held against them is in the tests.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.config import ModelConfig, swiglu_width
from hrm_ray.model.import_reference import from_reference

DEFAULT_FOLDER = Path(__file__).parent.parent / "fixtures"


def fixture_folder() -> Path:
    return Path(os.environ.get("HRM_RAY_FIXTURES", DEFAULT_FOLDER)).resolve()


def discover() -> list[Path]:
    """Every JSON file of the folder that describes a model; the folder must exist and hold at least one."""
    folder = fixture_folder()
    if not folder.is_dir():
        raise FileNotFoundError(f"HRM_RAY_FIXTURES names {folder}, which is not a folder")
    found = [path for path in sorted(folder.glob("*.json")) if "model_config" in json.loads(path.read_text())]
    if not found:
        raise FileNotFoundError(f"{folder} holds no fixture (*.json with model_config)")
    return found


@dataclass(frozen=True)
class Fixture:
    """One fixture: its description and a reader for its tensor files."""

    path: Path
    about: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Fixture:
        return cls(path, json.loads(path.read_text()))

    def offers(self, part: str) -> bool:
        return f"{self.about['name']}.{part}.safetensors" in self.about["files"]

    def tensors(self, part: str) -> dict[str, Tensor]:
        return load_file(self.path.with_name(f"{self.about['name']}.{part}.safetensors"))

    def config(self, **changes: Any) -> ModelConfig:
        given = self.about["model_config"]
        return ModelConfig(
            **{
                "task": "puzzle",
                "vocab_size": given["vocab_size"],
                "seq_len": given["seq_len"],
                "hidden_size": given["hidden_size"],
                "num_heads": given["num_heads"],
                "intermediate_size": swiglu_width(given["hidden_size"], given["expansion"]),
                "h_layers": given["H_layers"],
                "l_layers": given["L_layers"],
                "h_cycles": given["H_cycles"],
                "l_cycles": given["L_cycles"],
                "halt_max_steps": given["halt_max_steps"],
                "pos_encodings": given["pos_encodings"],
                "rope_theta": given.get("rope_theta", 10000.0),
                "rms_norm_eps": given.get("rms_norm_eps", 1e-5),
                "puzzle_emb_ndim": given["puzzle_emb_ndim"],
                "num_puzzle_identifiers": given["num_puzzle_identifiers"],
                "forward_dtype": given["forward_dtype"],
            }
            | changes
        )

    def model(self, **changes: Any) -> ActV1:
        """The model with the fixture's weights; a missing or surplus tensor fails."""
        config = self.config(**changes)
        model = ActV1(config)
        state = from_reference(self.tensors("weights"))
        if config.puzzle_emb_ndim == 0:
            state.pop("embedding.puzzle_emb.weights", None)
        model.load_state_dict(state, strict=True)
        return model

    def batch(self, number: int) -> dict[str, Tensor]:
        """The batch offered at ACT step `number` (from 1), with this project's own fields."""
        tensors = self.tensors("batches")
        rows = tensors[f"batch{number}.inputs"].shape[0]
        return {
            "inputs": tensors[f"batch{number}.inputs"],
            "labels": tensors[f"batch{number}.labels"],
            "puzzle_identifiers": tensors[f"batch{number}.puzzle_identifiers"],
            "active": torch.ones(rows, dtype=torch.bool),
            "min_steps": torch.zeros(rows, dtype=torch.int32),
        }
