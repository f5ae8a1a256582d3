"""Bytes and time per step of every strategy on gloo processes of one core each.

`python -m tests.benchmarks.bench_strategies --ranks 2` trains the same text model under each strategy, in rounds that
take turns within one pair of processes, and prints a table: bytes of a rank at rest (after a step, by storage), what
theory says, and the time against ddp in the same round.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from hrm_ray.model.config import model_config
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.memory_estimate import DIVIDED
from hrm_ray.train.storage_tracker import storage_bytes
from hrm_ray.train.world import World
from tests.benchmarks.bench_cases import CASES, RandomRows
from tests.benchmarks.timing import spent, summary, table

STRATEGIES = ("ddp", *DIVIDED)
STEPS = 2
"""Steps of a round."""


def build(strategy: str, ranks: int) -> TrainingLoop:
    """The loop of this rank; the effective batch is that of the case."""
    case = CASES["text_m1"]
    settings = RunSettings.model_validate(
        {
            "model": case.model,
            "optimizer": {"batch_size": case.batch_size // ranks, "optimizer": "adamw"},
            "memory": {"amp": False, "gradient_checkpointing": False},
            "cluster": {"strategy": strategy},
        }
    )
    config = model_config(settings, case.vocab_size, seq_len=case.seq_len)
    return assemble(settings, config, RandomRows(case), World.here("cpu", 1), 1000)


def tensors_alive() -> list[Tensor]:
    """Every tensor of this process, views of parameters' data and state included."""
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, Tensor)]


def measure(rank: int, ranks: int, folder: str, rounds: int) -> None:
    """One gloo process."""
    os.environ |= {"LOCAL_RANK": str(rank), "USE_LIBUV": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    bytes_at_rest: dict[str, int] = {}
    times_s: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
    loops: dict[str, TrainingLoop] = {}
    for strategy in STRATEGIES:
        before = storage_bytes(tensors_alive())
        loops[strategy] = build(strategy, ranks)
        for _ in range(STEPS):
            loops[strategy].step()
        bytes_at_rest[strategy] = storage_bytes(tensors_alive()) - before
    for number in range(rounds):
        order = STRATEGIES if number % 2 else STRATEGIES[::-1]
        for strategy in order:
            dist.barrier()
            taken = spent(lambda loop=loops[strategy]: [loop.step() for _ in range(STEPS)])  # type: ignore[misc]
            times_s[strategy].append(taken.wall_s / STEPS)
    if rank == 0:
        torch.save((bytes_at_rest, times_s), Path(folder) / "result.pt")
    dist.barrier()
    os._exit(0)


def theory(strategy: str, ranks: int) -> float:
    """Bytes of a parameter on each rank at rest in float32 with two moments; gradients are freed after a step."""
    divided = DIVIDED.get(strategy, ())
    weights = 4.0 / (ranks if "weights" in divided else 1)
    moments = 8.0 / (ranks if "optimizer" in divided else 1)
    copies = 4.0 / ranks if strategy.startswith("zero") else 0.0
    # Stage 3 keeps the buffer of its part of the gradients between steps.
    return weights + moments + copies + (4.0 / ranks if strategy == "zero3" else 0.0)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (said.ranks, folder, said.rounds), nprocs=said.ranks)
        bytes_at_rest, times_s = torch.load(Path(folder) / "result.pt", weights_only=False)
    count = CASES["text_m1"].parameters
    rows = []
    for strategy in STRATEGIES:
        ratios = [own / ddp for own, ddp in zip(times_s[strategy], times_s["ddp"], strict=True)]
        measured = bytes_at_rest[strategy] / count
        shown = [f"{measured:.2f}", f"{theory(strategy, said.ranks):.2f}"]
        rows.append([strategy, *shown, f"{1e3 * median(times_s[strategy]):.0f}", summary(ratios).shown(2)])
    print(f"{count:,} parameters, {said.ranks} ranks of one core, {said.rounds} rounds of {STEPS} steps")
    print(table(["strategy", "bytes/parameter", "theory", "ms/step", "time / ddp"], rows))


if __name__ == "__main__":
    main()
