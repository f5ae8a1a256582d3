"""Weights to start from: a bundle of this project, or an original HRM checkpoint.

One job: read them and give them this project's names (`--student-init`). Shapes are checked where they are filled in.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from hrm_ray.errors import DataFault, Fault
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.import_reference import from_reference, looks_like_reference
from hrm_ray.rundir import RunDir
from hrm_ray.train.weights_file import read_tensors

_PUZZLE_TABLE = "embedding.puzzle_emb.weights"


def start_weights(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Tensors by this project's names from a bundle's folder, a .safetensors file, or a PyTorch file of the original.

    PyTorch files are read with `weights_only`, which admits tensors and nothing that runs. Fused projections are split.
    Raises DataFault.
    """
    tensors = _read(path)
    if looks_like_reference(tensors):
        tensors = from_reference(tensors)
    if config.puzzle_emb_ndim == 0:
        # The original always saves a table, of width 0 where it has none.
        table = tensors.get(_PUZZLE_TABLE)
        if table is not None and table.numel() == 0:
            del tensors[_PUZZLE_TABLE]
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        return read_tensors(RunDir(path).weights)
    if path.suffix == ".safetensors":
        return read_tensors(path)
    mend = "Give a bundle's folder, a .safetensors file, or a state dict saved by torch.save"
    if not path.is_file():
        raise DataFault(Fault(str(path), "there is no such file or folder", mend))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise DataFault(Fault(str(path), f"it is no PyTorch file of tensors ({type(error).__name__})", mend)) from None
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise DataFault(Fault(str(path), "it holds something else than tensors by name", mend))
    return {str(name): tensor for name, tensor in loaded.items()}
