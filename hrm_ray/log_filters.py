"""Log filters for messages of libraries that do not concern a user of this package."""

from __future__ import annotations

import logging

_CPU_KERNELS = "bitsandbytes.backends.cpu.ops"
"""The logger of bitsandbytes' module for CPUs."""
_UNUSED_KERNEL = "Failed to load CPU gemm_4bit_forward"
"""Beginning of its warning when it is imported without the package `kernels`, on CPUs with bfloat16 units. Here 4-bit
weights are dequantised before the product, so that kernel would never be called."""


def silence_unused_kernels() -> None:
    """Call this before importing bitsandbytes, or peft, which imports it; calling it again changes nothing."""
    logging.getLogger(_CPU_KERNELS).addFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_UNUSED_KERNEL)
