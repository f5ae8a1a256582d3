"""--memory-budget: what needs more is refused, and what takes more in a run is out of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hrm_ray.settings.size import bytes_of
from hrm_ray.train.out_of_memory import is_out_of_memory
from tests.support.runs import TEXT, last_said, refused, text_file

enforced = pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited on Linux alone")


@pytest.mark.parametrize(
    ("text", "size"),
    [("900MB", 900_000_000), ("1.5gb", 1_500_000_000), ("8 GiB", 8 * 2**30), ("24G", 24 * 10**9), ("64kB", 64_000)],
)
def test_a_size(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", "0GB", "1e3GB", "1GB2", "inf GB", "99999TB", ""])
def test_no_size(text: str) -> None:
    assert bytes_of(text) is None


@pytest.mark.parametrize(
    ("words", "code", "naming"),
    [
        (("--memory-budget", "5"), 2, ("--memory-budget 5", "not a size", "1.5GB")),
        (("--memory-budget", "300MB"), 4, ("--memory-budget 300MB", "without any model")),
        (("--memory-budget", "440MB", "--batch-size", "4096"), 4, ("memory", "--memory-budget 440MB", "smaller")),
    ],
)
def test_what_a_budget_has_no_room_for_is_refused(
    words: tuple[str, ...], code: int, naming: tuple[str, ...], tmp_path: Path
) -> None:
    command = ("train", "--dataset-file", text_file(tmp_path), "--bundle-dir", tmp_path / "b")
    refused(code, *command, *last_said((*TEXT, "--device", "cpu", *words)), naming=naming)
    assert not (tmp_path / "b").exists()


LIMITED = """
import sys
from pathlib import Path
import psutil, pytest, torch
from hrm_ray.train.host_memory import room_for_copy
from hrm_ray.train.memory_limit import can_limit, limit_memory, memory_left_bytes
from hrm_ray.train.out_of_memory import is_out_of_memory
from tests.support.runs import TEXT, hrm, last_said, records, text_file

assert can_limit("cpu") and not can_limit("mps")
undo = limit_memory(psutil.Process().memory_info().rss + 50_000_000, "cpu")
left = memory_left_bytes()
assert left is not None and left <= 120_000_000 and not room_for_copy(130_000_000, 1)
try:
    torch.ones(400_000_000, dtype=torch.uint8)
    raised = None
except RuntimeError as error:
    raised = error
undo()
assert raised is not None and is_out_of_memory(raised), raised
assert torch.ones(400_000_000, dtype=torch.uint8).all() and memory_left_bytes() is None

# What an estimate would refuse: here the run itself is to meet the limit.
folder = Path(sys.argv[1])
with pytest.MonkeyPatch.context() as patch:
    patch.setattr("hrm_ray.launch.preflight._within_budget", lambda available, settings, device: available)
    budget = f"{(psutil.Process().memory_info().rss + 100_000_000) // 1000}kB"
    words = last_said((*TEXT, "--batch-size", "128", "--max-seq-len", "256", "--steps", "1", "--memory-budget", budget))
    data = text_file(folder, rows=2400)
    ran = hrm("train", "--dataset-file", data, "--bundle-dir", folder / "b", *words, "--no-keep-freed-memory")
assert ran.code == 0, ran.err
(step,) = records(folder / "b")
assert step["physical_batch_size"] < 128 and step["effective_batch_size"] == 128, step
"""


@enforced
def test_the_limit_holds_until_it_is_undone_and_a_run_under_it_halves_its_micro_batches(tmp_path: Path) -> None:
    """In a process of its own: what earlier tests have freed may be taken without asking the system."""
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_thread_that_finds_no_room_is_out_of_memory() -> None:
    assert is_out_of_memory(RuntimeError("can't start new thread"))
