"""The display of a run: a live block on a terminal, plain lines elsewhere.

Text made here is ASCII; messages are escaped for the stream's encoding.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import ClassVar, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from hrm_ray.metrics.display_state import EVAL_FIELDS, TRAIN_FIELDS, DisplayState, Schedule, figure, labelled
from hrm_ray.types import Record

_LOG = logging.getLogger(__name__)
_EVENT_STYLES = {"WARNING": "yellow", "ERROR": "bold red"}
_REFRESH_S = 0.25
_CURVE_WIDTH = 40
_SEPARATOR = "  "


class ConsoleSink:
    """Shows the records of one run on `stream`; only the driver makes one.

    On a terminal (`interactive=None` asks the stream): a live block of step, figures, loss curve and the latest
    evaluation, with events above it, which moves at every step. Elsewhere: plain lines with the time of all eval and
    event records, and of a train record when `every_s` seconds (by the records' time) or, if given, `every_records`
    records have passed since the last one shown. `started_s` is when the run began (None: now), in seconds since the
    epoch.

    RuntimeError if a live display is open already. A stream that breaks (a closed pipe or terminal) ends the display
    with a log message; the run goes on.
    """

    _live_is_open: ClassVar[bool] = False

    def __init__(
        self,
        stream: TextIO,
        schedule: Schedule | None = None,
        interactive: bool | None = None,
        every_s: float = 10.0,
        every_records: int | None = None,
        started_s: float | None = None,
    ) -> None:
        self._stream = stream
        self.state = DisplayState(schedule or Schedule(), started_s)
        self._every_s = every_s
        self._every_records = every_records
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
            self._block = LiveBlock(self.state)
            self._live = Live(self._block, console=console, auto_refresh=False, vertical_overflow="crop")
            self._live.start(refresh=True)
            ConsoleSink._live_is_open = True

    def write(self, record: Record) -> None:
        """Take one record."""
        self.state.add(record)
        live = self._live
        self._show(lambda: self._write_plain(record) if live is None else self._write_live(live, record))

    def close(self) -> None:
        """End the display, whose last state stays visible; a second call does nothing."""
        self.state.ended = True
        if self._live is not None:
            live, self._live = self._live, None
            ConsoleSink._live_is_open = False
            self._show(
                lambda: self._stop(live), always=True
            )  # on a broken stream too: it restores the standard streams
        elif self.state.train is not None and self._shown is not self.state.train:
            last = self.state.train
            self._show(lambda: self._print_train(last))
        self._shown = self.state.train

    def _write_live(self, live: Live, record: Record) -> None:
        now_s = time.monotonic()
        if record.kind in ("train", "progress") and now_s - self._refreshed_s < _REFRESH_S:
            return
        self._refreshed_s = now_s
        self._block.clear_wrapped(live.console)
        if record.kind == "event":
            level = str(record.values.get("level", "INFO"))
            live.console.print(Text(self._event_line(record), style=_EVENT_STYLES.get(level, "")))
        live.refresh()

    def _stop(self, live: Live) -> None:
        try:
            self._block.clear_wrapped(live.console)
        finally:
            live.stop()

    def _write_plain(self, record: Record) -> None:
        if record.kind == "event":
            self._print(record, self._event_line(record))
        elif record.kind == "eval":
            trained = self.state.train
            if trained is not None and trained is not self._shown and trained.step == record.step:
                self._print_train(trained)
            self._print(record, *self.state.place(record), "held out:", *_plain(labelled(EVAL_FIELDS, record)))
        elif record.kind == "train":
            self._unshown_records += 1
            passed_s = record.time_s - self._shown.time_s if self._shown is not None else math.inf
            by_count = self._every_records is not None and self._unshown_records >= self._every_records
            # A clock that was set back must not silence the display until it has caught up.
            if by_count or passed_s >= self._every_s or passed_s < 0:
                self._print_train(record)

    def _print_train(self, record: Record) -> None:
        self._shown, self._unshown_records = record, 0
        self._print(record, *self.state.place(record), *_plain(labelled(TRAIN_FIELDS, record)))

    def _print(self, record: Record, *parts: str) -> None:
        """One line, which begins with the record's time."""
        local = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.time_s))
        self._stream.write(_SEPARATOR.join([local, *parts]) + "\n")
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

    def _event_line(self, record: Record) -> str:
        level = record.values.get("level", "INFO")
        message = _escaped(str(record.values.get("message", "")), self._stream)
        if "sample" in record.values:
            # Generated text can be nothing but line ends.
            message = message.replace("\n", "\\n")
        return f"[{level}] step {record.step}: {message}"


class LiveBlock:
    """The live block, fitted to the terminal's width at each refresh: place and bar, figures, curve, evaluation, and
    what comes next."""

    def __init__(self, state: DisplayState) -> None:
        self._state = state
        self._widths: list[int] = []
        """Cells of each line as it was last drawn."""

    def clear_wrapped(self, console: Console) -> None:
        """Clear the rows that the block has gained in a terminal that was made narrower since it was drawn.

        Such a terminal wraps the lines that have become too long, and rich clears only as many rows as it has drawn.
        """
        width = max(1, console.width)
        extra = sum(max(0, math.ceil(cells / width) - 1) for cells in self._widths)
        if extra:
            codes = [(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * extra
            console.control(Control(*codes))
            self._widths = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = list(self._lines(options.max_width, options.ascii_only))
        self._widths = [min(line.cell_len, options.max_width) for line in lines]
        yield from lines

    def _lines(self, width: int, ascii_only: bool) -> Iterator[Text]:
        state = self._state
        if state.latest is None:
            yield _fitted([Text("waiting for the first step")], width)
        else:
            place = _fitted([Text(part, style="bold") for part in state.place(state.latest)], width)
            bar = self._bar(state.latest.step, width - place.cell_len - len(_SEPARATOR), ascii_only)
            yield Text(_SEPARATOR).join([place, bar]) if bar is not None else place
        if state.train is not None:
            yield _fitted(_styled(labelled(TRAIN_FIELDS, state.train)), width)
        trainers = state.latest.values.get("trainers_now") if state.latest is not None else None
        if isinstance(trainers, str) and trainers:
            yield _fitted([Text(part) for part in trainers.split("; ")], width)
        yield from self._curve(width, ascii_only)
        if state.evaluation is not None:
            head = Text(f"held out at step {state.evaluation.step}:", style="cyan")
            best = state.best_text()
            figures = _styled(labelled(EVAL_FIELDS, state.evaluation))
            # Where the line is too narrow for all, the best counts for more than the details.
            shown = [*figures[:1], Text(best, style="green"), *figures[1:]] if best else figures
            yield _fitted([head, *shown], width)
        coming = state.coming()
        if coming:
            yield _fitted([Text(part, style="bright_black") for part in coming], width)

    def _curve(self, width: int, ascii_only: bool) -> Iterator[Text]:
        """The training loss from the first to the last step in one line, where there is room and a loss to show."""
        means = self._state.curve(max(0, min(_CURVE_WIDTH, width - 40)))
        if len(means) < 4:
            return
        glyphs = ".:-=+*#" if ascii_only else "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
        low, span = min(means), max(means) - min(means)
        levels = [round((mean - low) / span * (len(glyphs) - 1)) if span > 0 else 0 for mean in means]
        line = "".join(glyphs[level] for level in levels)
        parts = [Text("loss so far", style="bright_black"), Text(line, style="green")]
        yield _fitted([*parts, Text(f"{figure(means[0])} to {figure(means[-1])}")], width)

    def _bar(self, step: int, width: int, ascii_only: bool) -> Text | None:
        """A progress bar with its percentage in at most `width` cells; None if there is no end or no room."""
        total = self._state.total_steps
        if not total or width < 12:
            return None
        done = min(1.0, step / total)
        percent = f" {math.floor(100 * done):3d} %"
        cells = min(40, width - len(percent))
        full = round(cells * done)
        block, rest = ("#", "-") if ascii_only else ("\u2501", "\u2501")
        return Text.assemble((block * full, "green"), (rest * (cells - full), "bright_black"), percent)


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


def _escaped(text: str, stream: TextIO) -> str:
    """`text` with control characters (except newlines) and what the stream cannot encode as escapes."""
    seen = "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )
    encoding = stream.encoding or "utf-8"
    return seen.encode(encoding, errors="backslashreplace").decode(encoding)
