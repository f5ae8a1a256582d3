"""A training body that writes down every row it is given, and dies where it is told: for audits of real runs.

Runs inside a training worker; what was written before a death stays.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from hrm_ray.train.loaders import HaltedSlots
from hrm_ray.train.loop import StepReport, TrainingLoop
from hrm_ray.train.plan import RunPlan
from hrm_ray.train.session import WorkerLink, train
from hrm_ray.train.stream_loader import StreamLoader
from hrm_ray.types import Columns, RunResult, StopReason


def recorded(plan: RunPlan, link: WorkerLink, *, folder: Path, die_at: tuple[int, int] | None = None) -> RunResult:
    """`train`, with the rows of each step in `folder`/{rank}.jsonl; at rank and step of `die_at` a worker kills itself,
    before it trains on that step's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    real = StreamLoader.next_batch

    def offering(loader: StreamLoader, halted: HaltedSlots, step: int) -> list[Columns]:
        micro_batches = real(loader, halted, step)
        rank = loader.shape.rank
        if (rank, step) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        rows = [tokens for micro in micro_batches for tokens in micro["inputs"][micro["active"]].tolist()]
        with (folder / f"{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "rows": rows}) + "\n")
        return micro_batches

    StreamLoader.next_batch = offering  # type: ignore[method-assign]
    try:
        return train(plan, link)
    finally:
        StreamLoader.next_batch = real  # type: ignore[method-assign]


def recorded_by_attempt(plan: RunPlan, link: WorkerLink, *, folder: Path, halts: Mapping[int, int]) -> RunResult:
    """`recorded`, each attempt in a folder of its own. Before the step that `halts` names for an attempt rank 0 waits
    until the workers are to make way for more, or its group is ended."""
    real = TrainingLoop.step

    def waiting(loop: TrainingLoop) -> StepReport | None:
        if loop.world.leads and loop.progress.step + 1 == halts.get(plan.attempt):
            while link.stop_requested() is not StopReason.RESIZE:
                threading.Event().wait(0.05)
        return real(loop)

    TrainingLoop.step = waiting  # type: ignore[method-assign]
    try:
        return recorded(plan, link, folder=folder / str(plan.attempt))
    finally:
        TrainingLoop.step = real  # type: ignore[method-assign]


def rows_by_step(folder: Path, ranks: Sequence[int]) -> dict[int, list[tuple[int, ...]]]:
    """What was recorded: the rows of each step, rank after rank."""
    found: dict[int, list[tuple[int, ...]]] = {}
    for rank in ranks:
        for line in (folder / f"{rank}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).extend(tuple(row) for row in record["rows"])
    return {step: rows for step, rows in found.items() if rows}
