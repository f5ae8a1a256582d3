"""Calls between processes of one run: a local socket with a key, and values that pickle.

The process that serves answers each call in turn; an expected error of it is raised where the call was made.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from hrm_ray.errors import ERROR_KINDS, Fault, HrmRayError, unreadable_if_away
from hrm_ray.independent.calls import Claim, Joined, Progress, Renewed, Report, Reported
from hrm_ray.ledger import Lease, Refused

FAILED = "failed"
"""The last thing that a process says which ends because of an error."""
BEGIN = "begin"
"""What a trainer waits for when it is connected: the first anchor is there."""


class Disconnected(Exception):
    """The other process is gone."""


def call(connection: Connection, name: str, *arguments: Any) -> Any:
    """Make a call and return its answer. Raises Disconnected, or the HrmRayError of the other side."""
    try:
        connection.send((name, arguments))
        return answer(connection)
    except (EOFError, OSError) as error:
        raise Disconnected from error


def answer(connection: Connection) -> Any:
    """The answer to a call that was sent. Raises the HrmRayError of the other side, EOFError where it is gone."""
    kind, value = connection.recv()
    if kind == FAILED:
        raise unpacked(value[0])
    if kind == "error":
        raise unpacked(value)
    return value


def serve_one(connection: Connection, methods: Mapping[str, Callable[..., Any]]) -> None:
    """Take one call and answer it, with an error where it fails. Raises EOFError or OSError where the other process is
    gone."""
    name, arguments = connection.recv()
    try:
        value = methods[name](*arguments)
    except Exception as error:  # noqa: BLE001 - the process's edge: the caller waits for an answer, whatever it is
        connection.send(("error", packed(expected(error))))
    else:
        connection.send(("ok", value))


def expected(error: Exception) -> HrmRayError:
    """An error as one of this package's own; of any other the traceback is kept as its detail."""
    if isinstance(error, HrmRayError):
        return unreadable_if_away(error)
    known = HrmRayError(Fault(type(error).__name__, str(error)[:200] or "an unexpected error", ""))
    known.detail = "".join(traceback.format_exception(error))
    return known


def packed(error: HrmRayError) -> tuple[str, tuple[tuple[str, str, str], ...], str]:
    """An error in plain values."""
    faults = tuple((fault.value, fault.reason, fault.hint) for fault in error.faults)
    return type(error).__name__, faults, error.detail


def unpacked(plain: tuple[str, Sequence[tuple[str, str, str]], str]) -> HrmRayError:
    """The error that was packed."""
    name, faults, detail = plain
    error = ERROR_KINDS.get(name, HrmRayError)([Fault(*fault) for fault in faults])
    error.detail = detail
    return error


class RemoteCoordinator:
    """`calls.Coordinator` over a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def join(self, trainer: str) -> Joined | Refused:
        answered: Joined | Refused = call(self._connection, "join", trainer)
        return answered

    def claim(self, trainer: str, generation: int, key: str, origin: str) -> Claim:
        answered: Claim = call(self._connection, "claim", trainer, generation, key, origin)
        return answered

    def measure(self, lease: Lease, sequences: int) -> Lease | Refused:
        answered: Lease | Refused = call(self._connection, "measure", lease, sequences)
        return answered

    def renew(self, trainer: str, generation: int, leases: Sequence[Lease], progress: Progress) -> Renewed | Refused:
        answered: Renewed | Refused = call(self._connection, "renew", trainer, generation, tuple(leases), progress)
        return answered

    def report(self, report: Report) -> Reported | Refused:
        answered: Reported | Refused = call(self._connection, "report", report)
        return answered

    def release(self, lease: Lease) -> Refused | None:
        answered: Refused | None = call(self._connection, "release", lease)
        return answered

    def leave(self, trainer: str, generation: int, failure: str | None = None) -> None:
        call(self._connection, "leave", trainer, generation, failure)
