"""A weight update that takes one parameter after the other: for narrow weights, and for state kept in host memory.

One job: give each parameter in turn, as float32 and with its state beside it, to an optimizer of any kind, and bring
both back. The rule of the update is the other optimizer's; how numbers are rounded is in `stochastic_rounding`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hrm_ray.train.optimizers import BuildOptimizer
from hrm_ray.train.stochastic_rounding import round_stochastically

UPDATES = "updates"
"""Entry of a parameter's state: how many updates it has had, which its random numbers go by."""


class StatePlace(Protocol):
    """Where an optimizer's tensors lie between updates."""

    def to_device(self, kept: Tensor) -> Tensor:
        """The tensor as an update needs it."""

    def keep(self, used: Tensor, kept: Tensor | None = None) -> Tensor:
        """The tensor as it rests; `kept` is where it rested before, None for a new one."""

    def finish(self) -> None:
        """Wait until everything has arrived."""


class DeviceStorage:
    """State stays beside the weights."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def to_device(self, kept: Tensor) -> Tensor:
        return kept

    def keep(self, used: Tensor, kept: Tensor | None = None) -> Tensor:
        return used.to(self.device)

    def finish(self) -> None:
        pass


class PinnedHostStorage:
    """State rests in host memory; page-locked for CUDA, so that copies need not wait for one another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.page_locked = device.type == "cuda"

    def to_device(self, kept: Tensor) -> Tensor:
        return kept.to(self.device, non_blocking=True)

    def keep(self, used: Tensor, kept: Tensor | None = None) -> Tensor:
        if kept is None:
            kept = torch.empty(used.shape, dtype=used.dtype, pin_memory=self.page_locked)
        return kept.copy_(used, non_blocking=True)

    def finish(self) -> None:
        if self.page_locked:
            torch.cuda.current_stream(self.device).synchronize()


class PerParameterOptimizer(torch.optim.Optimizer):
    """Any optimizer, one parameter at a time.

    A narrow weight (bfloat16, float16) and its gradient are widened to float32 for their own update only, so moments
    are float32 (or what the optimizer makes of them) and small updates are not lost: the result is rounded
    stochastically. Random numbers go by seed, parameter and its number of updates, so they are the same on every rank
    and after a resume. `gradient_factor` multiplies the next update's gradients. `state` holds what the inner optimizer
    keeps of each parameter, under the inner's own keys.

    Float16 ends at 65504. Weights that an update took beyond it are infinite, and are listed in `overflowed` until the
    next one.

    What runs after an update finds the float32 gradients as the update took them, factor included; narrow ones are as
    they were.
    """

    def __init__(self, params: Iterable[nn.Parameter], build: BuildOptimizer, *, seed: int, place: StatePlace) -> None:
        listed = list(params)
        # The inner optimizer is given each parameter in its turn; a stand-in on their device decides its kernels.
        self.inner = build([nn.Parameter(torch.zeros(1, device=parameter.device)) for parameter in listed[:1]])
        super().__init__(listed, {"lr": self.inner.param_groups[0]["lr"]})
        self.seed = seed
        self.place = place
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
        self.gradient_factor = None
        self.place.finish()
        self.overflowed = _beyond_range(
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
                key: self.place.to_device(value) if _moves(value) else value for key, value in kept.items()
            }
        self.inner.step()
        for key, value in self.inner.state.pop(weight, {}).items():
            kept[key] = self.place.keep(value, kept.get(key)) if _moves(value) else value
        kept[UPDATES] = updates + 1
        if narrow:
            round_stochastically(weight.detach(), parameter, f"{self.seed} {number} {updates}")


def _beyond_range(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Those with a value that is not finite; the device is waited for once."""
    if not parameters:
        return []
    # Smallest and largest value are found without a copy, and are nan where one is.
    ends = torch.stack([end for parameter in parameters for end in torch.aminmax(parameter.detach())])
    if bool(ends.isfinite().all()):
        return []
    sound = ends.isfinite().view(-1, 2).all(1).tolist()
    return [parameter for parameter, is_sound in zip(parameters, sound, strict=True) if not is_sound]


def _moves(value: Any) -> bool:
    """Counters stay where they are, as numbers of Python or as scalars on the CPU."""
    return isinstance(value, Tensor) and value.dim() > 0


def multiply_gradients(optimizer: torch.optim.Optimizer, gradients: list[Tensor], factor: Tensor) -> None:
    """Let the next update see every gradient times `factor`.

    Where gradients may be narrow this is done in float32, during the update: small float16 gradients whose scale is
    taken off would vanish again.
    """
    if isinstance(optimizer, PerParameterOptimizer):
        optimizer.gradient_factor = factor
    elif factor != 1:
        torch._foreach_mul_(gradients, factor)


def per_parameter(build: BuildOptimizer, *, seed: int, place: StatePlace) -> BuildOptimizer:
    """The optimizer that `build` makes, as a PerParameterOptimizer."""
    return lambda params: PerParameterOptimizer(params, build, seed=seed, place=place)
