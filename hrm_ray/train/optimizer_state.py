"""An optimizer's state as a safetensors file, with tensors named `parameter|key`, and the bytes it takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hrm_ray.bundle.weights_file import read_tensors
from hrm_ray.errors import DataError, Fault
from hrm_ray.train.per_parameter_optimizer import PerParameterOptimizer
from hrm_ray.train.storage_tracker import storage_bytes

OPTIMIZER_FILE = "optimizer.safetensors"
SEPARATOR = "|"
_BY_BLOCKS = frozenset({"absmax1", "absmax2", "qmap1", "qmap2"})
"""State of bitsandbytes whose shape is not the parameter's: a scale per block, and the values of the 256 codes."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of every parameter that has one, as tensors by `parameter|key`; Python integers become int64
    scalars."""
    return {
        f"{name}{SEPARATOR}{key}": _as_tensor(name, key, value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    folder: Path,
    only: Collection[str] | None = None,
) -> None:
    """Restore the `optimizer_tensors` of a checkpoint, or the state of the parameters `only`. Raises DataError when it
    belongs to other parameters."""
    path = folder / OPTIMIZER_FILE
    tables: dict[str, Tensor] = {}
    for full_name, tensor in read_tensors(path).items():
        name, _, key = full_name.rpartition(SEPARATOR)
        parameter = parameters.get(name)
        if parameter is None or not _fits(key, tensor, parameter):
            raise DataError(
                Fault(
                    f"{full_name!r} in {path}",
                    "belongs to another model or optimizer",
                    "Resume with the architecture and the optimizer that wrote the checkpoint",
                )
            )
        if only is not None and name not in only:
            continue
        state = optimizer.state[parameter]
        if tensor.dtype == torch.int64 and tensor.dim() == 0:
            state[key] = int(tensor)
        elif tensor.dim() == 0:
            # PyTorch's optimizers keep their step counters on the CPU.
            state[key] = tensor
        elif key in tables and torch.equal(tables[key], tensor.to(tables[key].device)):
            # All parameters share one code table, as bitsandbytes had it.
            state[key] = tables[key]
        else:
            if isinstance(optimizer, PerParameterOptimizer):
                state[key] = optimizer.storage.keep(tensor)
            else:
                state[key] = tensor.to(parameter.device)
            if key.startswith("qmap"):
                tables[key] = state[key]


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors of the optimizer's state; a table that parameters share counts once."""
    return storage_bytes(state_tensors(optimizer))


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors of the optimizer's state."""
    return [tensor for state in optimizer.state.values() for tensor in state_tensors_of(state)]


def state_tensors_of(state: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of one parameter's state."""
    return [value for value in state.values() if isinstance(value, Tensor)]


def _as_tensor(name: str, key: str, value: Any) -> Tensor:
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int64)
    if not isinstance(value, Tensor):
        raise TypeError(f"optimizer state {key!r} of {name!r} is not a tensor but {type(value).__name__}")
    # A safetensors file may not hold two tensors of the same memory, and parameters share their code tables.
    return value.clone() if key in _BY_BLOCKS else value


def _fits(key: str, tensor: Tensor, parameter: nn.Parameter) -> bool:
    return tensor.dim() == 0 or tensor.shape == parameter.shape or (key in _BY_BLOCKS and tensor.dim() == 1)
