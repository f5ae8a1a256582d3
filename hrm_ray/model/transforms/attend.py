"""Sets the attention kernel of a model; the kernels are in `attention` and `attention_backends`."""

from __future__ import annotations

from torch import nn

from hrm_ray.model.attention import AttentionKernel
from hrm_ray.model.layers import Attention


def use_kernel(model: nn.Module, kernel: AttentionKernel) -> None:
    """Let every attention of the model be computed by `kernel`."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = kernel
