"""Small training bodies for tests of the gang: each is `(plan, link) -> RunResult`, run inside a Ray Train worker.

One job: behave in one known way. Each imports what it needs inside, as the worker does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from hrm_ray.errors import DataError, Fault
from hrm_ray.types import DriverLink, Record, RunResult, StopReason


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def _sum_of_ones() -> float:
    import torch
    import torch.distributed as dist

    ones = torch.ones(1)
    dist.all_reduce(ones)
    return float(ones.item())


def counts(plan: dict[str, Any], link: DriverLink) -> RunResult:
    """`plan["steps"]` steps, one record each from rank 0; figures say what the worker found around it."""
    import torch

    entered_s = time.time()
    for step in range(1, int(plan["steps"]) + 1):
        if _rank() == 0:
            link.sink().write(Record("train", step, time.time(), {"loss": 1.0 / step}))
    if _rank() == 0:
        print("worker says hello on stdout")
    figures = {
        "sum": _sum_of_ones(),
        "torch_threads": float(torch.get_num_threads()),
        "entered_s": entered_s,
        "omp": float(os.environ["OMP_NUM_THREADS"]),
    }
    return RunResult(StopReason.FINISHED, int(plan["steps"]), 1, str(plan["bundle"]), figures)


def bad_data_on_rank_1(plan: dict[str, Any], link: DriverLink) -> RunResult:
    """Rank 1 meets bad data; the others wait for it in a collective."""
    if _rank() == 1:
        raise DataError(Fault("words.txt", "is not UTF-8 at byte 17", "Save it as UTF-8"))
    _sum_of_ones()
    return RunResult(StopReason.FINISHED, 0, 0, str(plan["bundle"]))


def value_error_after_records(plan: dict[str, Any], link: DriverLink) -> RunResult:
    """Three records, then an unforeseen error on every rank."""
    if _rank() == 0:
        for step in range(1, 4):
            link.sink().write(Record("train", step, time.time(), {"loss": 1.0}))
    raise ValueError(f"unforeseen in rank {_rank()}")


def killed_on_rank_1(plan: dict[str, Any], link: DriverLink) -> RunResult:
    """Rank 1 is killed as by the kernel; the others wait for it in a collective."""
    _sum_of_ones()
    if _rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _sum_of_ones()
    return RunResult(StopReason.FINISHED, 0, 0, str(plan["bundle"]))


def until_stopped(plan: dict[str, Any], link: DriverLink) -> RunResult:
    """Steps of 20 ms until the driver asks to stop; every rank leaves at the same step."""
    import torch
    import torch.distributed as dist

    beat = threading.Event()
    step = 0
    while True:
        step += 1
        reason = link.stop_requested()
        flag = torch.tensor([0 if reason is None or _rank() else 1 + list(StopReason).index(reason)])
        dist.all_reduce(flag)
        if _rank() == 0:
            link.sink().write(Record("train", step, time.time(), {"loss": 1.0}))
        if int(flag.item()):
            agreed = list(StopReason)[int(flag.item()) - 1]
            Path(plan["bundle"]).joinpath(f"saved_{_rank()}").write_text(str(step))
            return RunResult(agreed, step, 0, str(plan["bundle"]), {"stop_seen_s": time.time()})
        beat.wait(0.02)


def fails_before_the_edge(config: dict[str, Any]) -> None:
    """Stands in for the worker's entry: an error where the entry cannot catch and report it."""
    raise ImportError("an older copy stands in the way")
