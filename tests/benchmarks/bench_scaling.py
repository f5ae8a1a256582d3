"""Two workers of one core each against one worker of one core: what the collectives of a step cost.

`python -m tests.benchmarks.bench_scaling` trains the demonstration's sizes in rounds. In each round take turns: one
worker with the whole batch, one with half of it, two with half each that exchange nothing, and two under ddp. `of
linear` is half of the first time over the last; `collectives` is how much longer two take under ddp than two that
exchange nothing, which share the machine's memory in the same way. Both stand there by the wall, which wants a machine
with two cores to itself, and by the time of the CPU, which leaves out waits.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from hrm_ray.model.config import model_config
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.world import World
from tests.benchmarks.bench_cases import CASES, Case, RandomRows
from tests.benchmarks.timing import Spent, spent, summary, table

STEPS = 10
"""Steps of a round, a record after the last."""
WAYS = ("one, whole batch", "one, half batch", "two, no exchange", "two, ddp")


def build(case: Case, batch_size: int, world: World) -> TrainingLoop:
    """A loop of `world`."""
    settings = RunSettings.model_validate(
        {
            "model": case.model,
            "optimizer": {"batch_size": batch_size, "optimizer": case.optimizer},
            "memory": {"amp": False, "gradient_checkpointing": False},
        }
    )
    config = model_config(settings, case.vocab_size, seq_len=case.seq_len)
    return assemble(settings, config, RandomRows(case), world, 10**6)


def measure(rank: int, folder: str, name: str, rounds: int) -> None:
    """One of two gloo processes; the first trains the loops of one worker while the second waits."""
    os.environ |= {"LOCAL_RANK": str(rank), "USE_LIBUV": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    case, alone, both = CASES[name], World(0, 1, torch.device("cpu"), False), World.here("cpu", 1)
    half = case.batch_size // 2
    loops = [build(case, *each) for each in ((2 * half, alone), (half, alone), (half, alone), (half, both))]
    times: list[list[Spent]] = [[] for _ in WAYS]

    def train(loop: TrainingLoop) -> None:
        for _ in range(STEPS):
            loop.step()
        loop.flush_metrics()

    for number in range(rounds + 1):
        order = range(4) if number % 2 else range(3, -1, -1)
        for way in order:
            dist.barrier()
            if rank == 0 or way >= 2:
                taken = spent(lambda loop=loops[way]: train(loop))  # type: ignore[misc]
                # The first round makes optimizer state and warms caches.
                times[way] += [taken] if number else []
    if rank == 0:
        torch.save(times, Path(folder) / "result.pt")
    dist.barrier()
    os._exit(0)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["puzzle_demo", "puzzle_h128"])
    parser.add_argument("--rounds", type=int, default=21)
    said = parser.parse_args()
    rows = []
    for name in said.case:
        with tempfile.TemporaryDirectory() as folder:
            spawn(measure, (folder, name, said.rounds), nprocs=2)
            times = torch.load(Path(folder) / "result.pt", weights_only=False)
        for clock in ("wall_s", "cpu_s"):
            times_s = [[vars(taken)[clock] for taken in way] for way in times]
            whole, half, apart, ddp = times_s
            linear = summary([one / 2 / two for one, two in zip(whole, ddp, strict=True)])
            of_half = summary([one / two for one, two in zip(half, ddp, strict=True)])
            cost = summary([two / free for two, free in zip(ddp, apart, strict=True)])
            medians = [f"{1e3 * median(way) / STEPS:.1f}" for way in times_s]
            rows.append([f"{name}, {clock[:-2]}", *medians, linear.shown(2), of_half.shown(2), cost.shown(2)])
    print(f"ms per step of the first worker, medians of {said.rounds} rounds of {STEPS} steps")
    print(table(["case", *WAYS, "of linear", "one half / ddp", "collectives"], rows))


if __name__ == "__main__":
    main()
