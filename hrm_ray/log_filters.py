"""What libraries tell on stderr that says nothing to a user of this package.

One job: leave such messages out of the log; everything else that a library says still comes through.
"""

from __future__ import annotations

import logging

_CPU_KERNELS = "bitsandbytes.backends.cpu.ops"
"""The logger of bitsandbytes' module for CPUs."""
_UNUSED_KERNEL = "Failed to load CPU gemm_4bit_forward"
"""Begins what it says when it is imported without the package `kernels`, on CPUs with bfloat16 units: products with
4-bit weights could be faster. Here such weights are widened and then multiplied as any others, so that kernel would
never be called."""


def silence_unused_kernels() -> None:
    """To be called before bitsandbytes, or peft, which imports it, is; calling it again changes nothing."""
    logging.getLogger(_CPU_KERNELS).addFilter(_tells_something)


def _tells_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_UNUSED_KERNEL)
