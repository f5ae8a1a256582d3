"""`import hrm_ray` in a program or a notebook: the commands as functions."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hrm_ray
from hrm_ray.cli.python_call import flat_options
from hrm_ray.errors import DataError, HrmRayError, SettingsError
from hrm_ray.rundir import RunDir
from hrm_ray.train.loop import StepReport, TrainingLoop
from hrm_ray.types import Record, RunResult, StopReason
from tests.support.runs import CELLS, PUZZLE, TEXT, computed, puzzle_file, text_file, train


def keywords(words: tuple[str, ...]) -> dict[str, Any]:
    """Options of the command line as keywords."""
    found: dict[str, Any] = {}
    for number, word in enumerate(words):
        following = words[number + 1] if number + 1 < len(words) else "--"
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            value: Any = True if following.startswith("--") else following
            found[name.removeprefix("no_")] = False if name.startswith("no_") else value
    return found


TEXT_OPTIONS = keywords(TEXT) | {"batch_size": 4, "max_seq_len": 16}
"""Some values as numbers, others as text."""


class Records:
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def write(self, record: Record) -> None:
        self.kinds.append(record.kind)

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Scripted: interrupts of this process within steps."""

    def script(*steps: int) -> None:
        real = TrainingLoop.step

        def stepping(loop: TrainingLoop) -> StepReport | None:
            for step in steps:
                if loop.progress.step + 1 == step:
                    os.kill(os.getpid(), signal.SIGINT)
            return real(loop)

        monkeypatch.setattr(TrainingLoop, "step", stepping)

    return script


def test_it_is_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice: importing the sub-package `hrm_ray.train` does not replace the function."""
    data = text_file(tmp_path)
    for number in (1, 2):
        result = hrm_ray.train(dataset_file=data, bundle_dir=tmp_path / f"b{number}", steps=3, **TEXT_OPTIONS)
        assert (result.reason, result.step, result.bundle) == (StopReason.FINISHED, 3, str(tmp_path / f"b{number}"))
    shown = capsys.readouterr().out
    assert "step 3/3" in shown and str(tmp_path / "b2") in shown
    train(data, tmp_path / "c", *TEXT, "--steps", "3")
    assert computed(tmp_path / "b1") == computed(tmp_path / "b2") == computed(tmp_path / "c")


def test_a_sink_takes_the_records_and_a_file_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("run: {steps: 2}\noptimizer: {lr: 0.001}\n")
    sink, data = Records(), text_file(tmp_path)
    result = hrm_ray.train(
        config=tmp_path / "job.yaml", sink=sink, dataset_file=data, bundle_dir=tmp_path / "b", **TEXT_OPTIONS
    )
    assert result.step == 2 and sink.kinds.count("train") == 2
    assert capsys.readouterr().out == ""
    with pytest.raises(SettingsError, match="--lr -1"):
        hrm_ray.train(config=str(tmp_path / "job.yaml"), dataset_file=data, lr=-1)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--stepz"):
        hrm_ray.train(dataset_file=text_file(tmp_path), stepz=3)
    with pytest.raises(HrmRayError, match=r"none\.txt"):
        hrm_ray.train(dataset_file=tmp_path / "none.txt")
    with pytest.raises(SettingsError, match="nothing to train on"):
        hrm_ray.train()
    for function in (hrm_ray.evaluate, lambda bundle: hrm_ray.generate(bundle, "x"), lambda b: hrm_ray.solve(b, ["0"])):
        with pytest.raises(SettingsError, match="no such bundle"):
            function(tmp_path / "none")


@pytest.mark.parametrize(
    "sampling", [{"top_p": 0.0}, {"top_p": 2}, {"top_k": -1}, {"temperature": -0.5}, {"temperature": float("nan")}]
)
def test_sampling_out_of_range(sampling: dict[str, Any], tmp_path: Path) -> None:
    """What the command line refuses."""
    train(text_file(tmp_path), tmp_path / "b", *TEXT, "--steps", "1")
    (name,) = sampling
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')} "):
        hrm_ray.generate(tmp_path / "b", "x", device="cpu", **sampling)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_the_program_s_own_output_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be written the run goes on without it; the program's descriptor is not replaced."""
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 (closing it would raise)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        patch.setattr(os, "dup2", lambda *_: pytest.fail("the program's output was replaced"))
        result = hrm_ray.train(dataset_file=text_file(tmp_path), bundle_dir=tmp_path / "b", steps=1, **TEXT_OPTIONS)
    assert result.step == 1
    with suppress(OSError):
        full.close()


def test_an_interrupt_saves_and_ends_the_run(tmp_path: Path, interrupts: Callable[..., None]) -> None:
    interrupts(2)
    before = signal.getsignal(signal.SIGINT)
    result = hrm_ray.train(dataset_file=text_file(tmp_path), bundle_dir=tmp_path / "b", steps=9, **TEXT_OPTIONS)
    assert (result.reason, result.step) == (StopReason.INTERRUPT, 2)
    assert RunDir(tmp_path / "b").checkpoint_steps() == [2]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_ends_at_once(tmp_path: Path, interrupts: Callable[..., None]) -> None:
    interrupts(2, 2)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        hrm_ray.train(dataset_file=text_file(tmp_path), bundle_dir=tmp_path / "b", steps=9, **TEXT_OPTIONS)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_while_data_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm_ray.launch.run.make_plan", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        hrm_ray.train(dataset_file=text_file(tmp_path), bundle_dir=tmp_path / "b", **TEXT_OPTIONS)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("place", ["a thread", "an event loop"])
def test_where_notebooks_call_it(place: str, tmp_path: Path) -> None:
    """In a thread no signal is handled; in a notebook's cell an event loop is running."""
    data, results = text_file(tmp_path), list[RunResult]()

    def call() -> None:
        results.append(hrm_ray.train(dataset_file=data, bundle_dir=tmp_path / "b", steps=1, **TEXT_OPTIONS))

    async def cell() -> None:
        call()

    if place == "a thread":
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    else:
        asyncio.run(cell())
    assert [result.step for result in results] == [1]


def test_what_was_trained_is_used(tmp_path: Path) -> None:
    data = text_file(tmp_path)
    result = hrm_ray.train(dataset_file=data, eval_file=data, bundle_dir=tmp_path / "b", steps=3, **TEXT_OPTIONS)
    assert hrm_ray.evaluate(result.bundle, device="cpu") == result.figures
    text = hrm_ray.generate(result.bundle, "ab", temperature=0, max_new_tokens=5, device="cpu")
    assert text == hrm_ray.generate(Path(result.bundle), "ab", temperature=0, max_new_tokens=5, device="cpu")
    puzzles = hrm_ray.train(
        dataset_file=puzzle_file(tmp_path), bundle_dir=tmp_path / "p", steps=1, sink=Records(), **keywords(PUZZLE)
    )
    with pytest.raises(DataError, match="puzzle model"):
        hrm_ray.generate(puzzles.bundle, "ab", device="cpu")
    answers = hrm_ray.solve(puzzles.bundle, file=tmp_path / "puzzles.safetensors", limit=3, device="cpu")
    assert [len(answer) for answer in answers] == [CELLS] * 3
    with pytest.raises(SettingsError, match="exactly one"):
        hrm_ray.solve(puzzles.bundle, device="cpu")


@given(st.dictionaries(st.from_regex("[a-z]+(_[a-z]+)*", fullmatch=True), st.booleans() | st.integers() | st.none()))
def test_keywords_are_options(given_: dict[str, Any]) -> None:
    flat = flat_options(given_)
    assert len(flat) == sum(value is not None for value in given_.values())
    assert not any("_" in name for name in flat)


def test_values_as_options() -> None:
    assert flat_options({"lr": 1e-3, "use_moe": False, "amp": True, "steps": None, "targets": ["q", "v"]}) == {
        "--lr": "0.001",
        "--use-moe": "false",
        "--amp": True,
        "--targets": "q,v",
    }


def test_the_import_is_light() -> None:
    code = "import hrm_ray, sys; assert not {'torch', 'ray', 'numpy', 'pydantic'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
