"""Scripted faults as data, and a training body that brings them about inside a worker. Nothing in the product knows.

A fault happens once, in the attempt with its number (0 is the first), when its rank begins the step.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import psutil

from hrm_ray.errors import DataError, DeviceMemoryError, UnreadableError
from hrm_ray.errors import Fault as Message
from hrm_ray.train import checkpoint_write
from hrm_ray.train.loop import StepReport, TrainingLoop
from hrm_ray.train.plan import RunPlan
from hrm_ray.train.session import WorkerLink, train
from hrm_ray.types import Columns, RunResult

Kind: TypeAlias = Literal[
    "sigkill",
    "sigkill all",
    "sigstop",
    "raise",
    "oom",
    "disk",
    "unreadable",
    "data",
    "monitor",
    "controller",
    "chunk server",
    "raylet",
    "gcs",
]
ALIKE: tuple[Kind, ...] = ("unreadable", "data")
"""Faults of the data, which all ranks have at once: the server of chunks gives each the same error."""
STUCK_S = 120.0
"""A rank that has killed another process waits so long for its own end."""
_TITLES: dict[str, str] = {
    "sigkill all": "ray::RayTrainWorker",
    "monitor": "ray::RunMonitor",
    "controller": "ray::TrainController",
    "chunk server": "ray::ChunkServer",
    "raylet": "raylet",
    "gcs": "gcs_server",
}
"""What the processes are called that a fault kills."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, on which rank (those of ALIKE: on all) and at which step; `attempt` None: in every attempt."""

    rank: int
    step: int
    kind: Kind
    attempt: int | None = 0


def fail_at(rank: int = 0, step: int = 2, kind: Kind = "sigkill", attempt: int | None = 0) -> Fault:
    """A fault that a test writes by hand."""
    return Fault(rank, step, kind, attempt)


BATCHES_AHEAD = 12
SURVIVED: tuple[Kind, ...] = (
    *("sigkill", "sigkill all", "raise", "disk", "unreadable", "monitor", "controller", "chunk server"),
    *("raylet", "gcs"),
)
"""Faults of a private cluster on one machine after which a run goes on by itself."""


def random_faults(seed: int, count: int, *, ranks: int = 2, kinds: Sequence[Kind] = SURVIVED) -> list[Fault]:
    """One fault for each of `count` attempts, each two to four steps after the one before; every kind at least once
    where there are enough."""
    chosen = random.Random(seed)
    order = [*kinds]
    chosen.shuffle(order)
    order = (order + chosen.choices(kinds, k=count))[:count]
    step, faults = 1, list[Fault]()
    for attempt, kind in enumerate(order):
        # Batches that have been made already are trained without the server of chunks.
        step += chosen.randint(2, 4) + (BATCHES_AHEAD if order[attempt - 1] == "chunk server" and attempt else 0)
        faults.append(Fault(chosen.randrange(ranks), step, kind, attempt))
    return faults


@dataclass(frozen=True)
class Faulty:
    """A training body with faults. With `rows` the rows of each step are written to `rows`/{rank}.jsonl; with
    `in_background` a thread writes checkpoints of any size."""

    faults: Sequence[Fault] = ()
    rows: Path | None = field(default=None, kw_only=True)
    in_background: bool = field(default=False, kw_only=True)

    def __call__(self, plan: RunPlan, link: WorkerLink) -> RunResult:
        attempt, real, next_batch = len(plan.ended), TrainingLoop.step, TrainingLoop._next_batch
        due = [fault for fault in self.faults if fault.attempt in (None, attempt)]

        def step(loop: TrainingLoop) -> StepReport | None:
            for fault in due:
                if fault.step == loop.progress.step + 1 and (fault.rank == loop.world.rank or fault.kind in ALIKE):
                    happen(fault.kind)
            return real(loop)

        def recorded(loop: TrainingLoop, number: int) -> list[Columns]:
            columns = next_batch(loop, number)
            if self.rows is not None:
                taken = [row for micro in columns for row in micro["inputs"][micro["active"]].tolist()]
                self.rows.mkdir(parents=True, exist_ok=True)
                with (self.rows / f"{loop.world.rank}.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"attempt": attempt, "step": number, "rows": taken}) + "\n")
            return columns

        at_once_bytes = checkpoint_write.AT_ONCE_BYTES
        if self.in_background:
            checkpoint_write.AT_ONCE_BYTES = 0
        TrainingLoop.step, TrainingLoop._next_batch = step, recorded  # type: ignore[assignment, method-assign]
        try:
            return train(plan, link)
        finally:
            TrainingLoop.step, TrainingLoop._next_batch = real, next_batch  # type: ignore[method-assign]
            checkpoint_write.AT_ONCE_BYTES = at_once_bytes


def happen(kind: Kind) -> None:
    """Bring a fault about, in this process or in one of its cluster."""
    if kind in ("sigkill", "sigstop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "sigkill" else signal.SIGSTOP)
    if kind == "raise":
        raise ValueError("scripted")
    if kind == "oom":
        raise DeviceMemoryError(Message("step", "scripted: out of memory", ""))
    if kind == "disk":
        raise OSError(errno.ENOSPC, "scripted: no space left on device")
    if kind == "unreadable":
        raise UnreadableError(Message("corpus.txt", "scripted: input/output error", "Look at the file system"))
    if kind == "data":
        raise DataError(Message("corpus.txt", "scripted: is cut short", "Copy it again"))
    for process in of_this_cluster(_TITLES[kind]):
        with suppress(psutil.Error):
            process.kill()
    if kind == "chunk server":
        return  # The ranks notice it when they ask for more.
    # No further: how many steps it would still make is chance.
    threading.Event().wait(STUCK_S)


def of_this_cluster(title: str) -> list[psutil.Process]:
    """Processes of this worker's cluster on this machine whose name is or begins with `title`; this one comes last."""
    raylet = psutil.Process().parent()
    driver = None if raylet is None else raylet.parent()
    found = [] if driver is None else driver.children(recursive=True)
    named = []
    for process in found:
        with suppress(psutil.Error):
            line = process.cmdline()
            if line and (line[0].startswith(title) or Path(line[0]).name == title):
                named.append(process)
    return sorted(named, key=lambda process: process.pid == os.getpid())


def rows_by_step(folder: Path) -> dict[int, list[tuple[int, ...]]]:
    """What was recorded: the rows of each step, rank after rank, from the last attempt that made the step."""
    found: dict[int, dict[int, list[tuple[int, ...]]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            found.setdefault(entry["step"], {})[int(path.stem)] = [tuple(row) for row in entry["rows"]]
    joined = {step: [row for rank in sorted(ranks) for row in ranks[rank]] for step, ranks in sorted(found.items())}
    return {step: rows for step, rows in joined.items() if rows}
