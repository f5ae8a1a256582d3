"""`hrm-ray runs`: bundles below a folder with their state, also damaged ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.launch.list_runs import _records, list_runs
from hrm_ray.launch.run_lock import run_lock
from hrm_ray.metrics.jsonl import JsonlSink
from hrm_ray.rundir import RunDir
from hrm_ray.types import Record
from tests.support.runs import PUZZLE, TEXT, files_below, hrm, puzzle_file, refused, stopping_at, text_file, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of a finished and a stopped run, one of them a level deeper."""
    folder = tmp_path_factory.mktemp("runs")
    data = text_file(folder)
    train(data, folder / "a", *TEXT, "--eval-file", data, "--steps", "4", "--save-every", "2")
    puzzles = puzzle_file(folder)
    with stopping_at(3):
        train(puzzles, folder / "more" / "b", *PUZZLE, "--eval-file", puzzles, "--eval-every", "2", "--steps", "9")
    return folder


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    ran = hrm("runs", folder, "--json")
    assert ran.code == 0, ran.err
    entries = [json.loads(line) for line in ran.out.splitlines()]
    return {Path(entry["bundle"]).relative_to(folder).as_posix(): entry for entry in entries}


def test_what_is_said_of_a_bundle(folder: Path) -> None:
    before = files_below(folder)
    found = listed(folder)
    assert list(found) == ["more/b", "a"], "the last written first"
    text, puzzles = found["a"], found["more/b"]
    assert (text["state"], text["task"], text["step"], text["steps"]) == ("finished", "lm", 4, 4)
    assert (puzzles["state"], puzzles["task"], puzzles["step"], puzzles["steps"]) == ("stopped", "puzzle", 3, 9)
    assert text["parameters"] > 10_000 and text["loss"] > 1 and text["best"]["step"] == 4 and "loss" in text["best"]
    assert list(puzzles["best"]) == ["exact_accuracy", "step"]
    assert text["disk_bytes"] == sum(len(content) for name, content in before.items() if name.startswith("a/"))
    table = hrm("runs", folder).out.splitlines()
    assert table[0].split()[:2] == ["bundle", "task"] and len(table) == 3
    assert "4/4" in table[2] and "finished" in table[2] and table[2].endswith("now")
    assert list(listed(folder / "a")) == ["."]
    assert files_below(folder) == before


def test_running_failed_and_damaged_ones(folder: Path, tmp_path: Path) -> None:
    for name in ("running", "killed", "resumed", "settings", "metrics", "no settings"):
        shutil.copytree(folder / "a", tmp_path / name)
    (tmp_path / "killed" / "metadata.json").unlink()
    (tmp_path / "resumed" / "checkpoints" / "step_4").rename(tmp_path / "resumed" / "checkpoints" / "step_6")
    (tmp_path / "settings" / "training_args.json").write_text("{")
    (tmp_path / "metrics" / "metrics.jsonl").write_text("[]\n")
    (tmp_path / "no settings" / "training_args.json").unlink()
    with run_lock(RunDir(tmp_path / "running")):
        found = listed(tmp_path)
        table = hrm("runs", tmp_path)
    states = {name: entry["state"] for name, entry in found.items()}
    assert states == {
        "running": "running",
        "killed": "failed",
        "resumed": "failed",
        "settings": "damaged",
        "metrics": "damaged",
        "no settings": "damaged",
    }
    assert found["resumed"]["step"] == 6
    assert table.code == 0 and "metrics.jsonl: not a metrics record" in table.err


def test_folders_without_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(2, "runs", tmp_path / "none", naming=("none", "no such folder"))
    monkeypatch.chdir(tmp_path)
    for words in ((), (tmp_path,)):
        ran = hrm("runs", *words)
        assert ran.code == 0 and "no bundles" in ran.out


@settings(max_examples=40)
@given(
    name=st.sampled_from(["training_args.json", "metadata.json", "metrics.jsonl", "best/metadata.json"]),
    content=st.binary(max_size=40)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["kind", "step", "time_s", "loss", "best", "ended", "parameters", "settings", "data", "x"]
                ),
                inner,
                max_size=5,
            )
        ),
    ).map(lambda value: json.dumps(value).encode() + b"\n"),
)
def test_no_content_of_a_file_raises(
    name: str, content: bytes, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = tmp_path_factory.mktemp("odd")
    for copied in ("training_args.json", "metadata.json", "metrics.jsonl", "best/metadata.json"):
        (bundle / copied).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "a" / copied, bundle / copied)
    (bundle / name).write_bytes(content)
    assert hrm("runs", bundle).code == 0
    shutil.rmtree(bundle)


def test_a_thousand_bundles_take_seconds(folder: Path, tmp_path: Path) -> None:
    names = ("training_args.json", "metadata.json", "metrics.jsonl")
    for number in range(1000):
        bundle = tmp_path / f"{number}"
        bundle.mkdir()
        for name in names:
            (bundle / name).hardlink_to(folder / "a" / name)
    begun_s = time.process_time()
    assert len(list_runs(tmp_path)) == 1000
    assert time.process_time() - begun_s < 10


def test_it_loads_no_torch(folder: Path) -> None:
    code = (
        f"import pathlib, sys\nfrom hrm_ray.launch.list_runs import list_runs\nlist_runs(pathlib.Path({str(folder)!r}))"
    )
    code += "\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_loss_of_puzzles_is_the_last_that_a_record_has(tmp_path: Path) -> None:
    sink = JsonlSink(RunDir(tmp_path).metrics)
    for step, values in ((1, {"objective": 3.0}), (2, {"objective": 2.5, "loss": 2.0}), (3, {"objective": 2.25})):
        sink.write(Record("train", step, float(step), dict(values)))
    sink.close()
    assert _records(RunDir(tmp_path)) == {"recorded_step": 3, "loss": 2.0}
