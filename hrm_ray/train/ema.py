"""A moving average of the weights, for evaluation and for the final model.

One job: keep it, swap it in and out. Averages float parameters; buffers are read from the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """average <- decay * average + (1 - decay) * weight after every weight update (HRM-Text's rule, no warm-up)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        averages = list(self.average.values())
        weights = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    def load(self, average: dict[str, Tensor]) -> None:
        """Restore a stored average."""
        for name, tensor in average.items():
            self.average[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the average inside this context, with its own weights after it, to the bit."""
        kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        try:
            self._fill(self.average)
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, source: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(source[name])
