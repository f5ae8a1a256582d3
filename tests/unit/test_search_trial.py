"""A trial: a process of its own, whose end is a verdict however it comes, and which leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hrm_ray.errors import DataError, HrmRayError, ResourceError
from hrm_ray.launch.resolve import resolve
from hrm_ray.launch.run_directory import load_run
from hrm_ray.search.trial import run_trial
from hrm_ray.settings.tree import RunSettings
from tests.support.runs import text_file

TASK = "import json, os, sys, time; task = json.loads(sys.stdin.readline()); "
"""How a scripted process of a trial begins."""


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def scripted(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr("hrm_ray.search.trial.COMMAND", (sys.executable, "-c", TASK + script))


@pytest.mark.parametrize(
    ("script", "kind", "peak_bytes"),
    [
        ("print(json.dumps({'step': 1, 'peak_bytes': 5})); print(json.dumps({'update_s': 0.5}))", "fits", 5),
        ("print(json.dumps({'step': 1, 'peak_bytes': 50})); print(json.dumps({'update_s': 0.5}))", "too large", 50),
        ("print(json.dumps({'step': 1, 'peak_bytes': 5, 'halved': True}))", "too large", None),
        ("print(json.dumps({'step': 1, 'peak_bytes': 5}), flush=True); os.kill(os.getpid(), 9)", "too large", None),
        ("os.abort()", "too large", None),
        (
            "print(json.dumps({'error': 'ResourceError', 'faults': [['step 2', 'out of memory', 'x']]})); sys.exit(4)",
            "too large",
            None,
        ),
        (
            "sys.stderr.write('RuntimeError: DefaultCPUAllocator: can\\'t allocate memory'); sys.exit(1)",
            "too large",
            None,
        ),
        ("sys.stdin.read()", "no answer", None),
    ],
)
def test_a_verdict_and_nothing_left(
    script: str, kind: str, peak_bytes: int | None, monkeypatch: pytest.MonkeyPatch, temporary_files: Path
) -> None:
    scripted(monkeypatch, script)
    before = set(psutil.Process().children())
    verdict = run_trial(RunSettings(), 10, silent_s=0.5 if kind == "no answer" else 60)
    assert (verdict.kind, verdict.peak_bytes) == (kind, peak_bytes)
    assert set(psutil.Process().children()) <= before and not list(temporary_files.iterdir())


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        ("print(json.dumps({'error': 'DataError', 'faults': [['a', 'b', 'c']]})); sys.exit(5)", DataError, "a: b. c."),
        (
            "print(json.dumps({'error': 'ResourceError', 'faults': [['/b', 'cannot be written', 'c']]})); sys.exit(4)",
            ResourceError,
            "cannot be written",
        ),
        ("sys.stderr.write('Boom\\n'); sys.exit(3)", HrmRayError, "Boom"),
        ("pass", HrmRayError, "it said nothing"),
    ],
)
def test_another_failure_ends_the_search(
    script: str, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch, temporary_files: Path
) -> None:
    scripted(monkeypatch, script)
    with pytest.raises(error, match=said):
        run_trial(RunSettings(), 10)
    assert not list(temporary_files.iterdir())


def test_an_interrupt_ends_the_process(monkeypatch: pytest.MonkeyPatch, temporary_files: Path) -> None:
    from hrm_ray.search import trial

    def interrupted(*_: object) -> object:
        raise KeyboardInterrupt

    scripted(monkeypatch, "sys.stdin.read()")
    before = set(psutil.Process().children())
    monkeypatch.setattr(trial._Child, "lines", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_trial(RunSettings(), 10)
    assert set(psutil.Process().children()) <= before and not list(temporary_files.iterdir())


def test_the_process_of_a_search_that_is_gone_ends_and_removes_its_folder(tmp_path: Path) -> None:
    """The search's end of the pipe closes with it, also where it is killed."""
    waits = (
        "import sys, threading, types; import hrm_ray.search.trial as trial; "
        "updates = types.ModuleType('updates'); updates.shortened = lambda settings, folder: settings; "
        "updates.first_updates = lambda settings, say: (say(step=1), threading.Event().wait()); "
        "sys.modules['hrm_ray.search.first_updates'] = updates; trial.main()"
    )
    folder = tmp_path / "trial"
    folder.mkdir()
    (folder / "file").touch()
    child = subprocess.Popen(
        [sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert child.stdin is not None and child.stdout is not None
    task = {"settings": json.loads(RunSettings().model_dump_json()), "folder": str(folder)}
    child.stdin.write(f"{json.dumps(task)}\n")
    child.stdin.flush()
    assert json.loads(child.stdout.readline()) == {"step": 1}, "it waits in an update"
    child.stdin.close()
    assert child.wait(timeout=60) == 1
    child.stdout.close()
    assert not folder.exists()


def test_a_real_trial_measures_the_run_and_one_that_is_too_large_is_told(tmp_path: Path, temporary_files: Path) -> None:
    flat = {
        **{"--dataset-file": str(text_file(tmp_path, rows=300)), "--bundle-dir": str(tmp_path / "b")},
        **{"--hidden-size": "32", "--num-heads": "2", "--num-layers": "2", "--vocab-size": "300", "--device": "cpu"},
        **{"--max-seq-len": "64", "--batch-size": "2", "--launcher": "local", "--threads": "1", "--steps": "3"},
        **{"--memory-budget": "1GB"},
    }
    settings = resolve(load_run(flat)).settings
    small = run_trial(settings, 1_000_000_000)
    assert small.kind == "fits" and small.peak_bytes is not None and small.update_s is not None
    assert 200e6 < small.peak_bytes < 900e6
    large = run_trial(settings.with_leaves({"optimizer.batch_size": 4096}), 1_000_000_000)
    assert large.kind == "too large"
    assert not (tmp_path / "b").exists() and not list(temporary_files.iterdir())
