"""The display of a run: a live block on a terminal, plain lines elsewhere.

Text made here is ASCII; messages are escaped for the stream's encoding.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from hrm_ray.types import Record

_LOG = logging.getLogger(__name__)
_EVENT_STYLES = {"WARNING": "yellow", "ERROR": "bold red"}
_REFRESH_S = 0.1
_SEPARATOR = "  "


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _figure(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def _rate(value: float) -> str:
    return f"{value:,.0f}/s" if value >= 100 else f"{value:.3g}/s"


def _gigabytes(value: float) -> str:
    return f"{value:.2f} GB"


def _whole(value: float) -> str:
    return f"{value:g}"


@dataclass(frozen=True)
class _Field:
    """A value of a record: its label and format; with `hide_zero` it is shown only if it is not 0."""

    name: str
    label: str
    write: Callable[[float], str]
    hide_zero: bool = False


_TRAIN_FIELDS = (
    _Field("loss", "loss", _figure),
    _Field("lr", "lr", lambda value: f"{value:.2e}"),
    _Field("tokens_per_s", "tokens", _rate),
    _Field("samples_per_s", "samples", _rate),
    _Field("memory_gb", "memory", _gigabytes),
    _Field("skipped_steps", "SKIPPED STEPS", _whole, hide_zero=True),
    _Field("exact_accuracy", "exact", _percent),
    _Field("cell_accuracy", "cells", _percent),
    _Field("token_accuracy", "token accuracy", _percent),
    _Field("objective", "objective", _figure),
    _Field("q_halt_loss", "halt loss", _figure),
    _Field("act_steps", "segments", lambda value: f"{value:.2f}"),
    _Field("grad_norm", "grad norm", _figure),
    _Field("peak_gb", "peak", _gigabytes),
    _Field("effective_batch_size", "batch", _whole),
)
"""Most important first: a narrow terminal shows only those that fit."""

_EVAL_FIELDS = (
    _Field("exact_accuracy", "exact", _percent),
    _Field("exact_accuracy_q_stop", "exact at Q stop", _percent),
    _Field("loss", "loss", _figure),
    _Field("bits_per_byte", "bits/byte", _figure),
    _Field("perplexity", "perplexity", lambda value: f"{value:.2f}" if value < 1e5 else f"{value:.3g}"),
    _Field("token_accuracy", "token accuracy", _percent),
    _Field("cell_accuracy", "cells", _percent),
    _Field("adaptive_loss", "adaptive loss", _figure),
    _Field("mean_segments", "segments", lambda value: f"{value:.2f}"),
    _Field("steps_q_stop", "segments at Q stop", lambda value: f"{value:.2f}"),
)


class ConsoleSink:
    """Shows the records of one run on `stream`; only the driver makes one.

    On a terminal (`interactive=None` asks the stream): a live block of step, figures and the latest evaluation, with
    events above it. Elsewhere: plain lines of all eval and event records, and of a train record when `every_s` seconds
    (by the records' time) or, if given, `every_records` records have passed since the last one shown. `total_steps` is
    the last step of the run, if known.

    RuntimeError if a live display is open already. A stream that breaks (a closed pipe or terminal) ends the display
    with a log message; the run goes on.
    """

    _live_is_open: ClassVar[bool] = False

    def __init__(
        self,
        stream: TextIO,
        total_steps: int | None = None,
        interactive: bool | None = None,
        every_s: float = 10.0,
        every_records: int | None = None,
    ) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._every_s = every_s
        self._every_records = every_records
        self._pace = _Pace()
        self._train: Record | None = None
        self._eval: Record | None = None
        self._shown: Record | None = None
        self._unshown_records = 0
        self._broken = False
        self._refreshed_s = -math.inf
        if interactive is None:
            interactive = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._live: Live | None = None
        if interactive:
            if ConsoleSink._live_is_open:
                raise RuntimeError("a live display is open already: close it before opening another")
            console = Console(file=stream, force_terminal=True, highlight=False)
            self._live = Live(_Block(self), console=console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
            ConsoleSink._live_is_open = True

    def write(self, record: Record) -> None:
        """Take one record."""
        if record.kind == "train":
            self._pace.add(record.step, record.time_s)
            self._train = record
        elif record.kind == "eval":
            self._eval = record
        live = self._live
        self._show(lambda: self._write_plain(record) if live is None else self._write_live(live, record))

    def close(self) -> None:
        """End the display, whose last state stays visible; a second call does nothing."""
        if self._live is not None:
            live, self._live = self._live, None
            ConsoleSink._live_is_open = False
            self._show(live.stop, always=True)  # even on a broken stream: it restores sys.stdout and sys.stderr
        elif self._train is not None and self._shown is not self._train:
            last = self._train
            self._show(lambda: self._print_train(last))
        self._train = None

    def _write_live(self, live: Live, record: Record) -> None:
        if record.kind == "event":
            level = str(record.values.get("level", "INFO"))
            live.console.print(Text(self._event_line(record), style=_EVENT_STYLES.get(level, "")))
        now_s = time.monotonic()
        if record.kind != "train" or now_s - self._refreshed_s >= _REFRESH_S:
            live.refresh()
            self._refreshed_s = now_s

    def _write_plain(self, record: Record) -> None:
        if record.kind == "event":
            self._print(self._event_line(record))
        elif record.kind == "eval":
            self._print(_SEPARATOR.join([self._step(record), "held out:", *_plain(_fields(_EVAL_FIELDS, record))]))
        else:
            self._unshown_records += 1
            passed_s = record.time_s - self._shown.time_s if self._shown is not None else math.inf
            by_count = self._every_records is not None and self._unshown_records >= self._every_records
            # A clock that was set back must not silence the display until it has caught up.
            if by_count or passed_s >= self._every_s or passed_s < 0:
                self._print_train(record)

    def _print_train(self, record: Record) -> None:
        self._shown, self._unshown_records = record, 0
        self._print(_SEPARATOR.join([*self._place(record), *_plain(_fields(_TRAIN_FIELDS, record))]))

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _show(self, show: Callable[[], None], *, always: bool = False) -> None:
        """Write to the stream, unless it has failed; its first failure is logged."""
        if self._broken and not always:
            return
        try:
            show()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not self._stream.closed:
                raise  # not the stream's error: a closed stream is the only one that raises ValueError
            if not self._broken:
                _LOG.warning("the display failed, the run continues: %s", error)
            self._broken = True

    def _step(self, record: Record) -> str:
        return f"step {record.step}" + (f"/{self._total_steps}" if self._total_steps is not None else "")

    def _place(self, record: Record) -> list[str]:
        """How far the run is: step, epoch, time left."""
        place = [self._step(record)]
        epoch = record.values.get("epoch")
        if isinstance(epoch, (int, float)):
            place.append(f"epoch {epoch:g}")
        left_s = self._pace.seconds_to(self._total_steps)
        if left_s is not None:
            place.append(f"ETA {_duration(left_s)}")
        return place

    def _event_line(self, record: Record) -> str:
        level = record.values.get("level", "INFO")
        message = _escaped(str(record.values.get("message", "")), self._stream)
        return f"[{level}] step {record.step}: {message}"


class _Block:
    """The live block, fitted to the terminal's width at each refresh: place and bar, figures, evaluation."""

    def __init__(self, sink: ConsoleSink) -> None:
        self._sink = sink

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        train, held_out = self._sink._train, self._sink._eval
        if train is None:
            yield _fitted([Text("waiting for the first step")], width)
        else:
            place = _fitted([Text(part, style="bold") for part in self._sink._place(train)], width)
            bar = self._bar(train.step, width - place.cell_len - len(_SEPARATOR), options.ascii_only)
            yield Text(_SEPARATOR).join([place, bar]) if bar is not None else place
            yield _fitted(_styled(_fields(_TRAIN_FIELDS, train)), width)
        if held_out is not None:
            head = Text(f"held out at step {held_out.step}:", style="cyan")
            yield _fitted([head, *_styled(_fields(_EVAL_FIELDS, held_out))], width)

    def _bar(self, step: int, width: int, ascii_only: bool) -> Text | None:
        """A progress bar with its percentage in at most `width` cells; None if there is no end or no room."""
        total = self._sink._total_steps
        if not total or width < 12:
            return None
        done = min(1.0, step / total)
        percent = f" {math.floor(100 * done):3d} %"
        cells = min(40, width - len(percent))
        full = round(cells * done)
        block, rest = ("#", "-") if ascii_only else ("\u2501", "\u2501")
        return Text.assemble((block * full, "green"), (rest * (cells - full), "bright_black"), percent)


class _Pace:
    """Seconds per step over the last records, for the remaining time."""

    def __init__(self, window: int = 50) -> None:
        self._marks: deque[tuple[int, float]] = deque(maxlen=window)

    def add(self, step: int, time_s: float) -> None:
        if self._marks and (step <= self._marks[-1][0] or time_s < self._marks[-1][1]):
            self._marks.clear()  # the run went back to a checkpoint, or the clock was set back
        self._marks.append((step, time_s))

    def seconds_to(self, total_steps: int | None) -> float | None:
        """Remaining seconds; None while the end or the pace is unknown."""
        if total_steps is None or len(self._marks) < 2:
            return None
        (first, first_s), (last, last_s) = self._marks[0], self._marks[-1]
        return max(0, total_steps - last) * (last_s - first_s) / (last - first)


def _fields(fields: Iterable[_Field], record: Record) -> list[tuple[str, str]]:
    """Label and formatted value of the fields that the record has, in the table's order."""
    found = []
    for field in fields:
        value = record.values.get(field.name)
        if isinstance(value, (int, float)) and not (field.hide_zero and value == 0):
            found.append((field.label, field.write(value)))
    return found


def _plain(fields: list[tuple[str, str]]) -> list[str]:
    return [f"{label} {value}" for label, value in fields]


def _styled(fields: list[tuple[str, str]]) -> list[Text]:
    return [Text.assemble((label, "bright_black"), " ", (value, "bold")) for label, value in fields]


def _fitted(parts: list[Text], width: int) -> Text:
    """As many parts as fit on one line; the first is cut rather than left out."""
    line = Text(no_wrap=True, overflow="crop", end="\n")
    for index, part in enumerate(parts):
        gap = _SEPARATOR if index else ""
        if index and line.cell_len + len(gap) + part.cell_len > width:
            break
        line.append(gap).append_text(part)
    return line


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour}h" if days else f"{hours}:{minute:02d}:{second:02d}"


def _escaped(text: str, stream: TextIO) -> str:
    """`text` with control characters (except newlines) and what the stream cannot encode as escapes."""
    seen = "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )
    encoding = stream.encoding or "utf-8"
    return seen.encode(encoding, errors="backslashreplace").decode(encoding)
