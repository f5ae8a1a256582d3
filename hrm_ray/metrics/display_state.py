"""What a display of a run shows: the latest records as texts, pace and remaining time, and the curve of the loss."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from hrm_ray.types import Record

CURVE_POINTS = 4096
"""Points of the loss curve that are kept; of twice as many, every second one is dropped."""


@dataclass(frozen=True)
class Schedule:
    """When a run ends, evaluates and saves, in weight updates.

    `total_steps` is None where the number of steps is not known. `eval_every` and `save_every` of 0 mean the end of the
    run; `eval_every` is None where there is nothing to evaluate on.
    """

    total_steps: int | None = None
    eval_every: int | None = None
    save_every: int | None = None


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def figure(value: float) -> str:
    """A loss or norm with the digits that matter."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def _rate(value: float) -> str:
    return f"{value:,.0f}/s" if value >= 100 else f"{value:.3g}/s"


def _gigabytes(value: float) -> str:
    return f"{value:.2f} GB"


def _whole(value: float) -> str:
    return f"{value:g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 0:05:30; from a day on, days and hours."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour}h" if days else f"{hours}:{minute:02d}:{second:02d}"


@dataclass(frozen=True)
class Field:
    """A value of a record: its label and format; with `hide_zero` it is shown only if it is not 0."""

    name: str
    label: str
    write: Callable[[float], str]
    hide_zero: bool = False


TRAIN_FIELDS = (
    Field("loss", "loss", figure),
    Field("lr", "lr", lambda value: f"{value:.2e}"),
    Field("tokens_per_s", "tokens", _rate),
    Field("samples_per_s", "samples", _rate),
    Field("memory_gb", "memory", _gigabytes),
    Field("skipped_steps", "SKIPPED STEPS", _whole, hide_zero=True),
    Field("anchor_loss", "held-out loss", figure),
    Field("trainers", "trainers", _whole),
    Field("rejected_reports", "REJECTED REPORTS", _whole, hide_zero=True),
    Field("exact_accuracy", "exact", _percent),
    Field("cell_accuracy", "cells", _percent),
    Field("token_accuracy", "token accuracy", _percent),
    Field("objective", "objective", figure),
    Field("q_halt_loss", "halt loss", figure),
    Field("act_steps", "segments", lambda value: f"{value:.2f}"),
    Field("grad_norm", "grad norm", figure),
    Field("peak_gb", "peak", _gigabytes),
    Field("effective_batch_size", "batch", _whole),
)
"""Most important first: a narrow terminal shows only those that fit."""

EVAL_FIELDS = (
    Field("exact_accuracy", "exact", _percent),
    Field("exact_accuracy_q_stop", "exact at Q stop", _percent),
    Field("loss", "loss", figure),
    Field("bits_per_byte", "bits/byte", figure),
    Field("perplexity", "perplexity", lambda value: f"{value:.2f}" if value < 1e5 else f"{value:.3g}"),
    Field("token_accuracy", "token accuracy", _percent),
    Field("cell_accuracy", "cells", _percent),
    Field("adaptive_loss", "adaptive loss", figure),
    Field("mean_segments", "segments", lambda value: f"{value:.2f}"),
    Field("steps_q_stop", "segments at Q stop", lambda value: f"{value:.2f}"),
)


def labelled(fields: Iterable[Field], record: Record) -> list[tuple[str, str]]:
    """Label and formatted value of the fields that the record has, in the table's order."""
    found = []
    for field in fields:
        value = record.values.get(field.name)
        if isinstance(value, (int, float)) and not (field.hide_zero and value == 0):
            found.append((field.label, field.write(value)))
    return found


def decisive(evaluation: Record) -> str | None:
    """The figure that decides which evaluation is the best; None where the record has none."""
    found = labelled((field for field in EVAL_FIELDS if field.name in ("exact_accuracy", "loss")), evaluation)
    return " ".join(found[0]) if found else None


class DisplayState:
    """The records of a run so far, as far as a display needs them.

    `started_s` is when the run began, in seconds since the epoch; None means now.
    """

    def __init__(self, schedule: Schedule, started_s: float | None = None) -> None:
        self.schedule = schedule
        self.started_s = time.time() if started_s is None else started_s
        self.latest: Record | None = None
        """The latest step: a train record, or a progress record."""
        self.train: Record | None = None
        self.evaluation: Record | None = None
        self.best: Record | None = None
        """The best evaluation, where it was one of this display's records."""
        self.ended = False
        self._estimated_steps: int | None = None
        self._pace = _Pace()
        self._losses: list[float] = []
        self._every = 1
        self._unkept = 0

    def add(self, record: Record) -> None:
        """Take one record."""
        if record.kind in ("train", "progress"):
            self._pace.add(record.step, record.time_s)
            self.latest = record
            estimate = record.values.get("total_steps")
            self._estimated_steps = estimate if isinstance(estimate, int) else self._estimated_steps
        if record.kind == "train":
            self.train = record
            self._keep_loss(record.values.get("loss"))
        elif record.kind == "eval":
            self.evaluation = record
            if record.values.get("best"):
                self.best = record

    @property
    def total_steps(self) -> int | None:
        """The last step of the run; with epochs an estimate, which a progress record carries."""
        return self.schedule.total_steps if self._estimated_steps is None else self._estimated_steps

    def step(self, record: Record) -> str:
        """The step of a record and the last step of the run."""
        total = self.total_steps
        if total is None:
            return f"step {record.step}"
        return f"step {record.step}/{'' if total == self.schedule.total_steps else '~'}{total}"

    def place(self, record: Record) -> list[str]:
        """How far the run is: step, epoch, time passed and time left."""
        place = [self.step(record)]
        epoch = record.values.get("epoch")
        if isinstance(epoch, (int, float)):
            place.append(f"epoch {epoch:g}")
        place.append(f"elapsed {duration(max(0.0, record.time_s - self.started_s))}")
        left_s = self._pace.seconds_to(self.total_steps)
        if left_s is not None:
            place.append(f"ETA {duration(left_s)}")
        return place

    def coming(self) -> list[str]:
        """When the next evaluation and checkpoint come; empty before the first step and after the last."""
        if self.latest is None or self.ended:
            return []
        parts = []
        for name, every in (("evaluation", self.schedule.eval_every), ("checkpoint", self.schedule.save_every)):
            if every is not None:
                total = self.total_steps
                step = (self.latest.step // every + 1) * every if every else None
                at_end = step is None or (total is not None and step >= total)
                parts.append(f"next {name} at {'the end' if at_end else f'step {step}'}")
        return parts

    def best_text(self) -> str | None:
        """The figure that decides which evaluation is best, and its step, where that was not the last."""
        best = self.best
        if best is None or self.evaluation is None or best.step == self.evaluation.step:
            return None
        return f"best {decisive(best)} at step {best.step}"

    def curve(self, width: int) -> list[float]:
        """The loss so far as at most `width` means, the oldest first."""
        count = min(width, len(self._losses))
        bounds = [round(index * len(self._losses) / count) for index in range(count + 1)] if count else []
        return [sum(self._losses[first:last]) / (last - first) for first, last in pairwise(bounds)]

    def _keep_loss(self, loss: object) -> None:
        if not isinstance(loss, (int, float)) or not math.isfinite(loss):
            return
        self._unkept += 1
        if self._unkept < self._every:
            return
        self._unkept = 0
        self._losses.append(float(loss))
        if len(self._losses) == 2 * CURVE_POINTS:
            self._losses, self._every = self._losses[::2], 2 * self._every


class _Pace:
    """Seconds per step over the last seconds or minutes, for the remaining time."""

    def __init__(self, window: int = 50, apart_s: float = 0.5) -> None:
        self._marks: deque[tuple[int, float]] = deque(maxlen=window)
        self._apart_s = apart_s

    def add(self, step: int, time_s: float) -> None:
        marks = self._marks
        if marks and step == marks[-1][0]:
            return
        if marks and (step < marks[-1][0] or time_s < marks[-1][1]):
            marks.clear()  # the run went back to a checkpoint, or the clock was set back
        if len(marks) > 2 and time_s - marks[-2][1] < self._apart_s:
            marks.pop()  # so that the window of fast steps is not a blink
        marks.append((step, time_s))

    def seconds_to(self, total_steps: int | None) -> float | None:
        """Remaining seconds; None while the end or the pace is unknown."""
        if total_steps is None or len(self._marks) < 2:
            return None
        (first, first_s), (last, last_s) = self._marks[0], self._marks[-1]
        return max(0, total_steps - last) * (last_s - first_s) / (last - first)
