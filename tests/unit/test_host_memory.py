"""Freed memory is kept for the next tensor: fewer page faults, measured in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from hrm_ray.train.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory(True)
def use():
    torch.ones(12_000_000).mul(2)
for _ in range(10):  # until the heap has the size it needs
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_a_step_faults_no_page_twice() -> None:
    """Ten rounds of two 48 MB tensors: mapped anew they fault in every round, kept they do not.

    10 % slack: the heap may still grow a little.
    """
    faults = {}
    for how in ("kept", "given back"):
        run = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
        faults[how] = int(run.stdout)
    assert faults["given back"] > 1000
    assert faults["kept"] <= 0.1 * faults["given back"]
