"""SIGTERM, Ctrl-C and the stop file, sent to a real process: step finished, checkpoint there, and it goes on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from hrm_ray.data.chunk_source import Chunk, ChunkPipeline
from hrm_ray.launch.stopping import StopWatch
from hrm_ray.metrics.console import ConsoleSink
from hrm_ray.metrics.display_state import Schedule
from hrm_ray.rundir import RunDir, verify_checkpoint
from hrm_ray.stop_signals import STOP_SIGNALS, exit_at_once
from hrm_ray.train import session
from hrm_ray.train.loop import StepReport, TrainingLoop
from hrm_ray.types import Record, StopReason
from tests.support.runs import (
    PUZZLE,
    TEXT,
    computed,
    files_below,
    hrm,
    last_said,
    puzzle_file,
    records,
    refused,
    stopping_at,
    text_file,
    train,
)

ROOT = Path(__file__).resolve().parents[2]
LONG = ("--steps", "100000", "--save-every", "0", "--seed", "3")
POSIX = pytest.mark.skipif(os.name == "nt", reason="signals are sent as on POSIX")


def start(data: Path, bundle: Path, *words: object) -> subprocess.Popen[str]:
    command = ["train", "--dataset-file", data, "--bundle-dir", bundle, *last_said((*TEXT, *LONG, *words))]
    return subprocess.Popen(
        [sys.executable, "-m", "hrm_ray", *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Wait for something that the process does; a minute is for a busy machine."""
    limit_s = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit_s, "it does not begin to train"
        time.sleep(0.02)


def trains(bundle: Path) -> Callable[[], bool]:
    return lambda: (bundle / "metrics.jsonl").is_file() and len(records_so_far(bundle)) >= 2


def records_so_far(bundle: Path) -> list[bytes]:
    return (bundle / "metrics.jsonl").read_bytes().split(b"\n")[:-1]


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def check_and_resume(bundle: Path, out: str) -> None:
    """The last step taken is in a whole checkpoint, and the command that was shown goes on from there."""
    run_dir = RunDir(bundle)
    steps = run_dir.checkpoint_steps()
    assert len(steps) == 1
    verify_checkpoint(run_dir.checkpoint(steps[0]))
    assert records(bundle)[-1]["step"] == steps[0] and f"at step {steps[0]}" in out
    assert run_dir.weights.is_file()
    shown = next(line for line in out.splitlines() if line.startswith("next: "))
    words = shlex.split(shown.removeprefix("next:"))
    assert words[0] == "hrm-ray"
    ran = hrm(*words[1:], "--steps", steps[0] + 2)
    assert ran.code == 0, ran.err
    assert [record["step"] for record in records(bundle)] == list(range(1, steps[0] + 3))


@POSIX
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal(name: str, code: int, tmp_path: Path) -> None:
    bundle = tmp_path / "a bundle"  # the command that is shown must survive the space
    process = start(text_file(tmp_path), bundle)
    until(process, trains(bundle))
    process.send_signal(signal.Signals[name])
    ending = ended(process)
    by, again = ("", "Ctrl-C again") if name == "SIGINT" else (f" ({name})", "Ctrl-C")
    assert (ending[0], ending[2]) == (code, f"stopping after this step{by}; {again} leaves at once\n")
    check_and_resume(bundle, ending[1])


def test_the_stop_file(tmp_path: Path) -> None:
    bundle, stop = tmp_path / "b", tmp_path / "stop"
    process = start(text_file(tmp_path), bundle, "--stop-file", stop)
    until(process, trains(bundle))
    stop.touch()
    code, out, err = ended(process)
    assert (code, err) == (0, "") and "ended   stopped by --stop-file" in out
    refused(2, "train", "--bundle-dir", bundle, "--resume", naming=("--stop-file", stop, "already exists", "Remove it"))
    assert f"(remove {stop} first)" in out
    stop.unlink()
    check_and_resume(bundle, out)


SLOW_END = """
import sys, time
from hrm_ray.cli.main import main
from hrm_ray.train.trainer import Trainer

def slowly(self, reason):
    print("ending", file=sys.stderr, flush=True)
    time.sleep(60)

Trainer._end = slowly
main(sys.argv[1:])
"""


@POSIX
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """The first one is being honoured, and that takes long; what is on disk stays."""
    data, bundle = text_file(tmp_path), tmp_path / "b"
    command = ["train", "--dataset-file", data, "--bundle-dir", bundle, *last_said((*TEXT, *LONG, "--save-every", "5"))]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_END, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run_dir = RunDir(bundle)
    until(process, lambda: bool(run_dir.checkpoint_steps()))
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    said = {process.stderr.readline(), process.stderr.readline()}
    assert said == {"stopping after this step; Ctrl-C again leaves at once\n", "ending\n"}
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert (code, err) == (130, "interrupted\n")
    assert hrm("train", "--bundle-dir", bundle, "--resume", "--steps", run_dir.checkpoint_steps()[-1] + 1).code == 0


@POSIX
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_stopped_while_data_is_prepared(name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = text_file(tmp_path)

    def interrupted(*words: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.Signals[name])
        raise AssertionError("the signal should have ended this")

    monkeypatch.setattr("hrm_ray.data.chunk_source.tokenise", interrupted)
    ran = hrm("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *TEXT)
    stopped = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    assert (ran.code, ran.err) == (code, f"{stopped} before training began: nothing was trained\n")
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


STARTING = """
import os, signal, sys
import hrm_ray.__main__ as command

module, number, ignored = sys.argv[1], signal.Signals[sys.argv[2]], sys.argv[3:]

class Sends:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            try:
                os.kill(os.getpid(), number)
            except BaseException:  # as libraries do while they are imported
                pass

sys.meta_path.insert(0, Sends())
if ignored:
    signal.signal(number, signal.SIG_IGN)
sys.argv = ["hrm-ray", "train", "--version"]
command.main()
"""


def sent_while_starting(*words: str) -> tuple[int, str, str]:
    """How the command ends where it gets a signal while it imports a module."""
    ran = subprocess.run([sys.executable, "-c", STARTING, *words], cwd=ROOT, capture_output=True, text=True)
    return ran.returncode, ran.stdout, ran.stderr


@POSIX
@pytest.mark.parametrize(
    ("name", "module"),
    [
        *(("SIGTERM", "typer"), ("SIGHUP", "typer"), ("SIGUSR1", "typer"), ("SIGINT", "typer")),
        ("SIGINT", "hrm_ray.launch.run_directory"),
    ],
)
def test_a_signal_while_the_command_starts(name: str, module: str) -> None:
    """From the entry point's first lines on, and though the exception of a handler would be lost in an import."""
    code, said = (130, "interrupted\n") if name == "SIGINT" else (75, f"stopped by {name}\n")
    assert sent_while_starting(module, name) == (code, "", said)


@POSIX
def test_other_commands_are_unwound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have half written is removed, which an exit at once would leave."""
    undone = []

    def drawing(*words: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            undone.append("half a picture")

    monkeypatch.setattr("hrm_ray.metrics.plots.plot_runs", drawing)
    before = signal.signal(signal.SIGTERM, exit_at_once)
    try:
        ran = hrm("plot", tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ran.code, ran.err, undone) == (75, "stopped by SIGTERM\n", ["half a picture"])


@POSIX
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """A run under nohup survives the end of its terminal."""
    code, out, err = sent_while_starting("typer", "SIGHUP", "ignored")
    assert (code, out) == (2, "") and "--version" in err
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopWatch(None) as watch:
            watch.begin()
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)


@POSIX
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_queues_and_lost_terminals_save_and_stop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step in which the signal comes is the last."""
    data, real = text_file(tmp_path), TrainingLoop._passes_that_fit

    def signalled(loop: TrainingLoop, *words: Any) -> Any:
        if loop.progress.step == 2:
            os.kill(os.getpid(), signal.Signals[name])
        return real(loop, *words)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_passes_that_fit", signalled)
        ran = hrm("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *TEXT, "--steps", "6")
    assert ran.code == 75 and f"ended   stopped by {name} at step 3, " in ran.out, ran
    assert ran.err == f"stopping after this step ({name}); Ctrl-C leaves at once\n"
    assert RunDir(tmp_path / "b").checkpoint_steps() == [3]


@POSIX
def test_signals_are_left_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of a notebook, for example, which a run in it must not replace for good."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with StopWatch(None) as watch:
        watch.begin()
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.poll() is StopReason.SIGTERM
        os.kill(os.getpid(), signal.SIGHUP)
        assert watch.poll() is StopReason.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
    assert capsys.readouterr().err == "stopping after this step (SIGTERM); Ctrl-C leaves at once\n"


@POSIX
def test_the_live_display_is_not_torn_by_the_announcement(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = io.StringIO()
    with contextlib.closing(ConsoleSink(terminal, Schedule(10), interactive=True)) as sink, StopWatch(None) as watch:
        watch.begin()
        sink.write(Record("train", 1, 0.0, {"loss": 2.0}))
        os.kill(os.getpid(), signal.SIGINT)
        watch.__exit__(None, None, None)
        sink.write(Record("train", 2, 60.0, {"loss": 1.0}))
    # The line of the block is erased, then the announcement takes its place.
    assert "\x1b[2Kstopping after this step; Ctrl-C again leaves at once\n" in terminal.getvalue()
    assert capsys.readouterr().err == ""


def test_the_stop_file_is_looked_for_now_and_then(tmp_path: Path) -> None:
    stop, now_s = tmp_path / "stop", [0.0]
    watch = StopWatch(stop, clock=lambda: now_s[0])
    assert watch.poll() is None
    stop.touch()
    assert watch.poll() is None, "it looks again only after a while"
    now_s[0] = 0.3
    assert watch.poll() is StopReason.STOP_FILE
    stop.unlink()
    now_s[0] = 0.9
    assert watch.poll() is StopReason.STOP_FILE, "what was asked for stays asked for"


@pytest.mark.parametrize("order", ["--linear-dataset", "--no-linear-dataset"])
def test_the_same_seed_gives_the_same_losses(order: str, tmp_path: Path) -> None:
    """Bit for bit; another seed gives others, also where the order of the data is the file's."""
    data = text_file(tmp_path)
    for name, words in {"a": (), "b": (), "c": ("--seed", "1")}.items():
        train(data, tmp_path / name, *TEXT, "--steps", "8", order, *words)
    a, b, c = (computed(tmp_path / name) for name in "abc")
    assert a == b
    assert all(one["loss"] != other["loss"] for one, other in zip(a, c, strict=True))
    weights = [files_below(tmp_path / name)["model.safetensors"] for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("task", ["text", "puzzle"])
def test_a_stop_before_the_first_batch(task: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends without a step, also where it goes on from one, and a resume trains what one run would have."""
    data, words = (text_file(tmp_path), TEXT) if task == "text" else (puzzle_file(tmp_path), PUZZLE)
    train(data, tmp_path / "whole", *words, "--steps", "6")
    bundle, resume = tmp_path / "b", ("train", "--bundle-dir", tmp_path / "b", "--resume")
    if step:
        with stopping_at(step):
            train(data, bundle, *words, "--steps", "6")
    take = TrainingLoop.step

    def stopped(loop: TrainingLoop) -> StepReport | None:
        loop.stop_poll = lambda: StopReason.SIGTERM
        return take(loop)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "step", stopped)
        first = ("train", "--dataset-file", data, "--bundle-dir", bundle, *words)
        ran = hrm(*(resume if step else first), "--steps", "6")
    assert ran.code == 75 and f"ended   stopped by SIGTERM at step {step}, " in ran.out, ran
    assert RunDir(bundle).checkpoint_steps() == [step]
    assert hrm(*resume, "--steps", "6").code == 0
    assert computed(bundle) == computed(tmp_path / "whole")


def many_rows(folder: Path) -> Path:
    """Forty rows of text, and so several chunks."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"a text for row number {row}"}) + "\n" for row in range(40)))
    return path


@pytest.mark.parametrize("tokenised", [0, 2])
def test_a_stop_while_the_shuffle_buffer_is_filled(
    tokenised: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that does not come holds no stop up: the process ends without it, at the step before."""
    data = many_rows(tmp_path)
    words = (
        *TEXT,
        "--streaming",
        "--dataset-chunk-size",
        "4",
        "--shuffle-buffer-size",
        "40",
        "--no-linear-dataset",
        "--steps",
        "4",
    )
    train(data, tmp_path / "whole", *words)
    released, awaited, made = threading.Event(), threading.Event(), []
    pipeline_get, poll = ChunkPipeline.get, StopWatch.poll

    def get(self: ChunkPipeline, number: int) -> Chunk | None:
        if threading.current_thread().name != "chunks":
            return pipeline_get(self, number)  # before training starts
        made.append(number)
        if len(made) > tokenised:
            awaited.set()
            assert released.wait(10), "a stop is not heard while a chunk is awaited"
        return pipeline_get(self, number)

    def stops(self: StopWatch) -> StopReason | None:
        # The thread of the chunks is ended in order, so it must not wait once the stop is heard.
        if awaited.is_set():
            released.set()
            return StopReason.INTERRUPT
        return poll(self)

    with monkeypatch.context() as patched:
        patched.setattr(ChunkPipeline, "get", get)
        patched.setattr(StopWatch, "poll", stops)
        ran = hrm("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *words)
    assert ran.code == 130 and "ended   stopped by Ctrl-C at step 0, " in ran.out, ran
    assert hrm("train", "--bundle-dir", tmp_path / "b", "--resume").code == 0
    assert computed(tmp_path / "b") == computed(tmp_path / "whole")


def test_each_filling_is_reported_after_seconds_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a second epoch too, hours after the first."""
    now_s, loop, logger = [0.0], MagicMock(), MagicMock()
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    filling = session._while_filling(loop, logger)

    def reports(passed_s: float, rows: int) -> int:
        now_s[0] += passed_s
        before = logger.event.call_count
        filling(rows, 40)
        return logger.event.call_count - before

    for _ in range(2):  # within one step
        assert [reports(3600, 4), reports(1, 8), reports(6, 12), reports(1, 16)] == [0, 0, 1, 0]
    loop.progress.step = 9
    assert [reports(3600, 17), reports(6, 20)] == [0, 1]


def test_the_filling_of_the_shuffle_buffer_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FILL_REPORT_EVERY_S", 0.0)
    words = (
        *TEXT,
        "--streaming",
        "--dataset-chunk-size",
        "4",
        "--shuffle-buffer-size",
        "12",
        "--no-linear-dataset",
        "--steps",
        "1",
    )
    ran = train(many_rows(tmp_path), tmp_path / "b", *words)
    messages = [record["message"] for record in records(tmp_path / "b", "event")]
    assert "filling the shuffle buffer: 4 of 12 rows" in messages, (messages, ran.out)
