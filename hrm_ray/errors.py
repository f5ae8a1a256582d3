"""The errors that this package raises on purpose, each with its exit code.

A message consists of faults; each says the value, the reason and a hint.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of writing to a full disk, past a quota, or past the largest file size."""


@dataclass(frozen=True)
class Fault:
    """One fault: the value, the reason why it cannot be used, and a hint what to do instead, where the reason does not
    say it."""

    value: str
    reason: str
    hint: str

    def __str__(self) -> str:
        return f"{self.value}: {self.reason}." + (f" {self.hint}." if self.hint else "")


_LISTED, _LISTED_CHARACTERS = 10, 100
_NAME_CHARACTERS = 40


def listed(names: Iterable[str]) -> str:
    """The names in one line of a message: at most ten, long ones shortened, and the number of the others; "none" where
    there are no names."""
    shown: list[str] = []
    rest = 0
    for name in names:
        short = name if len(name) <= _NAME_CHARACTERS else name[: _NAME_CHARACTERS - 3] + "..."
        if rest or len(shown) == _LISTED or (shown and len(", ".join([*shown, short])) > _LISTED_CHARACTERS):
            rest += 1
        else:
            shown.append(short)
    return (", ".join(shown) or "none") + (f" and {rest:,} more" if rest else "")


class HrmRayError(Exception):
    """Base of all expected errors. It has one or more faults, so that everything wrong is reported at once."""

    exit_code = 1
    detail = ""
    """What to show once below the message, such as the traceback of a worker."""

    def __init__(self, faults: Fault | Sequence[Fault]) -> None:
        self.faults: tuple[Fault, ...] = (faults,) if isinstance(faults, Fault) else tuple(faults)
        super().__init__(self.faults)  # the only argument, so that pickling to the driver works

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


class SettingsError(HrmRayError):
    """Wrong usage or settings (exit code 2)."""

    exit_code = 2


class UnavailableError(HrmRayError):
    """A library or device that is needed is missing (exit code 3)."""

    exit_code = 3


class ResourceError(HrmRayError):
    """Not enough CPUs, GPUs, memory or disk (exit code 4)."""

    exit_code = 4


class DataError(HrmRayError):
    """Data, a bundle or a checkpoint that cannot be read (exit code 5)."""

    exit_code = 5


class DivergedError(HrmRayError):
    """Training stopped because its numbers are no longer finite (exit code 6)."""

    exit_code = 6


ERROR_KINDS: dict[str, type[HrmRayError]] = {
    kind.__name__: kind for kind in (SettingsError, UnavailableError, ResourceError, DataError, DivergedError)
}
"""By name, to rebuild an error that another process sent."""
