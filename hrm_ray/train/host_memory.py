"""How this process's C library treats memory that tensors on the CPU give back.

One job: whether freed memory is kept for the next tensor. Memory of an accelerator is PyTorch's own affair.
"""

from __future__ import annotations

import ctypes
import platform
import sys

# glibc's numbers of these parameters (malloc.h), and the largest value that mallopt takes.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1
_OWN_MAPPING_BYTES = 2**20
"""From here on a tensor gets pages of its own, which go back to the system with it. Smaller ones are too little to
matter, and half of a step's allocations."""


def keep_freed_memory(keep: bool) -> bool:
    """Let glibc keep what tensors give back for the next ones, or give it back to the system; says whether it heeds it.

    Kept memory makes a CPU step faster: a page that is given back and taken again costs a page fault, in all 5 to 40 %
    of a step, the more the smaller the model. The price is memory: the kept pieces lie scattered between what is alive,
    and a new tensor often fits none of them, because an aligned one asks for a little more than the last one of its
    size left. A process then takes 1.2 to 2.7 times what its tensors need. Given back, it takes what they need, to a
    few percent. Other C libraries are left as they are.
    """
    if not malloc_is_tunable():
        return False
    library = ctypes.CDLL(None)
    value = _LARGEST if keep else _OWN_MAPPING_BYTES
    taken = [library.mallopt(name, value) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return all(taken)


def malloc_is_tunable() -> bool:
    """Whether the C library of this process is one that can be told."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
