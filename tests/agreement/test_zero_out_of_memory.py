"""Under ZeRO 2 and 3 a rank that runs out of memory ends, and so does the other, which waits for it in a pass.

The error is the one that is mended by a restart with half the micro-batch (launch/restarts.py).
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hrm_ray.errors import DeviceMemoryError
from hrm_ray.launch.restarts import Cause, cause_of
from hrm_ray.train.world import collectives_begun
from tests.support.fail_at import FailAt, script
from tests.support.strategy_runs import Case, loop_of

pytestmark = [pytest.mark.agreement, pytest.mark.slow]

WAIT_S = 600
"""How long a collective may wait: the test ends long before, because the connection breaks."""


def spawned(rank: int, folder: str, strategy: str) -> None:
    """A gloo process that trains one step, and in the second runs out of memory on rank 1 after its first pass."""
    os.environ |= {"USE_LIBUV": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=WAIT_S), rank=rank, world_size=2)
    _, loop = loop_of(Case("text"), strategy, "2x2x2")
    script(loop, [FailAt(rank=1, step=2, fits=1, passes=1)])
    loop.step()
    begun: list[int | None] = []
    segment: Any = loop.parts.strategy.segment

    def noted(batch: Any, carry: Any) -> Any:
        begun.append(collectives_begun())
        return segment(batch, carry)

    loop.parts.strategy.segment = noted  # type: ignore[method-assign]
    found: dict[str, Any] = {"said": "nothing"}
    try:
        loop.step()
    except DeviceMemoryError as error:
        found = {"said": str(error), "cause": cause_of(error).value, "entered": collectives_begun() != begun[-1]}
    except RuntimeError as error:
        found = {"said": str(error)}
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    os._exit(0)


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp"])
def test_both_ranks_end(tmp_path: Path, strategy: str) -> None:
    mp.spawn(spawned, (str(tmp_path), strategy), nprocs=2)
    waiting, failed = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert failed["cause"] == Cause.OUT_OF_MEMORY.value
    assert not failed["entered"], "no collective after the failure"
    assert "micro-batch of 2" in failed["said"] and len(failed["said"]) < 300
    assert "onnection" in waiting["said"], waiting
