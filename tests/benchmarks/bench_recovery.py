"""Seconds to the first step, and from the end of a worker to the next step, part by part:
`python -m tests.benchmarks.bench_recovery`.

A run on Ray workers of one thread each loses one of them again and again. The workers write down when they are
entered and when their first step begins and ends; the driver when it decides. The parts:

  * noticed: from SIGKILL of a rank to the driver's decision (what Ray and this project need to find it);
  * processes: to the start of the new workers' processes (the old group's end, actors, placement, by Ray);
  * entered: to the first line of this project in a worker (Python, Ray and torch are imported, the process group made);
  * built: to the first step (checkpoint read, model and loader built);
  * step: the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest import mock

import psutil

from hrm_ray.launch import resources
from hrm_ray.orchestration import worker_group
from hrm_ray.train.loop import StepReport, TrainingLoop
from hrm_ray.train.plan import RunPlan
from hrm_ray.train.session import WorkerLink, train
from hrm_ray.types import Record, RunResult
from tests.benchmarks.timing import summary, table
from tests.chaos import plan_of
from tests.support.faults import Fault, fail_at, happen

PARTS = ("noticed", "processes", "entered", "built", "step")
STEPS_BETWEEN = 5
"""Steps between two faults."""


@dataclass(frozen=True)
class Timed:
    """A training body with faults, which appends to `folder`/{rank}.jsonl when what of an attempt happened."""

    faults: tuple[Fault, ...]
    folder: Path

    def __call__(self, plan: RunPlan, link: WorkerLink) -> RunResult:
        attempt, real = len(plan.ended), TrainingLoop.step
        seen: set[str] = set()

        def write(rank: int, what: str, time_s: float) -> None:
            if what not in seen:
                seen.add(what)
                with (self.folder / f"{rank}.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"attempt": attempt, "what": what, "time_s": time_s}) + "\n")

        entered_s = time.time()

        def step(loop: TrainingLoop) -> StepReport | None:
            rank = loop.world.rank
            write(rank, "process", psutil.Process().create_time())
            write(rank, "entered", entered_s)
            write(rank, "first step", time.time())
            if any(f.attempt == attempt and f.step == loop.progress.step + 1 and f.rank == rank for f in self.faults):
                write(rank, "fault", time.time())
                happen("sigkill")
            report = real(loop)
            write(rank, "stepped", time.time())
            return report

        TrainingLoop.step = step  # type: ignore[method-assign, assignment]
        try:
            return train(plan, link)
        finally:
            TrainingLoop.step = real  # type: ignore[method-assign]


class Decisions:
    """A display that keeps when the driver decided on a restart."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def write(self, record: Record) -> None:
        if record.kind == "event" and "of at most" in str(record.values["message"]):
            self.at_s.append(record.time_s)

    def close(self) -> None:
        pass


def measure(folder: Path, workers: int, count: int) -> tuple[list[list[float]], list[float]]:
    """The parts of each recovery in seconds, and those of the first start: from its request to the first step."""
    faults = tuple(
        fail_at(number % workers, STEPS_BETWEEN * (number + 1) + 1, attempt=number) for number in range(count)
    )
    strategy = "single" if workers == 1 else "ddp"
    steps, name = STEPS_BETWEEN * (count + 1), f"{workers}-workers"
    plan, marks = plan_of(folder, name, steps, count, strategy, world_size=workers), folder / f"{name}-marks"
    marks.mkdir()
    decisions, begun_s = Decisions(), time.time()
    result = worker_group.run(plan, sink=decisions, stop=lambda: None, body=Timed(faults, marks))
    if len(result.restarts) != count:
        raise RuntimeError(f"{len(result.restarts)} restarts after {count} faults")
    at: dict[tuple[int, str], list[float]] = {}
    for path in marks.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            at.setdefault((entry["attempt"], entry["what"]), []).append(entry["time_s"])

    def last(attempt: int, what: str) -> float:
        return max(at[attempt, what])

    starts = []
    for attempt in range(count + 1):
        began = [begun_s] if not attempt else [last(attempt - 1, "fault"), decisions.at_s[attempt - 1]]
        times = [*began, *(last(attempt, what) for what in ("process", "entered", "first step", "stepped"))]
        starts.append([later - earlier for earlier, later in pairwise(times)])
    return starts[1:], starts[0]


def main() -> None:
    """Run and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--faults", type=int, default=6)
    said = options.parse_args()
    again, first = [], []
    cpus = max(*said.workers, resources.usable_cpus())
    with (
        tempfile.TemporaryDirectory(prefix="hrm-ray-bench-") as folder,
        mock.patch.object(os, "sched_getaffinity", lambda pid: set(range(cpus))),
    ):
        for workers in said.workers:
            recoveries, start = measure(Path(folder), workers, said.faults)
            columns = [*zip(*recoveries, strict=True), [sum(parts) for parts in recoveries]]
            again.append([str(workers), *(summary(column).shown(1) for column in columns)])
            first.append([str(workers), *(f"{part_s:.1f}" for part_s in (*start, sum(start)))])
    print(f"seconds from SIGKILL of one worker to the end of the next step, medians of {said.faults} [interval]")
    print(table(("workers", *PARTS, "whole"), again))
    print("\nseconds of the first start, from the request of workers on (Ray starts in the first part)")
    print(table(("workers", *PARTS[1:], "whole"), first))
    print(f"{resources.usable_cpus()} CPUs, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
