"""Training of one expert of every block, with the rest of the model frozen (see moe.StackedProjection)."""

from __future__ import annotations

from torch import nn

from hrm_ray.model.embedding import PuzzleTable
from hrm_ray.model.moe import StackedProjection


def train_single_expert(model: nn.Module, expert: int) -> None:
    """Freeze all of `model`, the puzzle table included, except for expert number `expert` of each block."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, StackedProjection):
            module.train_only(expert)
        if isinstance(module, PuzzleTable):
            module.trained = False
