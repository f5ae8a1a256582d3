"""How this process's C library treats memory that tensors on the CPU give back.

One job: keep freed memory for the next tensor. Memory of an accelerator is PyTorch's own affair.
"""

from __future__ import annotations

import ctypes
import platform
import sys

# glibc's numbers of these parameters (malloc.h), and the largest value that mallopt takes.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of giving it back to the system; says whether it will.

    By default a tensor of 32 MB or more is mapped anew each time and what is freed at the heap's end is given back, so
    that every step takes page faults for the same memory: 5 to 12 % of a CPU step. Kept memory counts as resident
    until the process ends, up to its own peak. Other C libraries are left as they are.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    taken = [library.mallopt(name, _LARGEST) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return all(taken)
