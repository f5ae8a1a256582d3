"""Out of memory: recognising the error of any device, freeing memory, and splitting micro-batches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from hrm_ray.errors import DeviceMemoryError, Fault, HostMemoryError, ResourceError
from hrm_ray.types import Columns

T = TypeVar("T")

_PHRASES = (
    "out of memory",
    "out_of_memory",
    "can't allocate memory",
    "bad_alloc",
    "not enough memory",
    "failed to allocate",
    "can't start new thread",
    "status_alloc_failed",
)
"""In messages of PyTorch on several devices, of C++, of cuBLAS and cuDNN, which allocate at their first use, and of
Python where a thread's stack does not fit into --memory-budget."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed, on a device or in host memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # On the CPU PyTorch raises a plain RuntimeError: only its message tells.
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)


@contextmanager
def reading_data(what: str) -> Iterator[None]:
    """Out of memory while reading `what` is an error of the data or the host, never a reason for smaller micro-batches.

    Raises ResourceError for it, which the handlers round the passes let through.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = " ".join(str(error).split())[:120]
        reason = f"host memory ran out while reading the data ({message or type(error).__name__})"
        hint = "Free host memory, use a smaller --shuffle-buffer-size or a larger object store, then --resume"
        raise HostMemoryError(Fault(what, reason, hint)) from error


def unless_out_of_memory(run: Callable[[], T], device: torch.device) -> T | None:
    """The result of `run`, or None if it ran out of memory, after freeing what it used."""
    try:
        return run()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the `except` block: the exception's traceback holds the frames, and with them the tensors.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def split_microbatches(columns: list[Columns], rows: int) -> list[Columns]:
    """The same rows in the same order, as micro-batches of `rows`."""
    joined = {name: np.concatenate([micro[name] for micro in columns]) for name in columns[0]}
    count = len(next(iter(joined.values())))
    return [{name: values[first : first + rows] for name, values in joined.items()} for first in range(0, count, rows)]


def needs_restart(where: str, rows: int) -> DeviceMemoryError:
    """The error if smaller micro-batches can help, and the step cannot be repeated with them."""
    return DeviceMemoryError(
        Fault(
            where,
            f"out of memory with a micro-batch of {rows}, and this --strategy cannot repeat a step",
            "--resume with a smaller --batch-size and as much more --gradient-accumulation-steps, or with --strategy "
            "sharded-optimizer",
        )
    )


def too_large(where: str, doing: str) -> ResourceError:
    """The error if no smaller micro-batch can help."""
    return ResourceError(
        Fault(
            where,
            f"out of memory {doing}",
            "Use a shorter --max-seq-len, --use-chunked-training, --gradient-checkpointing, --use-8bit-optimizer or a "
            "smaller model",
        )
    )
