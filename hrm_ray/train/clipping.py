"""The norm of all gradients and the factor that clips them, in float32 whatever the gradients' type."""

from __future__ import annotations

import torch
from torch import Tensor


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, float32."""
    # Squares of float16 numbers overflow above 255, and a sum in bfloat16 keeps eight bits.
    norms = torch._foreach_norm(gradients, 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """The factor that brings gradients of norm `norm` to a norm of at most `max_norm` (0: no clipping)."""
    if max_norm == 0:
        return torch.ones_like(norm)
    # The small number is PyTorch's, against a norm of zero (torch.nn.utils.clip_grads_with_norm_).
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
