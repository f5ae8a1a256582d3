"""How long OpenMP's threads spin while they wait for work.

One job: the variable and its value. It is read when torch is loaded, so the command line sets it first of all, and
Ray workers are started with it.

By default GNU OpenMP spins for milliseconds, the threads of the forward pass while those of the backward pass work:
with one busy neighbour on two cores a step of a small model took seventeen times as long (4.6 s against 0.27 s). A
thousand turns cost nothing on a quiet machine.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPIN_VARIABLE = "GOMP_SPINCOUNT"
SPIN_COUNT = "1000"


def limit_openmp_spin(environment: MutableMapping[str, str]) -> None:
    """Set the variable, unless the user has set it or OpenMP's own policy for waiting."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault(SPIN_VARIABLE, SPIN_COUNT)
