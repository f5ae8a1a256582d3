"""Small training bodies for tests of the worker group, and a plan for them.

Each body is `(plan, link) -> RunResult`, runs inside a Ray Train worker and behaves in one known way.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from hrm_ray.data.prepare import PuzzlePlan
from hrm_ray.errors import DataError, Fault
from hrm_ray.model.config import model_config
from hrm_ray.settings.load import load_settings
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.train.plan import RunPlan
from hrm_ray.train.session import WorkerLink
from hrm_ray.types import DriverLink, Record, RunResult, StopReason


def plan_of(
    bundle: Path,
    *,
    steps: int = 300,
    world_size: int = 1,
    ray_address: str | None = None,
    max_failures: int = 0,
    options: Mapping[str, str] = MappingProxyType({}),
) -> RunPlan:
    """A plan for `bundle` whose settings and data no body looks at."""
    settings = resolve_task(load_settings({"--max-failures": str(max_failures), **options}), "lm", None)
    return RunPlan(
        settings=settings,
        config=model_config(settings, 16),
        data=PuzzlePlan("none", "all", None, None, None, None, rows=0, fingerprint=""),
        bundle=bundle,
        checkpoint=None,
        continues=False,
        schedule_steps=steps,
        adaptive_lr=None,
        device="cpu",
        world_size=world_size,
        threads=1,
        ray_address=ray_address,
        keep_freed_memory=False,
        notes=(),
        remarks=(),
    )


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def _sum_of_ones() -> float:
    import torch
    import torch.distributed as dist

    ones = torch.ones(1)
    dist.all_reduce(ones)
    return float(ones.item())


def counts(plan: RunPlan, link: DriverLink) -> RunResult:
    """The schedule's number of steps, one record each from rank 0; figures say what the worker found around it."""
    import torch

    entered_s = time.time()
    for step in range(1, plan.schedule_steps + 1):
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
    return RunResult(StopReason.FINISHED, plan.schedule_steps, 1, str(plan.bundle), figures)


def bad_data_on_rank_1(plan: RunPlan, link: DriverLink) -> RunResult:
    """Rank 1 meets bad data; the others wait for it in a collective."""
    if _rank() == 1:
        raise DataError(Fault("words.txt", "is not UTF-8 at byte 17", "Save it as UTF-8"))
    _sum_of_ones()
    return RunResult(StopReason.FINISHED, 0, 0, str(plan.bundle))


def value_error_after_records(plan: RunPlan, link: DriverLink) -> RunResult:
    """Three records, then an unforeseen error on every rank."""
    if _rank() == 0:
        for step in range(1, 4):
            link.sink().write(Record("train", step, time.time(), {"loss": 1.0}))
    raise ValueError(f"unforeseen in rank {_rank()}")


def killed_on_rank_1(plan: RunPlan, link: DriverLink) -> RunResult:
    """Rank 1 is killed as by the kernel; the others wait for it in a collective."""
    _sum_of_ones()
    if _rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _sum_of_ones()
    return RunResult(StopReason.FINISHED, 0, 0, str(plan.bundle))


def until_stopped(plan: RunPlan, link: DriverLink) -> RunResult:
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
            plan.bundle.joinpath(f"saved_{_rank()}").write_text(str(step))
            return RunResult(agreed, step, 0, str(plan.bundle), {"stop_seen_s": time.time()})
        beat.wait(0.02)


def stopped_on_rank_1(plan: RunPlan, link: WorkerLink) -> RunResult:
    """The schedule's number of steps; at the fortieth, rank 1 is stopped, once in this bundle."""
    stopped = plan.bundle / "stopped"
    beat = threading.Event()
    for step in range(1, plan.schedule_steps + 1):
        link.activity.step = step
        with link.activity.doing("step", then="records"):
            beat.wait(0.05)  # in two seconds of steps a heartbeat was sent
            if _rank() == 1 and step == 40 and not stopped.exists():
                stopped.touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            _sum_of_ones()
        if _rank() == 0:
            link.sink().write(Record("train", step, time.time(), {"loss": 1.0}))
    return RunResult(StopReason.FINISHED, plan.schedule_steps, 1, str(plan.bundle))


def fails_before_the_edge(config: object) -> None:
    """Stands in for the worker's entry: an error where the entry cannot catch and report it."""
    raise ImportError("an older copy stands in the way")
