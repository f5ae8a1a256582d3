"""SIGTERM, Ctrl-C and the stop file, sent to a real process: step finished, checkpoint there, and it goes on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hrm_ray.launch.stopping import StopWatch
from hrm_ray.rundir import RunDir, verify_checkpoint
from hrm_ray.types import StopReason
from tests.support.runs import TEXT, computed, files_below, hrm, last_said, records, refused, text_file, train

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
    shown = next(line for line in out.splitlines() if line.startswith("resume "))
    words = shlex.split(shown.removeprefix("resume"))
    assert words[0] == "hrm-ray"
    ran = hrm(*words[1:], "--steps", steps[0] + 2)
    assert ran.code == 0, ran.err
    assert [record["step"] for record in records(bundle)] == list(range(1, steps[0] + 3))


@POSIX
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal(number: int, code: int, tmp_path: Path) -> None:
    bundle = tmp_path / "a bundle"  # the command that is shown must survive the space
    process = start(text_file(tmp_path), bundle)
    until(process, trains(bundle))
    process.send_signal(number)
    ending = ended(process)
    assert ending[0] == code and "Traceback" not in ending[2]
    check_and_resume(bundle, ending[1])


def test_the_stop_file(tmp_path: Path) -> None:
    bundle, stop = tmp_path / "b", tmp_path / "stop"
    process = start(text_file(tmp_path), bundle, "--stop-file", stop)
    until(process, trains(bundle))
    stop.touch()
    code, out, err = ended(process)
    assert (code, err) == (0, "") and "ended   stop_file" in out
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
    assert process.stderr is not None and process.stderr.readline() == "ending\n"
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert (code, err) == (130, "interrupted\n")
    assert hrm("train", "--bundle-dir", bundle, "--resume", "--steps", run_dir.checkpoint_steps()[-1] + 1).code == 0


@POSIX
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_stopped_while_data_is_prepared(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = text_file(tmp_path)

    def interrupted(*words: Any, **named: Any) -> Any:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal should have ended this")

    monkeypatch.setattr("hrm_ray.data.chunk_source.tokenise", interrupted)
    ran = hrm("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *TEXT)
    assert ran.code == code and "Traceback" not in ran.err
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


@POSIX
def test_signals_are_left_as_they_were(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopWatch(None) as watch:
        watch.begin()
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.poll() is StopReason.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.poll() is StopReason.INTERRUPT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


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
