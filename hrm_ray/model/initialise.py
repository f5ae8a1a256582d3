"""Starting weights, as the ACTv1 reference draws them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_TRUNCATED_STD = 0.87962566
"""Standard deviation of a unit normal truncated at +-2; the reference divides by it to get the requested one."""


def truncated_normal_(tensor: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Fill `tensor` from a normal truncated at two standard deviations, whose own standard deviation is `std`.

    Sampled by inverse transform, as in the reference (ACTV1_SPEC, section 2; JAX's truncated normal).
    """
    with torch.no_grad():
        if std == 0:
            return tensor.zero_()
        scale = std / _TRUNCATED_STD
        bound = math.erf(math.sqrt(2.0))
        tensor.uniform_(-bound, bound, generator=generator).erfinv_()
        return tensor.mul_(math.sqrt(2.0) * scale).clamp_(-2 * scale, 2 * scale)


def draw_parameter_(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Initialise a parameter by its name: a norm as the identity, a matrix so that its outputs have unit variance."""
    if name.endswith("norm.weight"):
        nn.init.ones_(parameter)
    elif name.endswith("norm.bias"):
        nn.init.zeros_(parameter)
    else:
        # The last dimension is the fan-in: weights are [out, in], stacked ones [experts, out, in].
        truncated_normal_(parameter, parameter.shape[-1] ** -0.5, generator)
