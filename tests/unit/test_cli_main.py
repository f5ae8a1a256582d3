"""Every end of the command line: its message, where it goes, and the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import hrm_ray
from hrm_ray import errors
from hrm_ray.cli import main as cli
from hrm_ray.cli.error_handler import Aborted, exit_code_of
from hrm_ray.errors import Fault, HrmRayError
from tests.support.runs import TEXT, last_said, text_file

ROOT = Path(__file__).resolve().parents[2]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert isinstance(left.value.code, int)
    told = capsys.readouterr()
    return left.value.code, told.out, told.err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trian"], "train"),
        (["train", "--hiden-size", "64"], "--hidden-size"),
        (["train-actv1", "--hiden-size", "64"], "--hidden-size"),
        (["train", "--dry-rum"], "--dry-run"),
        (["train", "stray"], "stray"),
        (["train", "--config", "no-such.yaml"], "no-such.yaml"),
        (["arch-summary", "--hiden-size", "64"], "--hidden-size"),
        (["arch-summary", "--jsn"], "--json"),
        (["arch-summary", "--vocab-size", "many"], "--vocab-size many"),
        (["arch-summary", "--lr", "1"], "--lr"),
        (["generate", "b", "--promt", "x"], "--prompt"),
        (["generate", "b"], "--prompt"),
        (["generate", "b", "--prompt", "x", "--top-p", "2"], "--top-p"),
        (["generate", "b", "--prompt", "x", "--device", "gpu"], "cuda"),
        (["solve", "b", "--stop-by-p"], "--stop-by-q"),
        (["solve", "b", "--limit", "0"], "--limit"),
        (["plot"], "RUN"),
        (["data", "build", "sudokuu"], "sudoku"),
        (["data", "build", "sudoku", "--out", "x", "--difficult", "easy"], "--difficulty"),
        (["data", "build", "sudoku", "--out", "x", "--size", "5"], "--size"),
        (["data", "build", "text"], "--out"),
        (["data"], "--help"),
        (["ledger"], "--help"),
        (["ledger", "shwo", "b"], "show"),
        (["ledger", "show"], "RUN"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], words: list[str], hint: str) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert hint in err and "Traceback" not in err
    assert len(err.splitlines()) == 1 and err.startswith("error: ")


def test_every_fault_has_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("run: {seedd: 1}\n", encoding="utf-8")
    words = ["train", "--batch-size", "0", "--lrr", "1", "stray", "--config", str(tmp_path / "run.yaml"), "--lr=-1"]
    code, _, err = run(capsys, *words)
    assert code == 2
    assert len(err.splitlines()) == 5 and all(line.startswith("error: ") for line in err.splitlines())


def test_help_pages(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        code, out, _ = run(capsys, *words)
        assert code == 0
        for command in ("train", "train-actv1", "arch-summary", "generate", "solve", "plot", "data", "ledger"):
            assert f"  {command} " in out
    for name in ("train", "train-actv1"):
        code, out, _ = run(capsys, name, "--help")
        assert code == 0 and f"hrm-ray {name}" in out


@pytest.mark.parametrize("kind", [HrmRayError, *errors.ERROR_KINDS.values()])
def test_expected_errors(capsys: pytest.CaptureFixture[str], kind: type[HrmRayError]) -> None:
    def command() -> None:
        raise kind([Fault("a", "b", "c"), Fault("d", "e", "f")])

    assert exit_code_of(command) == kind.exit_code
    assert capsys.readouterr().err == "error: a: b. c.\nerror: d: e. f.\n"


def raising(error: BaseException) -> Callable[[], object]:
    def command() -> None:
        raise error

    return command


def test_unexpected_errors_show_one_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(raising(ZeroDivisionError("oops"))) == 1
    err = capsys.readouterr().err
    assert err.count("Traceback") == 1 and "oops" in err and err.startswith("error: ZeroDivisionError: ")


def test_other_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(raising(KeyboardInterrupt())) == 130
    assert exit_code_of(raising(SystemExit(75))) == 75
    assert exit_code_of(lambda: 75) == 75
    assert exit_code_of(lambda: None) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_socket_that_breaks_is_not_taken_for_a_closed_pager(capsys: pytest.CaptureFixture[str]) -> None:
    ended = Aborted()
    ended.__cause__ = BrokenPipeError(32, "Broken pipe")
    assert exit_code_of(raising(ended)) == 1
    assert "BrokenPipeError" in capsys.readouterr().err


def test_interrupting_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(words: list[str], name: str) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("hrm_ray.cli.train.train_command", interrupted)
    code, _, err = run(capsys, "train")
    assert (code, err) == (130, "interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is reported differently there")
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "command", ["train --help", "generate --help", "data build sudoku --size 4 --train 4 --test 2 --out"]
)
def test_a_closed_pager_ends_quietly(command: str, buffered: bool, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        words = [
            sys.executable,
            "-m",
            "hrm_ray",
            *command.split(),
            *([str(tmp_path / "s")] if "--out" in command else []),
        ]
        done = subprocess.run(
            words, env=environment, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    finally:
        os.close(writer)
    # A builder that takes more than a moment reports its progress there.
    said = [line for line in done.stderr.splitlines() if not line.startswith(("train: ", "test: "))]
    assert (done.returncode, said) == (0, [])


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is reported differently there")
def test_a_run_goes_on_when_nobody_looks_on(tmp_path: Path) -> None:
    """The pager is closed before the first word: the run is trained to its end, and that is how it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    data, bundle = text_file(tmp_path), tmp_path / "b"
    said = last_said((*TEXT, "--steps", "2"))
    words = ["train", "--dataset-file", str(data), "--bundle-dir", str(bundle), *map(str, said)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hrm_ray", *words], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True,
            timeout=120, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (bundle / "model.safetensors").is_file()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"hrm-ray {hrm_ray.__version__}\n", "")


def test_build_then_name_the_next_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["data", "build", "sudoku", "--size", "4", "--train", "6", "--test", "3", "--out", str(tmp_path / "s")]
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert "6 puzzles" in out and "hrm-ray train --dataset-file" in out
    code, _, err = run(capsys, *words)
    assert code != 0 and "--overwrite" in err
    assert run(capsys, *words, "--overwrite")[0] == 0


@pytest.mark.parametrize(("preset", "parameters"), [("nano", 5e6), ("tiny", 15e6)])
def test_a_preset_has_the_size_it_promises(capsys: pytest.CaptureFixture[str], preset: str, parameters: float) -> None:
    """FEATURES.md M11: within 10 % at the default vocabulary."""
    code, out, _ = run(capsys, "arch-summary", "--model-preset", preset, "--json")
    assert code == 0
    assert json.loads(out)["total_parameters"] == pytest.approx(parameters, rel=0.1)


def test_arch_summary_counts_puzzles_with_few_symbols(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "arch-summary", "--task", "puzzle", "--vocab-size", "11", "--d-model", "64", "--json")
    assert code == 0
    plain = json.loads(out)
    assert plain["parameters"]["token embedding"] == 11 * 64 and plain["config"]["task"] == "puzzle"


def test_help_is_quick() -> None:
    """The issue's bound is 0.5 s; the best of three keeps a busy machine from deciding."""
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "hrm_ray", "--help"], cwd=ROOT, capture_output=True, timeout=60, check=True
        )
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5
