"""Compiles blocks with torch.compile: what prevents it, and the compiled functions that blocks call.

A dense block over whole rows is compiled as one function, other blocks in the parts around attention and experts; each
function serves all blocks of a model. Weights are inputs of the functions, so the state dict keeps its names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from hrm_ray.errors import Fault, UnavailableError
from hrm_ray.model.layers import Attention, Block
from hrm_ray.settings.tree import RunSettings

BACKEND = "inductor"
"""Backend of torch.compile; tests take one that needs no compiler."""
RECOMPILE_LIMIT = 64
"""Variants of a function: gradient mode x shape x what needs gradient. PyTorch's limit of 8 would let a run whose
micro-batches were halved three times fall back to eager."""
_COMPILERS = {"cuda": ("cc", "gcc", "clang"), "cpu": ("g++", "clang++", "cl")}
_COMPILER_VARIABLES = {"cuda": "CC", "cpu": "CXX"}


class CompiledCalls:
    """Calls compiled functions instead of eager ones. If compiling fails, all later calls are eager."""

    def __init__(self, *, strict: bool) -> None:
        # Takes a second to import, which a run without it need not wait for.
        from torch._dynamo.exc import TorchDynamoException
        from torch._dynamo.utils import counters

        self._strict = strict
        self._errors = TorchDynamoException
        self._counted: Mapping[str, int] = counters["stats"]
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._graphs_before = self._graphs_of_process()
        self.failure: str | None = None
        """Why nothing is compiled any more."""
        self._notes: list[str] = []

    @property
    def graphs(self) -> int:
        """Graphs compiled since this was made; where it grows step after step, something changes with each step."""
        return self._graphs_of_process() - self._graphs_before

    def take_notes(self) -> list[str]:
        """Notes for the user since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def _graphs_of_process(self) -> int:
        return self._counted.get("unique_graphs", 0)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.failure is not None:
            return function(*args)
        if function not in self._compiled:
            # dynamic=False: a graph for each shape is faster, and there are few shapes.
            self._compiled[function] = torch.compile(function, backend=BACKEND, dynamic=False)
        try:
            return self._compiled[function](*args)
        except self._errors as error:
            reason = error.__cause__ or error.__context__
            if isinstance(reason, torch.OutOfMemoryError):
                # A smaller micro-batch may help; the loop tries one.
                raise reason from None
            self.failure = " ".join(str(error).split("\n")[:2])[:150]
            if self._strict:
                raise UnavailableError(Fault("--compile", self.failure, "Give --no-compile")) from error
            self._notes.append(f"--compile failed ({self.failure}); blocks run eagerly, with the same results.")
        return function(*args)


def compile_blocks(model: nn.Module, *, strict: bool) -> CompiledCalls:
    """Let the blocks of `model` call compiled functions; they are compiled at their first call."""
    from torch._dynamo import config

    # Of the process: torch 2.10 has no limit of a function's own.
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    calls = CompiledCalls(strict=strict)
    for module in model.modules():
        if isinstance(module, Block | Attention):
            module.call = calls
    return calls


def recompile_limit_restored(settings: RunSettings, device: torch.device) -> AbstractContextManager[Any]:
    """A context that ends with PyTorch's limit as it began; a run without compiled blocks does not import the
    compiler."""
    if not compiles(settings, device):
        return nullcontext()
    from torch._dynamo import config

    return config.patch(recompile_limit=config.recompile_limit)


def compiles(settings: RunSettings, device: torch.device) -> bool:
    """Whether blocks are compiled on this device."""
    asked = settings.cluster.compile
    if asked is None:
        asked = device.type == "cuda"
    return asked and compile_obstacle(settings, device) is None


def compile_obstacle(settings: RunSettings, device: torch.device) -> str | None:
    """Why blocks cannot be compiled; None where they can."""
    if device.type not in _COMPILERS:
        return f"compiled blocks are tested on CUDA and CPU, and this device is {device.type}"
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "Triton is not installed"
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (7, 0):
            return "Triton needs a GPU of compute capability 7.0 or newer"
    named = os.environ.get(_COMPILER_VARIABLES[device.type])
    if BACKEND == "inductor" and not any(map(shutil.which, (named,) if named else _COMPILERS[device.type])):
        return f"no compiler found ({', '.join(_COMPILERS[device.type])} or ${_COMPILER_VARIABLES[device.type]})"
    if settings.memory.load_in_8bit or settings.memory.load_in_4bit:
        return "layers in 8 or 4 bits are not compiled"
    if settings.cluster.strategy in ("zero3", "fsdp"):
        return f"{settings.cluster.strategy} gathers the weights of each module with hooks, which are not compiled"
    if settings.adapt.use_peft and settings.adapt.lora_dropout > 0:
        return "adapters with dropout are not compiled (--lora-dropout 0)"
    return None


def compile_notes(settings: RunSettings, device: torch.device) -> list[str]:
    """Notes for the user: --compile cannot be used, or experts stay eager. Raises UnavailableError under --strict."""
    reason = compile_obstacle(settings, device) if settings.cluster.compile else None
    if reason is not None:
        if settings.cluster.strict:
            raise UnavailableError(Fault("--compile", reason, "Leave --compile out"))
        return [f"--compile: {reason}; blocks run eagerly, with the same results."]
    if settings.cluster.compile and settings.model.use_moe:
        return ["--compile: experts run eagerly, the rest of each block is compiled."]
    return []
