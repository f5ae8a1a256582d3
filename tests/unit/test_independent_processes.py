"""Runs of independent trainers in real processes: real kills at named points, audited from the rows that were trained
into the surviving weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import psutil
import pytest
import torch

from hrm_ray.bundle.store import open_bundle
from hrm_ray.bundle.weights_file import read_tensors
from hrm_ray.errors import SettingsError
from hrm_ray.launch.resolve import resolve
from hrm_ray.launch.run import run
from hrm_ray.launch.run_directory import load_run
from hrm_ray.ledger import read_ledger
from hrm_ray.ledger.verify import violations
from hrm_ray.rundir import RunDir, read_json
from hrm_ray.types import Record, StopReason

HOOKS = Path(__file__).resolve().parents[1] / "support" / "killed_processes"
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    *("--parallel-independent", "--world-size", "2", "--launcher", "subprocess", "--threads", "1", "--epochs", "1"),
    *("--merge-every", "4", "--max-failures", "9", "--hidden-size", "32", "--num-heads", "2", "--h-layers", "1"),
    *("--l-layers", "1", "--seq-len", "32", "--batch-size", "2", "--vocab-size", "300", "--no-amp", "--no-moe"),
    "--no-gradient-checkpointing",
]
KILLS = [
    ["trainer", "before write", 2],
    ["trainer", "after write", 1],
    ["trainer", "after report", 1],
    ["driver", "after commit", 1],
    ["driver", "before commit", 1],
    ["anchors", "after merge", 1],
    ["anchors", "before merge", 1],
]
"""Process, point, and number of the call in that process. The driver dies twice, and the command is given again.
However the trainers share the data, five reports and four merges see all of them."""


def text_file(folder: Path) -> Path:
    draw = Random(0)
    path = folder / "text.txt"
    path.write_text("\n".join(" ".join(f"w{draw.randrange(99)}" for _ in range(12)) for _ in range(260)))
    return path


def command(
    folder: Path, *options: str, kills: object = (), timeout_s: float = 170.0
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(HOOKS), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "HRM_AUDIT": str(folder), "HRM_KILLS": json.dumps(kills)}
    words = [sys.executable, "-m", "hrm_ray", "train", "--bundle-dir", str(folder / "b"), *options]
    return subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=timeout_s)


def lines(path: Path) -> list[list[object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of_the_weights(folder: Path, bundle: RunDir) -> Counter[tuple[int, int, int]]:
    """How often each row was trained into the last anchor, from what trainers and merges themselves have logged."""
    fed = {str(name): ranges for name, ranges in lines(folder / "reports.jsonl")}
    made = {str(out): (str(parent), members) for _, parent, out, members in lines(folder / "merges.jsonl")}
    with read_ledger(bundle.ledger) as ledger:
        assert list(violations(ledger)) == []
        head = ledger.head
        assert head is not None
        anchor = Path(head.anchor).name
    found: Counter[tuple[int, int, int]] = Counter()
    while anchor in made:
        anchor, members = made[anchor]
        for member in members:  # type: ignore[attr-defined]
            for epoch, chunk, start, end in fed[member.partition(".")[0]]:  # type: ignore[attr-defined]
                found.update((epoch, chunk, row) for row in range(start, end))
    return found


@pytest.mark.slow
def test_kills_cost_time_and_never_a_row(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    before = set(psutil.pids())
    ended = command(tmp_path, "--dataset-file", str(text), *OPTIONS, kills=KILLS)
    starts = 1
    while ended.returncode == -9 and starts < 4:
        starts += 1
        ended = command(tmp_path, "--resume", kills=KILLS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert starts == 3
    killed = [kill for number, kill in enumerate(KILLS) if (tmp_path / f"killed-{number}").exists()]
    assert killed == KILLS
    bundle = RunDir(tmp_path / "b")
    trained = rows_of_the_weights(tmp_path, bundle)
    with read_ledger(bundle.ledger) as ledger:
        rows = sum(ledger.sequences(chunk) or 0 for chunk in range(ledger.chunks))
    assert len(trained) == rows and set(trained.values()) == {1}
    open_bundle(bundle.root, torch.device("cpu"))
    left = [p for p in psutil.process_iter(["pid", "cmdline"]) if p.pid not in before and _is_ours(p, tmp_path)]
    assert left == []
    assert list(bundle.independent.contributions.iterdir()) == []


def _is_ours(process: psutil.Process, folder: Path) -> bool:
    try:
        return "hrm_ray.independent.child_process" in process.cmdline() and process.cwd() == str(folder)
    except psutil.Error:
        return False


@pytest.mark.slow
def test_one_trainer_without_an_outer_step_is_plain_training(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    shape = [*OPTIONS[OPTIONS.index("--hidden-size") :], "--dataset-file", str(text), "--linear-dataset"]
    shape += ["--steps", "23", "--threads", "1"]
    plain = run(load_run(_flat([*shape, "--bundle-dir", str(tmp_path / "plain"), "--launcher", "local"])))
    alone = ["--parallel-independent", "--world-size", "1", "--outer-optimizer", "none", "--merge-every", "5"]
    result = run(load_run(_flat([*shape, "--bundle-dir", str(tmp_path / "alone"), *alone])))
    assert (result.step, result.samples) == (plain.step, plain.samples)
    own, other = (read_tensors(RunDir(Path(one.bundle)).weights) for one in (plain, result))
    assert own.keys() == other.keys()
    assert [name for name in own if not torch.equal(own[name], other[name])] == []


@pytest.mark.slow
def test_each_trainer_has_its_own_batch_size(tmp_path: Path) -> None:
    options = [*OPTIONS, "--dataset-file", str(text_file(tmp_path))]
    options[options.index("--batch-size") + 1] = "4,2"
    ended = command(tmp_path, *options)
    assert ended.returncode == 0, ended.stderr
    bundle = RunDir(tmp_path / "b")
    sizes = []
    for number in range(2):
        newest = RunDir(bundle.independent.trainer(f"trainer-{number}")).newest_whole_checkpoint()
        assert newest is not None
        sizes.append(read_json(newest / "state.json")["effective_batch_size"])
    assert sizes == [4, 2]
    trained = rows_of_the_weights(tmp_path, bundle)
    with read_ledger(bundle.ledger) as ledger:
        assert trained == Counter((0, 0, row) for row in range(ledger.sequences(0) or 0))


class StopsAfter:
    """Asks for a stop when a step was logged."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def write(self, record: Record) -> None:
        self.seen = max(self.seen, record.step if record.kind == "train" else 0)

    def close(self) -> None:
        pass

    def __call__(self) -> StopReason | None:
        return StopReason.STOP_FILE if self.seen >= self.step else None


@pytest.mark.slow
def test_one_trainer_goes_on_from_plain_training_to_the_bit(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    shape = [*OPTIONS[OPTIONS.index("--hidden-size") :], "--dataset-file", str(text), "--threads", "1"]
    shape += ["--ema", "0.9", "--log-every", "1"]
    whole = run(load_run(_flat([*shape, "--steps", "19", "--bundle-dir", str(tmp_path / "whole")])))
    half = tmp_path / "half"
    stops = StopsAfter(9)
    run(load_run(_flat([*shape, "--steps", "19", "--bundle-dir", str(half)])), sink=stops, stop=stops)
    alone = ["--parallel-independent", "--world-size", "1", "--outer-optimizer", "none", "--merge-every", "5"]
    result = run(load_run(_flat(["--resume", "--bundle-dir", str(half), *alone])))
    assert (result.step, result.samples) == (whole.step, whole.samples)
    own, other = (read_tensors(RunDir(Path(one.bundle)).weights) for one in (whole, result))
    assert [name for name in own if not torch.equal(own[name], other[name])] == []


@pytest.mark.slow
def test_plain_training_goes_on_from_one_trainer_to_the_bit(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    shape = [*OPTIONS[OPTIONS.index("--hidden-size") :], "--dataset-file", str(text), "--threads", "1"]
    shape += ["--ema", "0.9", "--log-every", "1", "--steps", "19"]
    whole = run(load_run(_flat([*shape, "--bundle-dir", str(tmp_path / "whole")])))
    alone = ["--parallel-independent", "--world-size", "1", "--outer-optimizer", "none", "--merge-every", "5"]
    half = tmp_path / "half"
    stops = StopsAfter(5)
    run(load_run(_flat([*shape, *alone, "--bundle-dir", str(half)])), sink=stops, stop=stops)
    result = run(load_run(_flat(["--resume", "--bundle-dir", str(half), "--strategy", "single"])))
    assert (result.step, result.samples) == (whole.step, whole.samples)
    own, other = (read_tensors(RunDir(Path(one.bundle)).weights) for one in (whole, result))
    assert [name for name in own if not torch.equal(own[name], other[name])] == []


@pytest.mark.slow
def test_several_trainers_go_on_from_two_workers_and_lose_no_row(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    shape = [*OPTIONS[OPTIONS.index("--hidden-size") :], "--threads", "1"]
    begun = command(tmp_path, "--dataset-file", str(text), *shape, "--steps", "9")
    assert begun.returncode == 0, begun.stderr
    bundle = RunDir(tmp_path / "b")
    resumed = ["--resume", "--bundle-dir", str(bundle.root), "--world-size", "2"]
    with pytest.raises(SettingsError, match="whose product is 2, for each trainer"):
        resolve(load_run(_flat([*resumed, "--parallel-independent", "--batch-size", "4"])))
    trainers = ["--parallel-independent", "--world-size", "2", "--merge-every", "4", "--steps", "999", "--epochs", "1"]
    ended = command(tmp_path, "--resume", *trainers)
    assert ended.returncode == 0, ended.stderr
    trained = rows_of_the_weights(tmp_path, bundle)
    with read_ledger(bundle.ledger) as ledger:
        rows = ledger.sequences(0)
        assert (ledger.chunks, ledger.epoch) == (1, 1) and rows is not None
    assert trained == Counter((0, 0, row) for row in range(18, rows))
    with pytest.raises(SettingsError, match="effective batch 4"):
        resolve(load_run(_flat([*resumed, "--no-parallel-independent"])))


def _flat(words: list[str]) -> dict[str, str | bool]:
    """Options as `load_run` takes them."""
    found: dict[str, str | bool] = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word] = True if after.startswith("--") else after
    return found
