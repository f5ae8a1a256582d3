"""An optimizer's state as a safetensors file, by parameter name.

One job: write and read moments and counters exactly. No pickle: tensors by `parameter|key`, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hrm_ray.errors import DataFault, Fault
from hrm_ray.train.weights_file import save_tensors

OPTIMIZER_FILE = "optimizer.safetensors"
_SEPARATOR = "|"


def save_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Write the state of every parameter that has one."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {key!r} of {name!r} is no tensor: {type(value).__name__}")
            tensors[f"{name}{_SEPARATOR}{key}"] = value
    save_tensors(tensors, folder / OPTIMIZER_FILE)


def load_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Restore what `save_optimizer` wrote. Raises DataFault when it belongs to other parameters."""
    path = folder / OPTIMIZER_FILE
    for full_name, tensor in load_file(path).items():
        name, _, key = full_name.rpartition(_SEPARATOR)
        parameter = parameters.get(name)
        if parameter is None or (tensor.dim() > 0 and tensor.shape != parameter.shape):
            raise DataFault(
                Fault(
                    f"{full_name!r} in {path}",
                    "it does not fit the model being trained",
                    "Resume with the architecture and the optimizer that wrote the checkpoint",
                )
            )
        # Counters stay on the CPU, as PyTorch's optimizers keep them; moments follow the weights.
        optimizer.state[parameter][key] = tensor if tensor.dim() == 0 else tensor.to(parameter.device)
