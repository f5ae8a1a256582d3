"""Calls between processes of one run: a local socket with a key, and values that pickle.

The process that serves answers each call in turn; an expected error of it is raised where the call was made.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from hrm_ray.errors import ERROR_KINDS, Fault, HrmRayError, unreadable_if_away
from hrm_ray.independent.bundle_files import Call
from hrm_ray.independent.calls import Claim, Coordinator, Joined, Progress, Renewed, Report, Reported
from hrm_ray.ledger import Lease, Refused

FAILED = "failed"
"""The last thing that a process says which ends because of an error."""
BEGIN = "begin"
"""What a trainer waits for when it is connected: the first anchor is there."""
WORKING = "working"
"""What a process says while it works on a call that takes long."""
WORKING_EVERY_S = 5.0


class Disconnected(Exception):
    """The other process is gone, or says nothing any more; the argument, if any, says which."""


def call(connection: Connection, name: str, *arguments: Any) -> Any:
    """Make a call and return its answer. Raises Disconnected, or the HrmRayError of the other side."""
    try:
        connection.send((name, arguments))
        return answer(connection)
    except (EOFError, OSError) as error:
        raise Disconnected from error


def answer(connection: Connection) -> Any:
    """The answer to a call that was sent. Raises the HrmRayError of the other side, EOFError where it is gone."""
    return value_of(connection.recv())


def value_of(answered: tuple[str, Any]) -> Any:
    """The value that `answered` has packed. Raises the HrmRayError of the other side."""
    kind, value = answered
    if kind == FAILED:
        raise unpacked(value[0])
    if kind == "error":
        raise unpacked(value)
    return value


def serve_one(connection: Connection, methods: Mapping[str, Callable[..., Any]]) -> None:
    """Take one call and answer it, with an error where it fails. Raises EOFError or OSError where the other process is
    gone."""
    name, arguments = connection.recv()
    connection.send(answered(methods, name, arguments))


def serve_one_heard(connection: Connection, methods: Mapping[str, Callable[..., Any]]) -> None:
    """As `serve_one`; the caller hears meanwhile that the process is WORKING, so that it can tell when it is frozen."""
    name, arguments = connection.recv()
    done = threading.Event()

    def say() -> None:
        with suppress(OSError):  # whoever called is gone, which the answer finds out
            while not done.wait(WORKING_EVERY_S):
                connection.send((WORKING, None))

    thread = threading.Thread(target=say, name="working", daemon=True)
    thread.start()
    reply = answered(methods, name, arguments)
    done.set()
    thread.join()
    connection.send(reply)


def answered(methods: Mapping[str, Callable[..., Any]], name: str, arguments: Sequence[Any]) -> tuple[str, Any]:
    """What a call gives, with an error where it fails: plain values, which `value_of` takes."""
    try:
        return "ok", methods[name](*arguments)
    except Exception as error:  # noqa: BLE001 - the process's edge: the caller waits for an answer, whatever it is
        return "error", packed(expected(error))


def methods_of(coordinator: Coordinator) -> dict[str, Callable[..., Any]]:
    """The calls of a trainer, by their names."""
    return {
        "join": coordinator.join,
        "claim": coordinator.claim,
        "measure": coordinator.measure,
        "renew": coordinator.renew,
        "report": coordinator.report,
        "release": coordinator.release,
        "leave": coordinator.leave,
    }


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
    """`calls.Coordinator` in another process."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def join(self, trainer: str) -> Joined | Refused:
        answered: Joined | Refused = self._call("join", trainer)
        return answered

    def claim(self, trainer: str, generation: int, key: str, origin: str) -> Claim:
        answered: Claim = self._call("claim", trainer, generation, key, origin)
        return answered

    def measure(self, lease: Lease, sequences: int) -> Lease | Refused:
        answered: Lease | Refused = self._call("measure", lease, sequences)
        return answered

    def renew(self, trainer: str, generation: int, leases: Sequence[Lease], progress: Progress) -> Renewed | Refused:
        answered: Renewed | Refused = self._call("renew", trainer, generation, tuple(leases), progress)
        return answered

    def report(self, report: Report) -> Reported | Refused:
        answered: Reported | Refused = self._call("report", report)
        return answered

    def release(self, lease: Lease) -> Refused | None:
        answered: Refused | None = self._call("release", lease)
        return answered

    def leave(self, trainer: str, generation: int, failure: str | None = None) -> None:
        self._call("leave", trainer, generation, failure)
