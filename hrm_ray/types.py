"""Values passed between layers and processes: metric records, results of runs, columns of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hrm_ray.stop_signals import EXIT_INTERRUPTED, EXIT_STOPPED

IGNORE_LABEL = -100
"""Label of a position that carries no loss (reference: sapientinc/HRM, IGNORE_LABEL_ID)."""

Columns: TypeAlias = dict[str, npt.NDArray[Any]]
"""Rows of samples as arrays by name; the first dimension of each is the row.

Puzzle rows: `inputs` int32 [B,S], `labels` int32 [B,S], `puzzle_identifiers` int32 [B], `active` bool [B].
Text rows: `inputs` int32 [B,S], `labels` int32 [B,S], `label_bytes` int32 [B,S] (UTF-8 bytes of the label
token), `documents` int32 [B,S] (which document of the row a position belongs to, from 0), `positions` int32
[B,S] (offset inside the document), `prompt` bool [B,S] (True inside a prompt), `active` bool [B].
An inactive row is padding: all its labels are IGNORE_LABEL and it weighs nothing.
"""

RecordKind: TypeAlias = Literal["train", "eval", "event", "progress"]


@dataclass(frozen=True)
class Record:
    """One line of metrics: what kind, at which step (weight updates so far), and the values by name.

    `time_s` is seconds since the epoch. Kind "event" carries a `message` and a `level` (INFO, WARNING, ERROR). Kind
    "progress" comes after every step, for displays alone: it is in no file. It carries the `epoch`, and with epochs the
    estimated `total_steps`.
    """

    kind: RecordKind
    step: int
    time_s: float
    values: dict[str, float | int | str | bool | list[float]] = field(default_factory=dict)


class MetricSink(Protocol):
    """Takes records: a file, TensorBoard, a display, or the channel to the driver."""

    def write(self, record: Record) -> None:
        """Take one record; must not raise for a full queue and must not block for long."""

    def close(self) -> None:
        """Flush and release."""


class StopReason(str, Enum):
    """Why a run ended, and with which exit code."""

    FINISHED = "finished"
    STOP_FILE = "stop_file"
    SIGTERM = "sigterm"
    SIGHUP = "sighup"
    SIGUSR1 = "sigusr1"
    MAX_TIME = "max_time"
    INTERRUPT = "interrupt"
    RESIZE = "resize"
    """The launcher has room for more workers: the attempt ends with its next checkpoint. Never the end of a run."""

    @property
    def exit_code(self) -> int:
        codes = {StopReason.FINISHED: 0, StopReason.STOP_FILE: 0, StopReason.INTERRUPT: EXIT_INTERRUPTED}
        return codes.get(self, EXIT_STOPPED)


@dataclass(frozen=True)
class RestartRecord:
    """A restart after a failure: its number (from 1), the cause, the last step before, the step that training goes on
    from, and the seconds since the run was there first. The last two are None where the workers ended before they could
    send them."""

    number: int
    cause: str
    failed_step: int
    resumed_step: int | None = None
    lost_s: float | None = None

    def values(self) -> dict[str, float | int | str | bool | list[float]]:
        """The values of its record, an event."""
        values: dict[str, float | int | str | bool | list[float]] = {
            "restart": self.number,
            "cause": self.cause,
            "failed_step": self.failed_step,
        }
        if self.resumed_step is not None and self.lost_s is not None:
            values |= {"resumed_step": self.resumed_step, "lost_s": self.lost_s}
        return values

    @classmethod
    def of(cls, record: Record) -> RestartRecord | None:
        """The restart that a record tells of; None for any other record."""
        values = record.values
        if record.kind != "event" or "restart" not in values:
            return None
        number, failed, resumed = values["restart"], values["failed_step"], values.get("resumed_step")
        lost_s = values.get("lost_s")
        if not isinstance(number, int) or not isinstance(failed, int) or not isinstance(resumed, int):
            return None
        if not isinstance(lost_s, (int, float)):
            return None
        return cls(number, str(values["cause"]), failed, resumed, float(lost_s))


@dataclass(frozen=True)
class RunResult:
    """How a run ended: the reason, the last step, the epoch reached, the bundle's folder, the last held-out figures,
    those of the best evaluation with its `step`, the samples trained on (None: not counted), and the restarts after
    failures."""

    reason: StopReason
    step: int
    epoch: int
    bundle: str
    figures: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    samples: int | None = None
    restarts: tuple[RestartRecord, ...] = ()


StopPoll: TypeAlias = Callable[[], "StopReason | None"]
"""Asked in every step on the leading rank; a reason means: finish the step, or leave it if its batch is not there yet,
save, end."""


class StopRequested(Exception):
    """A stop was requested before training began, where there is then no result, or while a step's batch was awaited:
    then nothing of that step was taken."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class DriverLink(Protocol):
    """A worker's view of the driver, for any launcher."""

    def sink(self) -> MetricSink:
        """Where the leading rank's records go, besides its files (the driver's display)."""

    def stop_requested(self) -> StopReason | None:
        """A stop that the driver asked for; cheap, called once per step."""

    def begin(self) -> None:
        """Told on rank 0 once the files of the run are open, and later checkpoints of a bundle set aside."""


class SampleSet(Protocol):
    """A finite set of samples with random access, for text and puzzles."""

    def __len__(self) -> int:
        """Number of samples (packed sequences or puzzles)."""

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        """The samples at `indices` as Columns; index -1 gives an inactive padding row."""
