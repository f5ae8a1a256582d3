"""Telling that memory ran out, and cutting a step's rows smaller.

One job: recognise the error whatever device raised it, give back what the failed pass held, and cut micro-batches. When
to try again is the loop's.
"""

from __future__ import annotations

import gc

import numpy as np
import torch

from hrm_ray.errors import Fault, ResourceError
from hrm_ray.types import Columns

_SAYS_SO = (
    "out of memory",
    "out_of_memory",
    "can't allocate memory",
    "bad_alloc",
    "not enough memory",
    "failed to allocate",
    "status_alloc_failed",
)
"""PyTorch's words on several devices, C++'s, and those of cuBLAS and cuDNN, which allocate when they are first used."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a device's or the machine's way to say that an allocation failed.

    On the CPU PyTorch raises a plain RuntimeError, so its words have to do.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAYS_SO)


def release(device: torch.device) -> None:
    """Give back what only the failed pass used; call it when its exception is gone, which holds its frames."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def halved(batch_size: int) -> int | None:
    """The next smaller micro-batch that cuts `batch_size` rows evenly: half of it where it is even; None below 1."""
    return max((part for part in range(1, batch_size // 2 + 1) if batch_size % part == 0), default=None)


def split_microbatches(columns: list[Columns], rows: int) -> list[Columns]:
    """The same rows in the same order, as micro-batches of `rows`."""
    joined = {name: np.concatenate([micro[name] for micro in columns]) for name in columns[0]}
    count = len(next(iter(joined.values())))
    return [{name: values[first : first + rows] for name, values in joined.items()} for first in range(0, count, rows)]


def too_large(where: str, doing: str) -> ResourceError:
    """What to raise where no smaller micro-batch can help."""
    return ResourceError(
        Fault(
            where,
            f"memory ran out {doing}",
            "Use a shorter --max-seq-len, --use-chunked-training, --gradient-checkpointing, --use-8bit-optimizer or a "
            "smaller model",
        )
    )
