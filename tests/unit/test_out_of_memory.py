"""Running out of memory: recognised, the rows cut smaller, the effective batch kept, a clear end at the last row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.data.stream import Window
from hrm_ray.rundir import RunDir
from hrm_ray.train import evaluate as evaluation
from hrm_ray.train.evaluate import EvalSet
from hrm_ray.train.loaders import BatchSize
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.out_of_memory import is_out_of_memory, split_microbatches
from hrm_ray.train.plan import halved
from tests.support.fail_at import FailAt, script
from tests.support.runs import PUZZLE, TEXT, hrm, last_said, puzzle_file, records, text_file, train

ROOT = Path(__file__).resolve().parents[2]


def test_the_errors_that_say_so() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_out_of_memory(other.value)
    assert not is_out_of_memory(ValueError("out of memory"))


@given(st.integers(1, 64), st.integers(1, 8))
def test_rows_keep_their_order_down_to_one(batch_size: int, accumulation: int) -> None:
    shape = BatchSize(batch_size, accumulation, 1, 3)
    columns = [{"inputs": micro[:, None], "active": micro >= 0} for micro in shape.slots()]
    sizes = [batch_size]
    while (rows := halved(sizes[-1])) is not None:
        assert rows <= sizes[-1] / 2 and sizes[-1] % rows == 0
        assert sizes[-1] % 2 or rows == sizes[-1] // 2
        sizes.append(rows)
        shape, columns = shape.with_batch(rows), split_microbatches(columns, rows)
        assert shape.effective == batch_size * accumulation * 3
        assert len(columns) == shape.accumulation
        for micro, slots in zip(columns, shape.slots(), strict=True):
            assert np.array_equal(micro["inputs"][:, 0], slots)
    assert sizes[-1] == 1


def failing(monkeypatch: pytest.MonkeyPatch, *failures: FailAt) -> None:
    """Every loop made from now on fails as scripted."""
    make = TrainingLoop.__init__

    def made(self: TrainingLoop, *words: Any, **named: Any) -> None:
        make(self, *words, **named)
        script(self, failures)

    monkeypatch.setattr(TrainingLoop, "__init__", made)


def shapes(bundle: Path) -> list[tuple[int, int, int]]:
    names = ("physical_batch_size", "gradient_accumulation_steps", "effective_batch_size")
    return [tuple(int(record[name]) for name in names) for record in records(bundle, "train")]  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["text", "puzzle"])
def test_the_run_goes_on_smaller_and_stays_so(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, words = (text_file(tmp_path), TEXT) if kind == "text" else (puzzle_file(tmp_path), PUZZLE)
    with monkeypatch.context() as patched:
        failing(patched, FailAt(0, 3, fits=2))
        train(data, tmp_path / "b", *words, "--steps", 4)
    assert shapes(tmp_path / "b") == [(4, 1, 4)] * 2 + [(2, 2, 4)] * 2
    told = [r["message"] for r in records(tmp_path / "b", "event") if "Out of memory" in str(r["message"])]
    assert len(told) == 1 and "micro-batches of 2" in str(told[0]) and "stays 4" in str(told[0])
    assert hrm("train", "--bundle-dir", tmp_path / "b", "--resume", "--steps", 6).code == 0
    assert shapes(tmp_path / "b")[4:] == [(2, 2, 4)] * 2
    # Saying the same again changes nothing; who asks for another cut than then gets it.
    for steps, rows, cut in ((8, 4, (2, 2, 4)), (10, 1, (1, 4, 4))):
        again = ("--resume", "--steps", steps, "--batch-size", rows, "--gradient-accumulation-steps", 4 // rows)
        assert hrm("train", "--bundle-dir", tmp_path / "b", *again).code == 0
        assert shapes(tmp_path / "b")[steps - 2 :] == [cut] * 2


def test_an_evaluation_goes_on_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures as with enough memory: the sums are over the same samples, in float64."""
    data = text_file(tmp_path)
    words = (*TEXT, "--steps", 2, "--eval-file", text_file(tmp_path, name="held.txt", seed=1))
    train(data, tmp_path / "enough", *words)
    genuine = evaluation._own_sums

    def short(objective: Any, held_out: Any, *more: Any) -> Any:
        if held_out.batch_size > 1:
            raise MemoryError
        return genuine(objective, held_out, *more)

    monkeypatch.setattr(evaluation, "_own_sums", short)
    train(data, tmp_path / "short", *words)
    enough, less = (records(tmp_path / name, "eval")[-1] for name in ("enough", "short"))
    assert less["loss"] == pytest.approx(enough["loss"], rel=1e-3)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("object store: out of memory")], ids=["host", "store"])
@pytest.mark.parametrize("place", ["training", "held-out"])
def test_memory_that_runs_out_while_reading_is_no_matter_of_the_batch(
    place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the run at once, as what it is: no smaller micro-batch is tried, none is advised."""
    data = text_file(tmp_path)
    words = (*TEXT, "--steps", 2, "--eval-file", text_file(tmp_path, name="held.txt", seed=1), "--eval-every", 1)

    def failing_read(*words: Any, **named: Any) -> Any:
        raise error

    if place == "training":
        monkeypatch.setattr(Window, "rows", failing_read)
    else:
        make = EvalSet.__init__

        def made(held_out: EvalSet, samples: Any, *words: Any) -> None:
            make(held_out, type("Unreadable", (), {"__len__": lambda _: 8, "rows": failing_read})(), *words)

        monkeypatch.setattr(EvalSet, "__init__", made)
    ran = hrm("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *last_said(words))
    assert ran.code == 4 and len(ran.faults) == 1, ran.err
    assert f"the {place} data: host memory ran out while reading" in ran.faults[0]
    assert not any(word in ran.err for word in ("--max-seq-len", "micro-batches of", "Traceback"))


def test_one_row_that_does_not_fit_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, FailAt(0, 3, fits=0))
    data = text_file(tmp_path)
    ran = hrm("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *TEXT, "--steps", 4, "--save-every", 1)
    assert ran.code == 4 and len(ran.faults) == 1
    assert "step 3" in ran.faults[0] and "micro-batch of 1" in ran.faults[0] and "--max-seq-len" in ran.faults[0]
    assert RunDir(tmp_path / "b").checkpoint_steps() == [1, 2]


LIMITED = """
import resource, sys
import torch
from hrm_ray.cli.main import main
from hrm_ray.train import session
torch.ones(64, 64) @ torch.ones(64, 64)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
now = int(status["VmSize"].split()[0]) * 1024
limit = now + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main(sys.argv[2:])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory as Linux does")
def test_under_a_real_limit(tmp_path: Path) -> None:
    """64 rows need far more than the limit, 8 rows less: the run finds its way by itself."""
    data = text_file(tmp_path, rows=4000)
    words = ("--dataset-file", data, "--bundle-dir", tmp_path / "b", "--hidden-size", 64, "--num-heads", 2,
             "--num-layers", 2, "--vocab-size", 300, "--max-seq-len", 512, "--batch-size", 64, "--threads", 1,
             "--launcher", "local", "--steps", 2, "--log-every", 1, "--no-amp",
             "--no-gradient-checkpointing")  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, "500", "train", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    seen = shapes(tmp_path / "b")
    assert len(seen) == 2 and seen[-1][0] < 64 and {effective for *_, effective in seen} == {64}, json.dumps(seen)
