"""Weights in a narrow type.

One job: round a model's parameters to bfloat16 or float16. Buffers keep the type they were made with: the starting
states have the activations' own, rotary tables and the puzzle table are float32.
"""

from __future__ import annotations

import torch
from torch import nn


def narrow_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to `dtype`; gradients get the same type."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
