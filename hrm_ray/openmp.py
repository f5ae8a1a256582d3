"""Limits how long OpenMP threads spin while they wait for work; set before torch is loaded, here and in Ray workers.

GNU OpenMP's default is to spin for milliseconds: the threads of the forward pass do so while those of the backward pass
work. With one busy neighbour on two cores a step of a small model took seventeen times as long (4.6 s against 0.27 s).
A thousand spins cost nothing on an idle machine.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPIN_VARIABLE = "GOMP_SPINCOUNT"
SPIN_COUNT = "1000"


def limit_openmp_spin(environment: MutableMapping[str, str]) -> None:
    """Set the variable, unless the user has set it or OMP_WAIT_POLICY."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault(SPIN_VARIABLE, SPIN_COUNT)
