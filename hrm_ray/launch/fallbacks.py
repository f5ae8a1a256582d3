"""Fallbacks for memory and adapter options that the installed libraries or the device do not support.

Each fallback is a note for the user; under --strict, and where there is no substitute, the run is refused instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch

from hrm_ray.errors import Fault, SettingsError, UnavailableError
from hrm_ray.log_filters import silence_unused_kernels
from hrm_ray.settings.needs import NoEffect
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.host_memory import malloc_is_tunable


def settle_memory_options(
    settings: RunSettings, device: str, trained: Mapping[str, Any] = MappingProxyType({})
) -> tuple[RunSettings, list[str]]:
    """The settings with what `device` supports, and a note for each option that falls back.

    `trained` are the leaves, by dotted key, that the run to resume was trained with; a new run has none. What its
    checkpoint is made of cannot fall back. Raises UnavailableError for a missing library, and UnavailableError or
    SettingsError under --strict.
    """
    silence_unused_kernels()
    notes: list[str] = []
    if settings.optimizer.use_8bit_optimizer:
        settings = _eight_bits(settings, device, notes, needed=trained.get("optimizer.use_8bit_optimizer") is True)
    if settings.memory.load_in_4bit:
        _check_library("bitsandbytes", "--load-in-4bit", needed=trained.get("memory.load_in_4bit") is True)
    if settings.adapt.use_peft:
        _check_library("peft", "--use-peft", needed=trained.get("adapt.use_peft") is True)
        _random_base(settings, notes)
    return settings, notes


def without_effect_on(settings: RunSettings, device: str) -> list[NoEffect]:
    """The options on memory and GPUs that the user gave and that change nothing on this device.

    Raises SettingsError for --cpu-offload on a device that could be relieved but is not: memory was to be saved.
    """
    memory, given = settings.memory, settings.given
    found: list[NoEffect] = []
    if memory.optimizer_offload and "memory.optimizer_offload" in given and device == "cpu":
        reason = "on the CPU the optimizer's state is in host memory anyway"
        found.append(NoEffect("--optimizer-offload", reason))
    if memory.use_chunked_training and memory.cpu_offload and "memory.cpu_offload" in given and device != "cuda":
        if device != "cpu":
            reason = f"chunks are moved to host memory from CUDA devices only, not from {device}"
            raise SettingsError(Fault("--cpu-offload", reason, "Leave it out, or train on a GPU with CUDA"))
        found.append(NoEffect("--cpu-offload", "on the CPU what is kept between chunks is in host memory anyway"))
    share = settings.cluster.gpu_share
    if (
        share is not None
        and "cluster.gpu_share" in given
        and settings.cluster.parallel_independent
        and device != "cuda"
    ):
        found.append(NoEffect(f"--gpu-share {share:g}", f"the trainers are on {device}, and share no GPU"))
    keep = memory.keep_freed_memory
    if keep is not None and "memory.keep_freed_memory" in given and not (device == "cpu" and malloc_is_tunable()):
        reason = "this C library, which is not glibc, decides"
        reason = reason if device == "cpu" else f"memory of {device} is always kept"
        found.append(NoEffect("--keep-freed-memory" if keep else "--no-keep-freed-memory", reason))
    return found


def _check_library(name: str, option: str, *, needed: bool) -> None:
    """Raises UnavailableError unless the library can be imported. `needed`: the checkpoint needs it in any case."""
    try:
        import_module(name)
    except ImportError as error:
        missing = f"{name} is not installed here ({error})"
        if needed:
            raise _needed_by_the_checkpoint(option, missing, name) from None
        hint = f"Install it (pip install {name}), or leave {option} out"
        raise UnavailableError(Fault(option, missing, hint)) from None


def _needed_by_the_checkpoint(option: str, reason: str, library: str) -> UnavailableError:
    hint = f"Install {library} (pip install {library}), or resume where it is"
    return UnavailableError(Fault(option, f"the run to resume was trained with it, and {reason}", hint))


def _random_base(settings: RunSettings, notes: list[str]) -> None:
    """A note on adapters over random weights: possible, but hardly what is wanted."""
    if settings.model.student_init is not None:
        return
    reason = "without --student-init the weights that it freezes are random, and only heads and adapters learn"
    if settings.cluster.strict:
        raise SettingsError(Fault("--use-peft", reason, "Give --student-init the weights to adapt"))
    notes.append(f"--use-peft: {reason}.")


def _eight_bits(settings: RunSettings, device: str, notes: list[str], *, needed: bool) -> RunSettings:
    """`needed`: the moments of the checkpoint are in 8 bits, which no other optimizer can load."""
    reason = why_no_eight_bits(device)
    if reason is None:
        return settings
    if needed:
        raise _needed_by_the_checkpoint("--use-8bit-optimizer", reason, "bitsandbytes")
    if settings.cluster.strict:
        hint = "Install a bitsandbytes that has it, or leave --use-8bit-optimizer out"
        raise UnavailableError(Fault("--use-8bit-optimizer", reason, hint))
    notes.append(f"--use-8bit-optimizer: {reason}; plain AdamW is used instead, with moments in 32 bits.")
    optimizer = settings.optimizer.model_copy(update={"use_8bit_optimizer": False})
    return settings.model_copy(update={"optimizer": optimizer})


def why_no_eight_bits(device: str) -> str | None:
    """Why bitsandbytes' 8-bit AdamW does not work on this kind of device; None if it does.

    A small update is tried, since not every version computes it on every device. CUDA is what the library is made for,
    and the driver takes no GPU memory.
    """
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        return f"bitsandbytes is not installed here ({error})"
    if device == "cuda":
        return None
    weight = torch.nn.Parameter(torch.zeros(4096, device=device))
    weight.grad = torch.zeros_like(weight)
    try:
        AdamW8bit([weight]).step()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return f"this bitsandbytes has no 8-bit AdamW on {device} ({str(error).splitlines()[0]})"
    return None
