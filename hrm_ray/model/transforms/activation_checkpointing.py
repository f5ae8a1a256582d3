"""Gradient checkpointing: the backward pass computes blocks again (see `layers.Level`)."""

from __future__ import annotations

from torch import nn

from hrm_ray.model.layers import Level


def apply_activation_checkpointing(model: nn.Module) -> None:
    """Let every level save its blocks' inputs only. Gradients are the same to the last bit."""
    for module in model.modules():
        if isinstance(module, Level):
            module.recompute = True
