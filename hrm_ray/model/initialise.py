"""Starting weights, as the ACTv1 reference draws them.

One job: fill tensors. It does not decide which tensor gets which scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
