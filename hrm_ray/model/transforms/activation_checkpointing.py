"""Gradient checkpointing: blocks that are computed again in the backward pass.

One job: switch it on for a model. The recomputation itself is in `layers.Level`.
"""

from __future__ import annotations

from torch import nn

from hrm_ray.model.layers import Level


def apply_activation_checkpointing(model: nn.Module) -> None:
    """Let every level keep its blocks' inputs only. Gradients stay the same to the last bit."""
    for module in model.modules():
        if isinstance(module, Level):
            module.recompute = True
