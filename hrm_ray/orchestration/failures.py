"""Chooses the one error that a failed worker group is reported as: the first cause, from the reports of ranks and
Ray."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayTaskError

from hrm_ray.errors import ERROR_KINDS, DiskError, Fault, HostMemoryError, HrmRayError, ResourceError
from hrm_ray.launch import restarts
from hrm_ray.launch.restarts import Cause

PEER_LOSS_MARKS = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "unhandled system error",
)
"""Texts in errors of torch.distributed (gloo, NCCL) after another rank is gone. Such an error is the first cause only
where no rank has another."""

RESUME_HINT = (
    "Saved checkpoints are kept: remove the cause and run the same command with --resume, "
    "or under another --brain-name where none was saved"
)
_MEMORY_HINT = "Use a smaller --batch-size or fewer workers, or end other programs; with --resume the run continues"
_SHORTAGES: tuple[tuple[type[Exception], type[ResourceError], str, str, str], ...] = (
    (
        OutOfMemoryError,
        HostMemoryError,
        "memory",
        "Ray ended a process because its machine was nearly out of memory",
        _MEMORY_HINT,
    ),
    (
        ObjectStoreFullError,
        HostMemoryError,
        "Ray's object store",
        "is full",
        "Use a smaller --dataset-chunk-size, then --resume",
    ),
    (
        OutOfDiskError,
        DiskError,
        "Ray's object store",
        "is full, and so is the disk it spills to",
        "Free disk space, then --resume",
    ),
)
NODE_DEATH = "node has died"
"""Part of Ray's message on an actor whose node is gone."""
MEMORY_DEATH = "OUT_OF_MEMORY"
"""Part of the exit type that Ray gives an actor which its memory monitor has killed."""
_LOW_ON_MEMORY = "running low on memory"
"""Part of the message where Ray Train finds that such an actor does not answer, which names no exit type."""
LONGEST_DEATH_REASON = 400
"""Characters of Ray's own message that are shown."""


class WorkerCrash(HrmRayError):
    """A training worker failed unexpectedly (exit code 1); `detail` is its traceback, or where its logs are."""

    def __init__(self, fault: Fault, detail: str = "", cause: Cause = Cause.CRASH) -> None:
        super().__init__(fault)
        self.detail = detail
        self.cause = cause

    def __reduce__(self) -> tuple[type[WorkerCrash], tuple[Fault, str, Cause]]:
        return type(self), (self.faults[0], self.detail, self.cause)

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.detail}".rstrip()


@dataclass(frozen=True)
class Failure:
    """How a rank failed: the kind of its error, its faults where the error is expected, its traceback."""

    rank: int
    kind: str
    message: str
    trace: str
    faults: tuple[Fault, ...] = ()
    expected: bool = False
    peer_loss: bool = False
    cause: Cause = Cause.CRASH

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Describe `error` in plain values: its class may not exist in another process."""
        error = shortage(error) or error
        message = str(error)
        return cls(
            rank=rank,
            kind=type(error).__name__,
            message=message,
            trace="".join(traceback.format_exception(error)),
            faults=error.faults if isinstance(error, HrmRayError) else (),
            expected=isinstance(error, HrmRayError),
            peer_loss=isinstance(error, (RuntimeError, OSError)) and any(mark in message for mark in PEER_LOSS_MARKS),
            cause=cause_of(error) if isinstance(error, HrmRayError) else Cause.CRASH,
        )

    def as_error(self) -> HrmRayError:
        """The error to raise in the driver: the same kind with the same faults, or WorkerCrash with the traceback."""
        if self.kind == WorkerCrash.__name__:
            return WorkerCrash(self.faults[0], self.trace, self.cause)
        if self.expected:
            return ERROR_KINDS.get(self.kind, HrmRayError)(self.faults)
        headline = self.message.strip().splitlines()[0] if self.message.strip() else "no message"
        return WorkerCrash(
            Fault(f"worker {self.rank}", f"ended with {self.kind}: {headline}".rstrip("."), RESUME_HINT), self.trace
        )


def shortage(error: BaseException) -> ResourceError | None:
    """The error for memory or disk that Ray ran out of; None where `error` has another cause.

    Without it Ray's message, "out of memory", would be taken for a batch that does not fit on the device.
    """
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    for kind, ours, value, reason, hint in _SHORTAGES:
        if isinstance(error, kind):
            return ours(Fault(value, reason, hint))
    return None


def cause_of(error: HrmRayError) -> Cause:
    """The cause of an attempt's end, from the error that stands for it."""
    return error.cause if isinstance(error, WorkerCrash) else restarts.cause_of(error)


def actor_lost(doing: str, detail: str, silent_s: float | None = None) -> WorkerCrash:
    """The error where an actor of the run is dead, or has not answered for `silent_s`; `doing` says which."""
    reason = "its process was ended from outside" if silent_s is None else f"did not answer for {silent_s:.0f} s"
    return WorkerCrash(Fault(doing, reason, RESUME_HINT), detail, Cause.ACTOR_LOST)


def death_reason(ray_message: str) -> str:
    """The informative part of Ray's message about a dead actor, on one line."""
    text = " ".join(ray_message.split())
    if NODE_DEATH in text:
        return NODE_DEATH
    if _LOW_ON_MEMORY in text:
        return f"exit type NODE_{MEMORY_DEATH}"
    _, found, detail = text.partition("Worker exit type:")
    detail = f"exit type{detail}" if found else text
    return detail.partition("Some common causes include")[0].strip().rstrip(".")[:LONGEST_DEATH_REASON]


def first_cause(reports: Sequence[Failure], lost: Mapping[int, str], logs: str) -> HrmRayError | None:
    """The one error that stands for the whole failure; None where nothing failed.

    `reports` are in order of arrival. `lost` gives Ray's message for each rank that died without a report; `logs` says
    where the workers' output is. A rank's own error comes first, then a death without a report, then failed
    collectives, which only follow from the end of another rank.
    """
    own = [report for report in reports if not report.peer_loss]
    if own:
        return own[0].as_error()
    silent = sorted(lost.keys() - {report.rank for report in reports})
    if silent:
        name = "worker " + " and ".join(str(rank) for rank in silent)
        message = lost[silent[0]]
        if MEMORY_DEATH in message:
            return HostMemoryError(Fault(name, "was killed because its machine was nearly out of memory", _MEMORY_HINT))
        if any(NODE_DEATH in lost[rank] for rank in silent):
            return WorkerCrash(Fault(name, "its machine is lost", RESUME_HINT), logs, Cause.NODE_LOST)
        reason = "the process died without an error (killed, or crashed in native code)"
        return WorkerCrash(Fault(name, reason, RESUME_HINT), f"{message}\n{logs}", Cause.WORKER_LOST)
    return reports[0].as_error() if reports else None
