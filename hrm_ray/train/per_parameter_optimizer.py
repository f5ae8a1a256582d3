"""Updates one parameter at a time, for 16-bit weights and for optimizer state in host memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hrm_ray.train.optimizers import BuildOptimizer
from hrm_ray.train.stochastic_rounding import round_stochastically

UPDATES = "updates"
"""Entry of a parameter's state: its number of updates, from which the random numbers of its rounding follow."""


class StateStorage:
    """Keeps state between updates: on the device or, with `offload`, in host memory."""

    def __init__(self, device: torch.device, *, offload: bool = False) -> None:
        self.device = device
        self.offload = offload
        # Copies from and to page-locked memory run beside the computation.
        self.page_locked = offload and device.type == "cuda"

    def to_device(self, kept: Tensor) -> Tensor:
        """The tensor as an update needs it."""
        return kept.to(self.device, non_blocking=True) if self.offload else kept

    def keep(self, used: Tensor, kept: Tensor | None = None) -> Tensor:
        """The tensor as it is kept; `kept` is where it was kept before, None for a new one."""
        if not self.offload:
            return used.to(self.device)
        if kept is None:
            kept = torch.empty(used.shape, dtype=used.dtype, pin_memory=self.page_locked)
        return kept.copy_(used, non_blocking=True)

    def finish(self) -> None:
        """Wait until all copies have arrived."""
        if self.page_locked:
            torch.cuda.current_stream(self.device).synchronize()


class PerParameterOptimizer(torch.optim.Optimizer):
    """Runs any optimizer on one parameter at a time; `state` has the keys of the inner optimizer.

    A narrow weight (bfloat16, float16) and its gradient are float32 for their own update only, so moments are float32
    and small updates are not lost: the result is rounded stochastically. The random numbers follow from seed, parameter
    and its number of updates, so they are the same on every rank and after a resume.

    `gradient_factor` multiplies the gradients of the next update: float32 gradients in place, narrow ones in a copy.
    `overflowed` lists the float16 weights that the last update took beyond 65504, which are infinite now.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], build: BuildOptimizer, *, seed: int, storage: StateStorage
    ) -> None:
        listed = list(params)
        # The inner optimizer gets each parameter in its turn; a stand-in on their device decides its kernels.
        self.inner = build([nn.Parameter(torch.zeros(1, device=parameter.device)) for parameter in listed[:1]])
        super().__init__(listed, {"lr": self.inner.param_groups[0]["lr"]})
        self.seed = seed
        self.storage = storage
        self.gradient_factor: Tensor | None = None
        self.overflowed: list[nn.Parameter] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            self.inner.param_groups[0]["lr"] = group["lr"]
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, number)
        # The float32 copies of the last weight and its gradient would stay until the next update.
        self.inner.param_groups[0]["params"] = []
        self.gradient_factor = None
        self.storage.finish()
        self.overflowed = _not_finite(
            [p for group in self.param_groups for p in group["params"] if p.dtype == torch.float16]
        )

    def _update(self, parameter: nn.Parameter, gradient: Tensor, number: int) -> None:
        kept = self.state[parameter]
        narrow = parameter.dtype != torch.float32
        weight = nn.Parameter(parameter.float()) if narrow else parameter
        weight.grad = gradient.float()
        if self.gradient_factor is not None:
            weight.grad.mul_(self.gradient_factor)
        updates = kept.pop(UPDATES, 0)
        self.inner.param_groups[0]["params"] = [weight]
        if kept:
            self.inner.state[weight] = {
                key: self.storage.to_device(value) if _moves(value) else value for key, value in kept.items()
            }
        self.inner.step()
        for key, value in self.inner.state.pop(weight, {}).items():
            kept[key] = self.storage.keep(value, kept.get(key)) if _moves(value) else value
        kept[UPDATES] = updates + 1
        if narrow:
            round_stochastically(weight.detach(), parameter, f"{self.seed} {number} {updates}")


def _not_finite(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters with a value that is not finite; the device is waited for once."""
    if not parameters:
        return []
    # Smallest and largest value are found without a copy of the weights, and are nan where a weight is.
    extremes = torch.stack([extreme for parameter in parameters for extreme in torch.aminmax(parameter.detach())])
    finite = extremes.isfinite().view(-1, 2).all(1).tolist()
    return [parameter for parameter, is_finite in zip(parameters, finite, strict=True) if not is_finite]


def _moves(value: Any) -> bool:
    """Whether the storage keeps it: not counters, which are Python numbers or scalars on the CPU."""
    return isinstance(value, Tensor) and value.dim() > 0


def multiply_gradients(optimizer: torch.optim.Optimizer, gradients: list[Tensor], factor: Tensor) -> None:
    """Let the next update see every gradient times `factor`."""
    # Small float16 gradients would vanish without their loss scale: they are multiplied as float32, in the update.
    if isinstance(optimizer, PerParameterOptimizer):
        optimizer.gradient_factor = factor
    elif factor != 1:
        torch._foreach_mul_(gradients, factor)
