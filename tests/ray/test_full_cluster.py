"""Commands on a running cluster that has room for one of them: real processes, as users start them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hrm_ray.rundir import RunDir
from tests.support.runs import TEXT, last_said, text_file

pytestmark = [pytest.mark.slow, pytest.mark.ray]

OPEN_TO_ALL = {**os.environ, "RAY_AUTH_MODE": "disabled"}
HEAD = """
import logging, sys, ray
context = ray.init(address="local", num_cpus=2, num_gpus=0, object_store_memory=100 * 2**20, _temp_dir=sys.argv[1],
                   logging_level=logging.ERROR, log_to_driver=False)
print("address", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
LONGEST_S = 240


@pytest.fixture
def two_cpus() -> Iterator[str]:
    """The address of a cluster with two CPUs: for one worker, and for Ray Data beside it."""
    temp = tempfile.mkdtemp(prefix="f")
    with subprocess.Popen(
        [sys.executable, "-c", HEAD, temp], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=OPEN_TO_ALL
    ) as head:
        assert head.stdout is not None
        yield next(line.split()[1] for line in head.stdout if line.startswith("address"))
        head.communicate()
    shutil.rmtree(temp, ignore_errors=True)


def test_runs_that_start_together_on_a_full_cluster_end_one_after_the_other(two_cpus: str, tmp_path: Path) -> None:
    """Each reads its text with Ray Data on a CPU that it has reserved. A third, too large for it, is told so."""
    data, temp = text_file(tmp_path), tmp_path / "t"
    temp.mkdir()

    def start(name: str, *more: str) -> subprocess.Popen[str]:
        words = [
            "--dataset-file",
            data,
            "--bundle-dir",
            tmp_path / name,
            *TEXT,
            "--linear-dataset",
            "--steps",
            3,
            *more,
        ]
        words += ["--launcher", "ray", "--ray-address", two_cpus]
        return subprocess.Popen(
            [sys.executable, "-m", "hrm_ray", "train", *map(str, last_said(words))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**OPEN_TO_ALL, "TMPDIR": str(temp)},
        )

    runs = [start(name, "--strict", "--wait-for-resources", "5m") for name in ("a", "b")]
    large = start("c", "--world-size", "3", "--dry-run")
    said, refusal = large.communicate(timeout=LONGEST_S)
    assert large.returncode == 4 and refusal.count("\n") == 1, refusal
    assert "--world-size 3" in refusal and "has room for 2" in refusal and "--wait-for-resources" in refusal
    needed, node = said.splitlines()[-2:]
    assert needed.startswith("3 workers, each") and node.split()[1:3] == ["2", "0"]
    ended = [run.communicate(timeout=LONGEST_S) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ended
    assert all(RunDir(tmp_path / name).checkpoint_steps() == [3] for name in ("a", "b"))
    waited = [out for out, _ in ended if "more at most" in out]
    assert len(waited) == 1, ended
    assert "reads and tokenises all" not in "".join(out for out, _ in ended)
    assert list(temp.glob("hrm-*")) == []
