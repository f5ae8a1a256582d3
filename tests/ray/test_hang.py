"""A worker that hangs, on a real cluster: it is told and ended, the stacks are written, and the run goes on."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from hrm_ray.orchestration import worker_group
from hrm_ray.types import StopReason
from tests.ray.test_worker_group import Received, needs_two_cpus, never, nothing_is_left, temp_root  # noqa: F401
from tests.support.ray_bodies import plan_of, stopped_on_rank_1


@pytest.mark.ray
@pytest.mark.slow
@needs_two_cpus
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
def test_a_stopped_worker_is_told_and_ended_and_the_run_goes_on(temp_root: Path, tmp_path: Path) -> None:  # noqa: F811
    """Without the watch this lasts for minutes: the other rank waits in its collective."""
    received = Received()
    plan = plan_of(tmp_path, steps=60, world_size=2, max_failures=1, options={"--hang-after": "6s"})
    result = worker_group.run(plan, sink=received, stop=never, body=stopped_on_rank_1)
    assert (result.reason, result.step) == (StopReason.FINISHED, 60)
    warning, restart = [record for record in received.records if record.kind == "event"]
    stopped_s = (tmp_path / "stopped").stat().st_mtime
    assert "in step 40: rank 1 " in str(warning.values["message"]) and warning.time_s - stopped_s < 15
    told = "hang at step 39 .worker 1: no progress for .* s in step 40; pid .* does not answer \\(it was stopped\\)"
    assert re.match(told, str(restart.values["message"])) and restart.time_s - stopped_s < 60
    report = (tmp_path / "stacks.txt").read_text(encoding="utf-8")
    assert "_sum_of_ones" in report and "no stacks: the process did not answer" in report
