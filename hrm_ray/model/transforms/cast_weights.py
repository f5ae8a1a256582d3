"""Weights in bfloat16 or float16.

Buffers keep their type: the starting states have that of the activations, rotary tables and the puzzle table are
float32.
"""

from __future__ import annotations

import torch
from torch import nn

from hrm_ray.errors import DataError, Fault


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`; gradients get the same type. Raises DataError for a weight beyond its range,
    which for float16 ends at 65504."""
    for name, parameter in model.named_parameters():
        largest = float(torch.stack(parameter.detach().aminmax()).abs().max())
        if largest > torch.finfo(dtype).max:
            reason = f"its largest value {largest:g} exceeds {torch.finfo(dtype).max:g}, the largest {dtype}"
            raise DataError(Fault(f"the start weight {name}", reason, "Give --model-dtype bf16 or fp32"))
        parameter.data = parameter.data.to(dtype)
