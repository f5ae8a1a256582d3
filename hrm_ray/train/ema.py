"""An exponential moving average of the trained parameters, for evaluation and for the final model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """average <- decay * average + (1 - decay) * weight after every weight update (HRM-Text's rule, no warm-up)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.decay = decay
        # float32 whatever the weights' type: what one update adds is too small for bfloat16.
        self.average = {name: p.detach().to(torch.float32, copy=True) for name, p in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        pairs = [(average, self.trained[name].detach()) for name, average in self.average.items()]
        wide = [(average, weight) for average, weight in pairs if weight.dtype == torch.float32]
        if wide:
            torch._foreach_lerp_([average for average, _ in wide], [weight for _, weight in wide], 1 - self.decay)
        # One by one: only one float32 copy of a narrow weight exists at a time.
        for average, weight in pairs:
            if weight.dtype != torch.float32:
                average.lerp_(weight.float(), 1 - self.decay)

    def load(self, average: dict[str, Tensor]) -> None:
        """Restore a stored average."""
        for name, tensor in average.items():
            self.average[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the average inside this context, with its own weights after it, to the bit."""
        kept = {name: p.detach().clone() for name, p in self.trained.items()}
        try:
            self._fill(self.average)
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, source: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(source[name])
