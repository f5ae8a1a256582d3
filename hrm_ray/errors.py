"""The errors that this package raises on purpose, each with its exit code.

A message consists of faults; each says the value, the reason and a hint.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of writing to a full disk, past a quota, or past the largest file size."""

AWAY_ERRNOS = frozenset(
    number
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
        *("ENETRESET", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EREMOTEIO", "ENODEV", "ENXIO"),
    )
    if (number := vars(errno).get(name)) is not None
)
"""Errors of a disk or network file system that does not answer, and may answer again soon. Windows lacks some."""


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


class DiskError(ResourceError):
    """A file of the run cannot be written: the disk is full, or does not answer."""


class DeviceMemoryError(ResourceError):
    """An update ran out of memory where it cannot be repeated with smaller micro-batches in the same process."""


class HostMemoryError(ResourceError):
    """The memory of a machine ran out, and a process was ended for it."""


class NoRoomError(ResourceError):
    """The workers found no room on a cluster that has it, because others use it."""


class DataError(HrmRayError):
    """Data, a bundle or a checkpoint that cannot be read (exit code 5)."""

    exit_code = 5


class UnreadableError(DataError):
    """A file cannot be read because its disk or network file system does not answer."""


class DivergedError(HrmRayError):
    """Training stopped because its numbers are no longer finite (exit code 6)."""

    exit_code = 6


ERROR_KINDS: dict[str, type[HrmRayError]] = {
    kind.__name__: kind
    for kind in (
        *(SettingsError, UnavailableError, ResourceError, DiskError, DeviceMemoryError, HostMemoryError),
        NoRoomError,
        *(DataError, UnreadableError, DivergedError),
    )
}
"""By name, to rebuild an error that another process sent."""


def away(error: BaseException) -> bool:
    """Whether `error`, or one that it came from, says that a disk or network file system does not answer."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in AWAY_ERRNOS:
            return True
        found = found.__cause__ or found.__context__
    return False


def unreadable_if_away(error: HrmRayError) -> HrmRayError:
    """`error`, as UnreadableError where it is a DataError because of a file system that does not answer.

    Called in the process where it was raised: an error that another process sent has lost where it came from.
    """
    if type(error) is DataError and away(error):
        return UnreadableError(error.faults)
    return error
