"""Event files, read back with TensorBoard's own loader."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from hrm_ray.metrics.tensorboard import TensorBoardSink
from hrm_ray.types import Record


def _loaded(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def _train(step: int, loss: float) -> Record:
    return Record("train", step, 1000.0 + step, {"loss": loss})


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in _loaded(folder).Scalars(tag)]


def test_scalars_lists_and_text(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "tensorboard")
    sink.write(Record("train", 5, 1005.0, {"loss": 0.5, "epoch": 2, "ok": True, "parts": [1.0, 2.0]}))
    sink.write(Record("eval", 5, 1006.0, {"loss": math.nan}))
    sink.write(Record("event", 6, 1007.0, {"level": "WARNING", "message": "Größe", "batch": 3}))
    sink.close()
    sink.close()
    loaded = _loaded(tmp_path / "tensorboard")
    assert set(loaded.Tags()["scalars"]) == {
        "train/loss", "train/epoch", "train/ok", "train/parts/0", "train/parts/1", "eval/loss"
    }  # fmt: skip
    assert [(event.wall_time, event.step, event.value) for event in loaded.Scalars("train/loss")] == [(1005.0, 5, 0.5)]
    assert [event.value for event in loaded.Scalars("train/parts/1")] == [2.0]
    assert math.isnan(loaded.Scalars("eval/loss")[0].value)
    (event,) = loaded.Tensors("event")
    assert event.step == 6
    assert make_ndarray(event.tensor_proto).tolist() == ["WARNING: Größe\n\nbatch = 3".encode()]
    assert loaded.SummaryMetadata("event").plugin_data.plugin_name == "text"


def test_resumed_run_hides_later_steps_of_the_first(tmp_path: Path) -> None:
    """Both files come about within the same second, and the first ends in a record cut short by a kill."""
    first = TensorBoardSink(tmp_path)
    for step in range(1, 6):
        first.write(_train(step, loss=1.0))
    first.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    assert [step for step, _ in _scalars(tmp_path, "train/loss")] == [1, 2, 3, 4]
    second = TensorBoardSink(tmp_path, resume_step=2)
    second.write(_train(3, loss=2.0))
    second.close()
    assert _scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_each_write_is_on_disk_at_once(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(_train(1, loss=1.0))
    assert _scalars(tmp_path, "train/loss") == [(1, 1.0)]
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.write(_train(2, loss=1.0))


def test_metrics_import_neither_torch_nor_tensorflow_nor_ray() -> None:
    code = (
        "import sys; from hrm_ray.metrics import console, fanout, jsonl, meters, plots; early = set(sys.modules);"
        "from hrm_ray.metrics import tensorboard;"
        "print(sorted({'torch', 'tensorflow', 'ray'} & set(sys.modules)), 'matplotlib' in early)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] False"
