"""What this package raises on purpose, each with the exit code a shell sees.

One job: name the kinds of failure and carry a message for a person. It does not print, log or exit.
Every message says the value, the reason and the mend; `Fault` keeps the three apart.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What writing to a full disk, past a quota or past the largest file fails with."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: the offending value, why it cannot be used, and what to do instead."""

    value: str
    reason: str
    hint: str

    def __str__(self) -> str:
        return f"{self.value}: {self.reason}. {self.hint}."


class HrmRayError(Exception):
    """Base of all expected failures; `exit_code` is what the process ends with.

    Built from one or more faults, so that everything wrong is told at once. Survives pickling, because
    errors travel from workers to the driver.
    """

    exit_code = 1

    def __init__(self, faults: Fault | Sequence[Fault]) -> None:
        self.faults: tuple[Fault, ...] = (faults,) if isinstance(faults, Fault) else tuple(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


class SettingsError(HrmRayError):
    """Usage or settings that cannot be honoured (exit code 2)."""

    exit_code = 2


class UnavailableError(HrmRayError):
    """A needed library or device is missing (exit code 3)."""

    exit_code = 3


class ResourceError(HrmRayError):
    """Not enough CPUs, GPUs, memory or disk (exit code 4)."""

    exit_code = 4


class DataError(HrmRayError):
    """Data, a bundle or a checkpoint that cannot be read as what it should be (exit code 5)."""

    exit_code = 5


class DivergedError(HrmRayError):
    """Training stopped because its numbers ceased to be finite (exit code 6)."""

    exit_code = 6


ERROR_KINDS: dict[str, type[HrmRayError]] = {
    kind.__name__: kind for kind in (SettingsError, UnavailableError, ResourceError, DataError, DivergedError)
}
"""By name, for rebuilding an error that was sent from another process."""
