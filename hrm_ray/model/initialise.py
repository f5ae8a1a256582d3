"""Starting weights, as the ACTv1 reference draws them.

One job: fill tensors. What a head of the network starts from besides is said there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_TRUNCATED_STD = 0.87962566
"""Standard deviation of a unit normal cut at +-2 (the reference rescales by it, so that the real one is asked for)."""


def truncated_normal_(tensor: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Fill `tensor` with a normal truncated at two standard deviations whose real deviation is `std`.

    Drawn by inverse transform, as in the reference (ACTV1_SPEC, section 2; JAX's truncated normal).
    """
    with torch.no_grad():
        if std == 0:
            return tensor.zero_()
        scale = std / _TRUNCATED_STD
        bound = math.erf(math.sqrt(2.0))
        tensor.uniform_(-bound, bound, generator=generator).erfinv_()
        return tensor.mul_(math.sqrt(2.0) * scale).clamp_(-2 * scale, 2 * scale)


def draw_parameter_(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """The starting value of a parameter by its name: a norm begins as the identity, a matrix with unit-sized outputs.

    The last dimension of a matrix is its fan-in: weights lie as [out, in], stacked ones as [experts, out, in].
    """
    if name.endswith("norm.weight"):
        nn.init.ones_(parameter)
    elif name.endswith("norm.bias"):
        nn.init.zeros_(parameter)
    else:
        truncated_normal_(parameter, parameter.shape[-1] ** -0.5, generator)
