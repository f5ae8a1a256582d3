"""The training of one expert: everything else of a model is frozen.

One job: freeze. The same expert of every block is trained; how its part of a stack becomes a parameter is in moe.py.
"""

from __future__ import annotations

from torch import nn

from hrm_ray.model.embedding import PuzzleTable
from hrm_ray.model.moe import StackedProjection


def train_single_expert(model: nn.Module, expert: int) -> None:
    """Freeze all of `model` but the experts of number `expert`; the puzzle table too, which is no parameter."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, StackedProjection):
            module.train_only(expert)
        if isinstance(module, PuzzleTable):
            module.trained = False
