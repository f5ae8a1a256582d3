"""The nonlinear part of a feed-forward network: what happens between its matrices.

One job: the table of activations and the inner values of a gated or plain FFN. The matrices are in layers.py and
moe.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
"""By the name that `--activation` takes; gelu is the exact one, x times the normal distribution function."""

_OVERWRITING: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": partial(F.silu, inplace=True),
    "gelu": F.gelu,  # PyTorch has no such function that writes over its input
    "relu": partial(F.relu, inplace=True),
}


def inner_values(activation: str, up: Tensor, gate: Tensor | None) -> Tensor:
    """activation(gate) * up, or activation(up) where there is no gate; both [..., width].

    Most updates of a segment keep no graph; `up` and `gate`, the widest tensors of a layer, are then written over.
    """
    if torch.is_grad_enabled():
        apply = ACTIVATIONS[activation]
        return apply(up) if gate is None else apply(gate) * up
    apply = _OVERWRITING[activation]
    return apply(up) if gate is None else apply(gate).mul_(up)
