"""How long OpenMP's threads spin while they wait for work.

By default the threads of the forward pass spin for milliseconds while those of the backward pass work: with one busy
neighbour on two cores, a step of a small model took seventeen times as long (4.6 s against 0.27 s). A spin count of
1000 costs nothing on an idle machine. torch reads the variable when it is loaded, so it must be set before.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPIN_VARIABLE = "GOMP_SPINCOUNT"
SPIN_COUNT = "1000"


def limit_openmp_spin(environment: MutableMapping[str, str]) -> None:
    """Set the variable, unless the user has set it or OpenMP's own policy for waiting."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault(SPIN_VARIABLE, SPIN_COUNT)
