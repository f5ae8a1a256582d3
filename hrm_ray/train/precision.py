"""Mixed precision: autocast, the dtype in which gradients are accumulated, and the loss scale of float16."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from hrm_ray.model.config import FORWARD_DTYPES, ForwardDtype
from hrm_ray.settings.memory import AmpDtype, MemorySettings, ModelDtype

NARROW: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The numeric types of a pass."""

    autocast: torch.dtype | None = None
    """Type of matrix products under automatic mixed precision; None without it."""
    scaled: bool = False
    """Whether the loss is scaled, because something in the backward pass is float16."""

    def computing(self, device: torch.device) -> AbstractContextManager[None]:
        """The context of every forward pass on `device`."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)


def choose_precision(amp: bool, amp_dtype: AmpDtype, model_dtype: ModelDtype, device: torch.device) -> Precision:
    """The types that the settings choose on this device; `auto` is the type of narrow weights, else bfloat16 where the
    device computes in it, else float16."""
    narrow = model_dtype if amp_dtype == "auto" and model_dtype != "fp32" else amp_dtype
    if narrow == "auto":
        narrow = "bf16" if has_bfloat16(device) else "fp16"
    autocast = NARROW[narrow] if amp else None
    return Precision(autocast, scaled=autocast == torch.float16 or model_dtype == "fp16")


def sum_gradients_in_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Make the gradients of bfloat16 and float16 parameters float32 from the next backward pass on.

    A sum in bfloat16 keeps 8 bits at every addition: 64 gradients together have an error of about 0.8 %.
    """
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad_dtype != torch.float32:
            parameter.grad_dtype = torch.float32


def activation_dtype(memory: MemorySettings, device: torch.device) -> ForwardDtype:
    """Type of states and residuals on this device: `ModelConfig.forward_dtype` of the model that is trained.

    Like mixed precision it belongs to a run and a device; a bundle's own configuration knows the weights' type only.
    """
    if memory.model_dtype != "fp32":
        return FORWARD_DTYPES[memory.model_dtype]
    if memory.activations is not None:
        return FORWARD_DTYPES[memory.activations]
    if device.type != "cuda" or not torch.cuda.is_available():
        return "float32"
    autocast = choose_precision(memory.amp is True, memory.amp_dtype, memory.model_dtype, device).autocast
    return "bfloat16" if autocast == torch.bfloat16 else "float32"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16; every CPU does, some of them slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "mps"


def slow_bfloat16(device: torch.device) -> bool:
    """Whether the device is a CPU without bfloat16 units, on which mixed precision saves memory and costs time."""
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return not any(
        capabilities.get(unit, False) for unit in ("avx512_bf16", "amx_bf16", "amx_tile", "arm_bf16", "bf16")
    )


@dataclass
class LossScaler:
    """A scale of the loss that keeps small float16 gradients from vanishing: halved at an overflow, doubled after
    `growth_interval` updates without one.

    Source: Micikevicius et al. 2018, section 3.2; the constants are those of PyTorch's GradScaler.
    """

    # A power of two, so that dividing by it changes no digit.

    scale: float = 65536.0
    good_steps: int = 0
    growth_interval: int = 2000
    largest: float = 2.0**24

    def stepped(self) -> None:
        """To be called after an update with finite gradients."""
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.scale = min(self.scale * 2, self.largest)
            self.good_steps = 0

    def overflowed(self) -> bool:
        """To be called after gradients that were not finite; False where the scale cannot be lowered any further."""
        had_room = self.scale > 1
        self.scale = max(self.scale / 2, 1.0)
        self.good_steps = 0
        return had_room
