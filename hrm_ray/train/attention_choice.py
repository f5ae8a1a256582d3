"""Chooses the attention kernel of a run, with a note if --use-flash-attn is not possible on its device."""

from __future__ import annotations

import torch

from hrm_ray.errors import Fault, UnavailableError
from hrm_ray.model.attention_backends import KernelCapabilities, KernelName, choose_kernel, flash_obstacle
from hrm_ray.model.config import ModelConfig
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.precision import activation_dtype, choose_precision


def kernel_of(settings: RunSettings, config: ModelConfig, device: torch.device) -> KernelName:
    """The kernel that the settings choose on this device."""
    return choose_kernel(settings.model.use_flash_attn, config, _place(settings, device))


def flash_notes(settings: RunSettings, config: ModelConfig, device: torch.device) -> list[str]:
    """A note if --use-flash-attn was given but is not possible. Raises UnavailableError under --strict."""
    if not settings.model.use_flash_attn:
        return []
    reason = flash_obstacle(config, _place(settings, device))
    if reason is None:
        return []
    if settings.cluster.strict:
        hint = "Leave it out: FlashAttention is used where it can be"
        raise UnavailableError(Fault("--use-flash-attn", reason, hint))
    return [f"--use-flash-attn: {reason}; PyTorch's own kernels are used instead, with the same results."]


def _place(settings: RunSettings, device: torch.device) -> KernelCapabilities:
    memory = settings.memory
    precision = choose_precision(memory.amp is True, memory.amp_dtype, memory.model_dtype, device)
    return KernelCapabilities.here(
        device.type, narrow=precision.autocast is not None or activation_dtype(memory, device) != "float32"
    )
