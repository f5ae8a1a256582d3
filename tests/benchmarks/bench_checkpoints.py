"""What checkpoints cost: written at once, and by a thread while training goes on.

`python -m tests.benchmarks.bench_checkpoints` trains the demonstration's models and one of 30 million parameters. Each
round makes steps without a save, a save at once, and a save in the background with the steps until it is whole, in an
order that changes; what a save costs is the time for which training waits, and what the steps beside it take longer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hrm_ray.rundir import RunDir
from hrm_ray.train import checkpoint_write
from hrm_ray.train.checkpoint import Checkpointer
from hrm_ray.train.loop import TrainingLoop
from tests.benchmarks.bench_cases import CASES, Case, build_loop
from tests.benchmarks.timing import summary, table

SAVE_EVERY = 200
"""The default of --save-every."""
WARM_UP_STEPS = 2
_TEXT = CASES["text_m2"].model
MEASURED: dict[str, Case] = {
    "puzzle_demo": CASES["puzzle_demo"],
    "text_demo": Case(
        "the demonstration's text model: hidden 128, 1+1 layers, vocabulary 2048, 8 x 128 tokens, 2 segments",
        {**_TEXT, "hidden_size": 128, "h_layers": 1, "l_layers": 1},
        *(2048, 128, 8, 1_048_834),
    ),
    "text_30m": Case(
        "ACTv1 on text, hidden 640, vocabulary 8192, 8 x 128 tokens, 2 segments",
        {**_TEXT, "hidden_size": 640, "num_heads": 10},
        *(8192, 128, 8, 30_803_202),
    ),
}


@dataclass(frozen=True)
class Round:
    """Seconds of one round; those of a save in the background: until training goes on, at its end, and beside it."""

    step_s: float
    at_once_s: float
    begin_s: float
    end_s: float
    beside_s: list[float]

    @property
    def cost_s(self) -> float:
        """What a save in the background takes from training."""
        return self.begin_s + self.end_s + sum(beside_s - self.step_s for beside_s in self.beside_s)


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(loop: TrainingLoop, folder: Path, steps: int, rounds: int) -> list[Round]:
    """Rounds on one loop; checkpoints go into `folder`."""
    checkpointer = Checkpointer(loop, RunDir(folder), keep=1)
    checkpoint_write.AT_ONCE_BYTES = 0
    found: dict[str, list[float]] = {}
    beside: list[list[float]] = []

    def plain() -> None:
        found.setdefault("step", []).append(statistics.median(seconds(loop.step) for _ in range(steps)))

    def at_once() -> None:
        loop.step()
        found.setdefault("at once", []).append(seconds(lambda: checkpointer.save({})))

    def in_background() -> None:
        loop.step()
        found.setdefault("begin", []).append(seconds(lambda: checkpointer.save({}, background=True)))
        beside.append([])
        while not checkpointer.written():
            beside[-1].append(seconds(loop.step))
        found.setdefault("end", []).append(seconds(checkpointer.finish))

    works = [plain, at_once, in_background]
    for number in range(rounds):
        for work in works[number % 3 :] + works[: number % 3]:
            work()
    parts = [found[name] for name in ("step", "at once", "begin", "end")]
    return [Round(step, once, begin, end, of) for step, once, begin, end, of in zip(*parts, beside, strict=True)]


def main() -> None:
    """Run and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", default=",".join(MEASURED), help="names of models, with commas between them")
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--steps", type=int, default=3, help="steps without a save in each round")
    options.add_argument("--threads", type=int, default=1)
    said = options.parse_args()
    rows = []
    for name in said.only.split(","):
        case = MEASURED[name]
        loop = build_loop(case, said.threads)
        for _ in range(WARM_UP_STEPS):
            loop.step()
        files = loop.parts.strategy.state_files()
        size_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        with tempfile.TemporaryDirectory(prefix="hrm-ray-bench-") as folder:
            rounds = measure(loop, Path(folder), said.steps, said.rounds)
        share = [100 * one.at_once_s / (one.at_once_s + SAVE_EVERY * one.step_s) for one in rounds]
        share_beside = [100 * one.cost_s / (one.cost_s + SAVE_EVERY * one.step_s) for one in rounds]
        beside = [beside_s / one.step_s for one in rounds for beside_s in one.beside_s]
        rows.append(
            (
                f"{name}, {size_bytes / 1e6:.0f} MB",
                summary([one.step_s * 1e3 for one in rounds]).shown(0),
                summary([one.at_once_s * 1e3 for one in rounds]).shown(0),
                summary([(one.begin_s + one.end_s) * 1e3 for one in rounds]).shown(0),
                summary(beside).shown(2),
                summary(share).shown(2),
                summary(share_beside).shown(2),
            )
        )
    titles = ("", "step ms", "at once ms", "thread: waits ms", "steps beside it", "share % at once", "share % thread")
    print(f"median and 95 % interval of {said.rounds} rounds, {said.threads} threads")
    print(table(titles, rows))
    print(f"shares with a save every {SAVE_EVERY} steps; load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
