"""Weights in a narrow type.

One job: round a model's parameters to bfloat16 or float16. Buffers keep the type they were made with: the starting
states have the activations' own, rotary tables and the puzzle table are float32.
"""

from __future__ import annotations

import torch
from torch import nn

from hrm_ray.errors import DataError, Fault


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`; gradients get the same type. Raises DataError for a weight that `dtype` cannot
    hold: float16 ends at 65504."""
    for name, parameter in model.named_parameters():
        largest = float(torch.stack(parameter.detach().aminmax()).abs().max())
        if largest > torch.finfo(dtype).max:
            reason = f"its largest value {largest:g} is beyond {torch.finfo(dtype).max:g}, where {dtype} ends"
            raise DataError(Fault(f"the start weight {name}", reason, "Give --model-dtype bf16 or fp32"))
        parameter.data = parameter.data.to(dtype)
