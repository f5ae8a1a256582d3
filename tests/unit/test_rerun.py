"""Training in a job: which exit codes run the command again and which end the job; and the entry points in jobs/."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hrm_ray.cli import rerun
from hrm_ray.cli.rerun import run_until_done
from hrm_ray.rundir import RunDir
from tests.support.runs import TEXT, hrm, records, refused, text_file, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[list[str]]]:
    """Gives a function that takes the exit codes of the command's runs and returns the words that each gets. A code
    with a number is that of a run which has saved a checkpoint at that step."""
    monkeypatch.setattr(rerun, "handle_signals", lambda handler: {})

    def scripted(*codes: int | tuple[int, int]) -> list[list[str]]:
        left, seen = list(codes), list[list[str]]()

        def run(child: rerun._Child, words: Sequence[str]) -> int:
            seen.append(list(words))
            code = left.pop(0)
            if isinstance(code, tuple):
                code, step = code
                whole = RunDir(tmp_path / "b").checkpoint(step)
                train(text_file(tmp_path), tmp_path / "b", *TEXT, "--steps", step, "--auto-resume")
                assert whole.is_dir()
            child.ended = f"exit code {code}"
            return code

        monkeypatch.setattr(rerun._Child, "run", run)
        return seen

    return scripted


def words(tmp_path: Path, *more: str) -> list[str]:
    return ["--dataset-file", str(text_file(tmp_path)), "--bundle-dir", str(tmp_path / "b"), *more]


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 6, 130])
def test_an_end_is_the_end(code: int, runs: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    seen = runs(code)
    given = words(tmp_path, "--steps", "4")
    assert run_until_done(given, wait_s=0) == code
    assert seen == [[*given, "--auto-resume"]]


def test_a_failure_and_a_stop_run_it_again(
    runs: Callable[..., list[list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = runs(75, (1, 2), (1, 3), 0)
    assert run_until_done(words(tmp_path, *TEXT, "--steps", "4", "--resume"), wait_s=0) == 0
    assert len(seen) == 4 and all(each[-1] == "--auto-resume" and "--resume" not in each for each in seen)
    assert all(f"--bundle-dir={tmp_path / 'b'}" in each for each in seen[1:])
    said = capsys.readouterr().err
    assert "exit code 75: training is run again from the start" in said
    assert "exit code 1: training is run again from step_3" in said


def test_a_failure_that_comes_again_at_one_place_ends_the_job(
    runs: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    seen = runs((1, 2), (1, 3), 1, 0)
    assert run_until_done(words(tmp_path, *TEXT, "--steps", "4"), wait_s=0) == 1
    assert len(seen) == 3


def test_max_time_is_the_end(runs: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    seen = runs(75, 0)
    assert run_until_done(words(tmp_path, "--max-time", "5m"), wait_s=0) == 75 and len(seen) == 1


def test_a_branch_that_has_saved_nothing_is_not_run_again(runs: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    """It would begin from random weights, or from the checkpoint that --resume-from was to undo."""
    train(text_file(tmp_path), tmp_path / "old", *TEXT, "--steps", "2", "--save-every", "1")
    start = str(tmp_path / "old" / "checkpoints" / "step_1")
    seen = runs(1, 0)
    assert run_until_done(words(tmp_path, "--resume-from", start), wait_s=0) == 1 and len(seen) == 1
    seen = runs(75, 0)
    assert run_until_done(["--bundle-dir", str(tmp_path / "old"), "--resume-from", start], wait_s=0) == 75
    assert len(seen) == 1


def test_a_branch_is_made_once(runs: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    train(text_file(tmp_path), tmp_path / "old", *TEXT, "--steps", "2")
    seen = runs((1, 2), 0)
    start = str(tmp_path / "old" / "checkpoints" / "step_2")
    assert run_until_done(words(tmp_path, "--resume-from", start), wait_s=0) == 0
    assert seen[0][-2:] == ["--resume-from", start]
    assert not [word for word in seen[1] if word.startswith("--resume-from")]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_a_stop_of_the_job_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command gets SIGTERM, and its end by it is the end of the job."""
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / "hrm_ray").mkdir()
    (tmp_path / "hrm_ray" / "__init__.py").touch()
    (tmp_path / "hrm_ray" / "__main__.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "signal.pause()\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        assert run_until_done(["--dataset-file", "x"], wait_s=0) == 75
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_command_that_is_killed_is_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hrm_ray").mkdir()
    (tmp_path / "hrm_ray" / "__init__.py").touch()
    (tmp_path / "hrm_ray" / "__main__.py").write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "if not Path('killed').exists():\n"
        "    Path('killed').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path('words').write_text(' '.join(sys.argv[1:]))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rerun, "handle_signals", lambda handler: {})
    assert run_until_done(words(tmp_path, "--steps", "4"), wait_s=0) == 0
    assert "ended by signal 9: training is run again from the start" in capsys.readouterr().err
    assert (tmp_path / "words").read_text().startswith("train --dataset-file=")


def test_the_entry_points_are_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, bundle = text_file(tmp_path), tmp_path / "b"

    def job(name: str, *options: object) -> int:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
        assert isinstance(left.value.code, int)
        return left.value.code

    monkeypatch.setattr(sys, "path", [str(ROOT / "jobs"), *sys.path])
    monkeypatch.setattr(rerun, "handle_signals", lambda handler: {})
    given = ("--dataset-file", data, "--bundle-dir", bundle, *TEXT, "--steps", "2", "--resume")
    command = [sys.executable, ROOT / "jobs" / "train.py", *map(str, given)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    trained = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert records(bundle)[-1]["step"] == 2

    seen: list[Sequence[str]] = []
    monkeypatch.setattr(rerun._Child, "run", lambda child, words: seen.append(words) or 4)
    assert job("independent", "--world-size", "3") == 4
    assert seen == [
        ["--parallel-independent", "--launcher", "ray", "--ray-address", "auto", "--world-size", "3", "--auto-resume"]
    ]
    monkeypatch.delitem(sys.modules, "train")
    assert job("evaluate", bundle, "--dataset-file", data) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    assert job("merge", bundle, tmp_path / "missing", "--out", tmp_path / "merged") == 2
    assert "missing" in capsys.readouterr().err


def test_a_cluster_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError(\"No module named 'pydantic'\", name='pydantic')")
    command = [sys.executable, ROOT / "jobs" / "train.py", "--dataset-file", "x"]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and done.stderr.startswith("error: pydantic: cannot be imported by the Python 3.")
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 300


def test_a_bundle_in_the_package_of_a_job_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    data = text_file(tmp_path)
    train(data, tmp_path / "b", *TEXT, "--steps", "1")
    monkeypatch.chdir(package)
    naming = ("unpacked package", "absolute path")
    for place in (("--bundle-dir", "out"), ("--brain-name", "out"), ()):
        message = refused(
            2, "train", "--dataset-file", data, *TEXT, "--steps", "1", *place, naming=("--bundle-dir", *naming)
        )
        assert len(message) < 300
    refused(2, "merge", tmp_path / "b", tmp_path / "b", "--out", "merged", naming=("--out merged", *naming))
    assert list(package.iterdir()) == []
    assert hrm("train", "--dataset-file", data, "--bundle-dir", tmp_path / "c", *TEXT, "--steps", "1").code == 0
