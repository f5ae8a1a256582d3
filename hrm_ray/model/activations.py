"""Activations: the nonlinear part of a gated or plain FFN, whose matrices are in layers.py and moe.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
"""By the name that `--activation` takes; gelu is the exact one, not its tanh approximation."""

_INPLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": partial(F.silu, inplace=True),
    "gelu": F.gelu,  # PyTorch has no in-place GELU
    "relu": partial(F.relu, inplace=True),
}


def inner_values(activation: str, up: Tensor, gate: Tensor | None) -> Tensor:
    """activation(gate) * up, or activation(up) without a gate; all [..., width]. Without a graph `up` and `gate` are
    overwritten."""
    if torch.is_grad_enabled():
        apply = ACTIVATIONS[activation]
        return apply(up) if gate is None else apply(gate) * up
    # Most updates of a segment have no graph, and these are the widest tensors of a layer.
    apply = _INPLACE[activation]
    return apply(up) if gate is None else apply(gate).mul_(up)
