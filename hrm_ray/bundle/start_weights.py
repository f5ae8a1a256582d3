"""Start weights (`--student-init`) from a bundle or an original HRM checkpoint, under this project's names."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import torch
from torch import Tensor

from hrm_ray.bundle.weights_file import check_fit, read_tensors
from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.model.build import build_model
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.import_reference import from_reference, looks_like_reference
from hrm_ray.rundir import RunDir

_PUZZLE_TABLE = "embedding.puzzle_emb.weights"

_NOT_TENSORS = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    struct.error,
    pickle.UnpicklingError,
)
"""What PyTorch's restricted unpickler raises for other files."""


def start_weights(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Tensors by this project's names from a bundle's folder, a .safetensors file, or a PyTorch file of the original.

    PyTorch files are read with `weights_only`, which admits tensors and nothing that runs. Fused projections are split.
    Raises SettingsError for a path that does not exist, DataError for a file that holds no weights.
    """
    tensors = _read(path)
    if looks_like_reference(tensors):
        tensors = from_reference(tensors)
    if config.puzzle_emb_ndim == 0:
        # The original saves a puzzle table always, of width 0 where the model has none.
        table = tensors.get(_PUZZLE_TABLE)
        if table is not None and table.numel() == 0:
            del tensors[_PUZZLE_TABLE]
    return tensors


def check_start_weights(path: Path, config: ModelConfig) -> None:
    """Raises DataError unless the tensors at `path` fit the architecture, SettingsError if there is no such path."""
    with torch.device("meta"):
        model = build_model(config)
    check_fit(model, start_weights(path, config), str(path))


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        if not RunDir(path).weights.is_file():
            hint = "Give a bundle's folder, as hrm-ray train wrote it, or a file of weights"
            reason = "there are no weights in this folder (model.safetensors is missing)"
            raise DataError(Fault(str(path), reason, hint))
        return read_tensors(RunDir(path).weights)
    hint = "Give a bundle's folder, a .safetensors file, or a state dict saved by torch.save"
    if not path.is_file():
        raise SettingsError(Fault(str(path), "no such file or folder", hint))
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _NOT_TENSORS as error:
        raise DataError(Fault(str(path), f"is not a PyTorch file of tensors ({type(error).__name__})", hint)) from None
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise DataError(Fault(str(path), "is not a state dict (names with tensors)", hint))
    return {str(name): tensor for name, tensor in loaded.items()}
