"""Decides what a failed worker group is reported as: one error, the first cause.

One job: turn what is known after a failure (reports of ranks, ranks that died without a word) into the one error
that the driver raises. Pure values and functions; does not talk to Ray or to processes.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hrm_ray.errors import ERROR_KINDS, Fault, HrmRayError
from hrm_ray.types import StopReason

PEER_LOSS_MARKS = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "unhandled system error",
)
"""Texts of torch.distributed (gloo, NCCL) that mean: another rank went away. Such an error is never the first cause
while another rank has a reason of its own."""


class WorkerCrash(HrmRayError):
    """A training worker failed in a way nobody foresaw (exit code 1); shows that worker's traceback once."""

    def __init__(self, fault: Fault, detail: str = "") -> None:
        super().__init__(fault)
        self.detail = detail

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.detail}".rstrip()


class StoppedBeforeStart(HrmRayError):
    """A stop was asked for before any worker had entered the training function; nothing was changed.

    The exit code is that of the reason: 75 for SIGTERM, 130 for Ctrl-C, 0 for a stop file.
    """

    def __init__(self, reason: StopReason) -> None:
        super().__init__(
            Fault(
                reason.value,
                "asked to stop before the workers had started, so nothing was trained or written",
                "Start the run again with the same command",
            )
        )
        self.reason = reason
        self.exit_code = reason.exit_code


@dataclass(frozen=True)
class Failure:
    """What a rank said before it ended: the kind of its error, its faults if it was an expected one, its traceback."""

    rank: int
    kind: str
    message: str
    trace: str
    faults: tuple[Fault, ...] = ()
    expected: bool = False
    peer_loss: bool = False

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Describe `error` so that it can cross processes without its class being picklable."""
        message = str(error)
        return cls(
            rank=rank,
            kind=type(error).__name__,
            message=message,
            trace="".join(traceback.format_exception(error)),
            faults=error.faults if isinstance(error, HrmRayError) else (),
            expected=isinstance(error, HrmRayError),
            peer_loss=isinstance(error, (RuntimeError, OSError)) and any(mark in message for mark in PEER_LOSS_MARKS),
        )

    def as_error(self) -> HrmRayError:
        """The error to raise at the driver: the same kind with the same faults, or the traceback once."""
        if self.expected:
            return ERROR_KINDS.get(self.kind, HrmRayError)(self.faults)
        headline = self.message.strip().splitlines()[0] if self.message.strip() else "no message"
        return WorkerCrash(
            Fault(f"worker {self.rank}", f"ended with {self.kind}: {headline}".rstrip("."), RESUME_HINT), self.trace
        )


LONGEST_ACCOUNT = 400
RESUME_HINT = (
    "A checkpoint that was saved is kept: mend the cause and run the same command with --resume, "
    "or under another --brain-name where none was saved"
)


def death_in_words(said_by_ray: str) -> str:
    """The informative part of Ray's account of a dead actor, on one line."""
    text = " ".join(said_by_ray.split())
    _, found, detail = text.partition("Worker exit type:")
    detail = f"exit type{detail}" if found else text
    return detail.partition("Some common causes include")[0].strip().rstrip(".")[:LONGEST_ACCOUNT]


def first_cause(reports: Sequence[Failure], lost: Mapping[int, str], logs: str) -> HrmRayError | None:
    """The one error that stands for the whole failure; None if nothing failed.

    `reports` in order of arrival; `lost` gives, for each rank that died without a report, what Ray knows about it;
    `logs` says where the workers' output is, or shows its tail. A rank that only noticed that another one was gone
    comes last: first a reason of one's own, then death without a word, then broken collectives.
    """
    own = [report for report in reports if not report.peer_loss]
    if own:
        return own[0].as_error()
    reported = {report.rank for report in reports}
    silent = sorted(rank for rank in lost if rank not in reported)
    if silent:
        names = " and ".join(str(rank) for rank in silent)
        reason = (
            f"the process died without an error of its own (killed from outside, out of memory, or a crash in "
            f"native code); Ray says: {lost[silent[0]]}"
        )
        return WorkerCrash(Fault(f"worker {names}", reason.rstrip("."), RESUME_HINT), logs)
    return reports[0].as_error() if reports else None
