"""The display: what a person gets to see on a terminal, in a pipe, and when things break."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.cli.run import _wrapped
from hrm_ray.metrics.console import ConsoleSink
from hrm_ray.metrics.display_state import Schedule
from hrm_ray.types import Record

_FIGURES: dict[str, Any] = {
    "loss": 2.5, "lr": 2e-4, "grad_norm": 0.7, "epoch": 1, "batch_idx": 3, "gradient_accumulation_steps": 2,
    "physical_batch_size": 8, "effective_batch_size": 16, "tokens_per_s": 12345.6, "memory_gb": 1.25, "peak_gb": 1.5,
    "objective": 2.9, "q_halt_loss": 0.1, "cell_accuracy": 0.5, "exact_accuracy": 0.25, "act_steps": 1.5,
    "skipped_steps": 0,
}  # fmt: skip


def _train(step: int, time_s: float | None = None, **values: Any) -> Record:
    return Record("train", step, float(step) if time_s is None else time_s, {**_FIGURES, **values})


def _event(step: int, level: str, message: str) -> Record:
    return Record("event", step, float(step), {"level": level, "message": message})


class _Stream(io.TextIOWrapper):
    """A stream of a chosen encoding whose bytes can be looked at."""

    def __init__(self, encoding: str = "utf-8", terminal: bool = False) -> None:
        self.raw_bytes = io.BytesIO()
        self.terminal = terminal
        super().__init__(self.raw_bytes, encoding=encoding, newline="\n")

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        self.flush()
        return self.raw_bytes.getvalue().decode(self.encoding)


def _screen(text: str) -> list[str]:
    """What a terminal shows in the end: carries out the few cursor commands that a live display uses."""
    rows, row = [""], 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if piece == "\n":
            row += 1
            if row == len(rows):
                rows.append("")
        elif piece == "\r":
            continue  # always followed here by clearing or by a full line
        elif piece == "\x1b[2K":
            rows[row] = ""
        elif piece.endswith("A"):
            row -= int(piece[2:-1])
        elif not piece.startswith("\x1b"):
            rows[row] += piece
    return [line.rstrip() for line in rows]


@contextmanager
def _live(
    monkeypatch: pytest.MonkeyPatch, columns: int, encoding: str = "utf-8"
) -> Iterator[tuple[ConsoleSink, _Stream]]:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "30")
    stream = _Stream(encoding, terminal=True)
    sink = ConsoleSink(stream, Schedule(100), interactive=True, started_s=0.0)
    try:
        yield sink, stream
    finally:
        sink.close()


def test_a_plain_line_tells_the_figures() -> None:
    stream = _Stream()
    sink = ConsoleSink(stream, Schedule(100), started_s=0.0)
    sink.write(_train(10))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", stream.text()[:19])
    assert stream.text()[19:] == (
        "  step 10/100  epoch 1  elapsed 0:00:10  loss 2.5000  lr 2.00e-04  tokens 12,346/s  memory 1.25 GB"
        "  exact 25.0 %  cells 50.0 %  objective 2.9000  halt loss 0.1000  segments 1.50  grad norm 0.7000"
        "  peak 1.50 GB  batch 16\n"
    )
    assert "\x1b" not in stream.text()


def test_plain_lines_are_few_and_the_last_is_never_lost() -> None:
    stream = _Stream()
    sink = ConsoleSink(stream, every_s=10.0)
    for step in range(1, 26):
        sink.write(_train(step))
    assert re.findall(r"step (\d+)", stream.text()) == ["1", "11", "21"]
    sink.close()
    sink.close()
    assert re.findall(r"step (\d+)", stream.text()) == ["1", "11", "21", "25"]


def test_plain_lines_by_number_of_records() -> None:
    stream = _Stream()
    sink = ConsoleSink(stream, every_s=math.inf, every_records=4)
    for step in range(1, 10):
        sink.write(_train(step))
    sink.close()
    assert re.findall(r"step (\d+)", stream.text()) == ["1", "5", "9"]


def test_plain_lines_go_on_when_the_clock_is_set_back() -> None:
    stream = _Stream()
    sink = ConsoleSink(stream, Schedule(10), started_s=0.0)
    sink.write(_train(1, time_s=5000.0))
    sink.write(_train(2, time_s=100.0))
    assert re.findall(r"step (\d+)", stream.text()) == ["1", "2"]
    assert "ETA" not in stream.text()


def test_every_eval_and_event_gets_a_plain_line() -> None:
    stream = _Stream()
    sink = ConsoleSink(stream, Schedule(100), started_s=0.0)
    sink.write(_train(1))
    sink.write(Record("eval", 1, 1.1, {"loss": 1.0, "bits_per_byte": 2.0, "perplexity": math.inf}))
    sink.write(Record("eval", 2, 1.2, {"exact_accuracy": 0.875, "exact_accuracy_q_stop": 0.5, "steps_q_stop": 3.25}))
    sink.write(_event(2, "INFO", "saved"))
    sink.write(_event(3, "WARNING", "one\x1b[31m bell\x07"))
    assert [line[21:] for line in stream.text().splitlines()[1:]] == [
        "step 1/100  elapsed 0:00:01  held out:  loss 1.0000  bits/byte 2.0000  perplexity inf",
        "step 2/100  elapsed 0:00:01  held out:  exact 87.5 %  exact at Q stop 50.0 %  segments at Q stop 3.25",
        "[INFO] step 2: saved",
        r"[WARNING] step 3: one\x1b[31m bell\x07",
    ]


def test_skipped_steps_are_told_only_when_there_are_some() -> None:
    stream = _Stream()
    sink = ConsoleSink(stream, every_s=0.0)
    sink.write(_train(1))
    assert "SKIPPED" not in stream.text()
    sink.write(_train(2, skipped_steps=3))
    assert "SKIPPED STEPS 3" in stream.text()


def test_remaining_time_follows_the_recent_pace() -> None:
    stream = _Stream()
    sink = ConsoleSink(stream, Schedule(1000), every_s=0.0, started_s=0.0)
    for step in range(1, 11):
        sink.write(_train(step, time_s=100.0 * step))  # a slow start: 100 s a step
    assert "ETA 1d 3h" in stream.text().splitlines()[-1]  # 990 steps * 100 s
    for step in range(11, 101):
        sink.write(_train(step, time_s=1000.0 + 2.0 * step))
    assert "ETA 0:30:00" in stream.text().splitlines()[-1]  # 900 steps * 2 s, the slow start forgotten
    sink.write(_train(1001, time_s=9000.0))
    assert "ETA 0:00:00" in stream.text().splitlines()[-1]


def test_live_block_leaves_its_last_state_and_shows_events_above(monkeypatch: pytest.MonkeyPatch) -> None:
    with _live(monkeypatch, columns=100) as (sink, stream):
        for step in range(1, 51):
            sink.write(_train(step, loss=1.0 / step))
        sink.write(Record("eval", 40, 40.0, {"loss": 1.25, "bits_per_byte": 2.125}))
        sink.write(_event(41, "WARNING", "[red]not finite[/red]"))
        print("from elsewhere")
        sink.write(_train(51, loss=0.5))
        sink.close()
    screen = _screen(stream.text())
    assert screen[:2] == ["[WARNING] step 41: [red]not finite[/red]", "from elsewhere"]
    assert screen[2].startswith("step 51/100  epoch 1  elapsed 0:00:51  ETA 0:00:49  \u2501")
    assert screen[2].endswith(" 51 %")
    assert screen[3].startswith("loss 0.5000  lr 2.00e-04  tokens 12,346/s  memory 1.25 GB")
    assert re.fullmatch(r"loss so far  [\u2581-\u2588]{40}  1.0000 to 0.5000", screen[4])
    assert screen[5] == "held out at step 40:  loss 1.2500  bits/byte 2.1250"
    assert screen[6:] == [""]
    assert stream.text().endswith("\x1b[?25h")  # the cursor is visible again


def test_live_display_gives_the_standard_streams_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = (sys.stdout, sys.stderr)
    with _live(monkeypatch, columns=80) as (sink, stream):
        assert sys.stdout is not before[0]
        stream.close()
        sink.write(_event(1, "ERROR", "the terminal is gone"))
        sink.close()
    assert caplog.text.count("the display failed") == 1
    assert (sys.stdout, sys.stderr) == before


def test_never_more_than_one_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    with _live(monkeypatch, columns=80), pytest.raises(RuntimeError, match="open already"):
        ConsoleSink(_Stream(), interactive=True)
    with _live(monkeypatch, columns=80):
        pass


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "utf-8"])
@pytest.mark.parametrize("columns", [1, 7, 20, 79])
def test_narrow_terminals_and_poor_encodings(monkeypatch: pytest.MonkeyPatch, encoding: str, columns: int) -> None:
    with _live(monkeypatch, columns, encoding) as (sink, stream):
        for step in (1, 2):
            sink.write(_train(step, loss=math.nan))
        sink.write(Record("eval", 1, 1.0, {"loss": 1.0, "bits_per_byte": 2.0}))
        sink.close()
    assert all(len(line) <= columns for line in _screen(stream.text()))
    assert _screen(stream.text())[0].startswith("step 2/100"[:columns])
    with _live(monkeypatch, columns, encoding) as (sink, _):
        sink.write(_event(2, "ERROR", "Größe \u2713 \U0001f600 \x1b[2J"))


@given(width=st.integers(1, 160), step=st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_no_line_is_wider_than_the_terminal(width: int, step: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch, _live(monkeypatch, width) as (sink, stream):
        sink.write(_train(step))
        sink.close()
    assert all(len(line) <= width for line in _screen(stream.text()))


def test_messages_that_the_stream_cannot_carry_are_escaped() -> None:
    stream = _Stream("ascii")
    ConsoleSink(stream).write(_event(1, "ERROR", "Größe \u2713"))
    assert stream.text()[21:] == "[ERROR] step 1: Gr\\xf6\\xdfe \\u2713\n"


def test_interactive_follows_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for terminal in (True, False):
        stream = _Stream(terminal=terminal)
        sink = ConsoleSink(stream)
        sink.write(_train(1))
        sink.close()
        assert ("\x1b" in stream.text()) is terminal
    monkeypatch.setenv("TERM", "dumb")
    stream = _Stream(terminal=True)
    ConsoleSink(stream).write(_train(1))
    assert "\x1b" not in stream.text()


def test_a_broken_pipe_ends_the_display_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    class _Pipe(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise BrokenPipeError("nobody reads")

    stream = _Pipe()
    sink = ConsoleSink(stream, every_s=0.0)
    sink.write(_train(1))
    sink.write(_train(2))
    sink.close()
    assert stream.writes == 1
    assert caplog.text.count("the display failed, the run continues: nobody reads") == 1


def _progress(step: int, time_s: float, **values: Any) -> Record:
    return Record("progress", step, time_s, {"epoch": 0, **values})


def test_the_live_block_moves_at_every_step_whatever_log_every(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: an estimated end, the best evaluation so far, and what comes next."""
    with _live(monkeypatch, columns=100) as (sink, stream):
        sink.state.schedule = Schedule(None, 50, 0)
        sink.write(_train(1, time_s=3.0))
        sink.write(Record("eval", 5, 5.0, {"loss": 1.25, "best": True}))
        sink.write(Record("eval", 6, 6.0, {"loss": 1.5, "best": False}))
        for step in range(2, 8):
            sink.write(_progress(step, time_s=3.0 * step, total_steps=207))
        sink.write(_event(7, "INFO", "an event draws the block"))
        screen = _screen(stream.text())[1:]
        sink.close()
    assert screen[0].startswith("step 7/~207  epoch 0  elapsed 0:00:21  ETA 0:10:00")
    assert screen[2] == "held out at step 6:  loss 1.5000  best loss 1.2500 at step 5"
    assert screen[3] == "next evaluation at step 50  next checkpoint at the end"
    assert "next" not in _screen(stream.text())[4], "after the end nothing comes"


def test_a_step_that_is_not_logged_prints_no_plain_line() -> None:
    stream = _Stream()
    sink = ConsoleSink(stream, Schedule(100), every_s=0.0)
    sink.write(_progress(1, 1.0))
    sink.close()
    assert stream.text() == ""


@pytest.mark.parametrize(("wide", "narrow"), [(100, 30), (80, 79), (60, 7)])
def test_a_narrower_terminal_keeps_no_old_lines(monkeypatch: pytest.MonkeyPatch, wide: int, narrow: int) -> None:
    """A terminal wraps the block's lines when it is made narrower: their rows are cleared before the next block."""
    with _live(monkeypatch, columns=wide) as (sink, stream):
        print("above the block")
        sink.write(_train(1))
        sink.write(Record("eval", 1, 1.0, {"loss": 1.25, "bits_per_byte": 2.125}))
        before = _screen(stream.text())
        assert sink._live is not None
        sink._live.console.width = narrow
        size = len(stream.text())
        sink.write(Record("eval", 2, 2.0, {"loss": 1.0}))
        sent = stream.text()[size:]
        sink.close()
    rows = [line[at : at + narrow] for line in before[1:] for at in range(0, max(1, len(line)), narrow)]
    cleared = sum(int(up or 1) for up in re.findall(r"\x1b\[(\d*)A", sent))
    assert cleared == len(rows) - 1 > 1


def test_the_header_is_divided_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "model   actv1, up to 58,344,450 parameters (30,032,898 active per token), sequence 128, vocabulary 16000"
    command = f"resume  hrm-ray train --bundle-dir {'x' * 80} --resume"
    monkeypatch.setattr(sys, "stdout", _Stream(terminal=True))
    monkeypatch.setenv("COLUMNS", "80")
    lines = _wrapped(f"{text}\n{command}").splitlines()
    assert lines == [text[:73], " " * 8 + text[74:], command] and text[73] == " "
    monkeypatch.setattr(sys, "stdout", _Stream())
    assert _wrapped(text) == text
