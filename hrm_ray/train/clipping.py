"""The norm of all gradients, and by how much it asks them to be shortened.

One job: those two numbers, in float32 whatever the gradients' type: the squares of float16 overflow above 255, and a
sum in bfloat16 has eight bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, float32."""
    norms = torch._foreach_norm(gradients, 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of norm `norm` are multiplied with so that it is at most `max_norm` (0: any)."""
    if max_norm == 0:
        return torch.ones_like(norm)
    # The small number is PyTorch's, against a norm of zero (torch.nn.utils.clip_grads_with_norm_).
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
