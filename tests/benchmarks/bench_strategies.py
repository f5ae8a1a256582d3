"""Bytes and time per step of every strategy on gloo processes of one core each.

`python -m tests.benchmarks.bench_strategies --ranks 2` trains the same text model under each strategy, in rounds that
take turns within one group of processes, and prints a table: bytes of a rank as weights (with copies of them),
gradients and optimizer state when the passes of a step are done, counted by storage; the same as
`train.memory_estimate` has it; and the time against ddp in the same round, by the wall and of the CPU. The time of the
CPU leaves out waits, and so holds on a machine that does other work too. `--rounds 0` measures memory alone, and
`--model-dtype bf16` takes weights of 16 bits.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from hrm_ray.model.config import ModelConfig, model_config
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.memory_estimate import DIVIDED, memory_estimate
from hrm_ray.train.optimizer_state import state_tensors
from hrm_ray.train.storage_tracker import storage_bytes
from hrm_ray.train.world import World
from tests.benchmarks.bench_cases import CASES, RandomRows
from tests.benchmarks.timing import Spent, spent, summary, table

STRATEGIES = ("ddp", *DIVIDED)
STEPS = 2
"""Steps of a round."""
CASE = CASES["text_m1"]
PARTS = ("weights", "gradients", "optimizer")


def settings_of(strategy: str, ranks: int, model_dtype: str) -> tuple[RunSettings, ModelConfig]:
    """What a rank trains, in two micro-batches; the effective batch is that of the case."""
    settings = RunSettings.model_validate(
        {
            "model": CASE.model,
            "optimizer": {
                "batch_size": CASE.batch_size // ranks // 2,
                "gradient_accumulation_steps": 2,
                "optimizer": "adamw",
            },
            "memory": {"amp": False, "gradient_checkpointing": False, "model_dtype": model_dtype},
            "cluster": {"strategy": strategy, "world_size": ranks},
        }
    )
    return settings, model_config(settings, CASE.vocab_size, seq_len=CASE.seq_len)


def build(strategy: str, ranks: int, model_dtype: str) -> TrainingLoop:
    """The loop of this rank."""
    settings, config = settings_of(strategy, ranks, model_dtype)
    return assemble(settings, config, RandomRows(CASE), World.here("cpu", 1), 1000)


def tensors_alive() -> list[Tensor]:
    """Every tensor of this process that has memory, views of parameters' data and state included."""
    gc.collect()
    # `type`: isinstance asks objects for their class, and some of Python's own warn at that.
    found = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    # A gradient that no Python code has read is no object of Python's.
    found += [one.grad for one in found if one.is_leaf and one.grad is not None]
    # A DTensor has its size, and the memory is that of its local tensor, which is found too.
    return [one for one in found if one.device.type != "meta" and not isinstance(one, DTensor)]


def inner_optimizer(strategy: Any) -> torch.optim.Optimizer:
    """The optimizer that has the state, inside DeepSpeed's where that trains."""
    optimizer = strategy.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def weights_of(strategy: Any) -> Iterator[Tensor]:
    """The parameters of a rank, whole or its part, and the copies that DeepSpeed updates."""
    for parameter in strategy.objective.parameters():
        if isinstance(parameter, DTensor):
            yield parameter.to_local().detach()
        else:
            yield parameter.ds_tensor if "ds_tensor" in vars(parameter) else parameter.detach()
    if not isinstance(strategy.optimizer, torch.optim.Optimizer):
        yield from strategy._flat_partitions()


def measured(strategy_name: str, ranks: int, model_dtype: str) -> tuple[TrainingLoop, dict[str, int]]:
    """A loop after two steps, and bytes by part when the passes of the second were done."""
    before = storage_bytes(tensors_alive())
    loop = build(strategy_name, ranks, model_dtype)
    loop.step()
    strategy: Any = loop.parts.strategy
    step, found = strategy.step, dict[str, int]()

    def counted(max_norm: float, scale: float) -> float:
        weights, optimizer = (
            storage_bytes(weights_of(strategy)),
            storage_bytes(state_tensors(inner_optimizer(strategy))),
        )
        # The small rest, such as the tables of positions, is counted with the gradients.
        gradients = storage_bytes(tensors_alive()) - before - weights - optimizer
        found.update(dict(zip(PARTS, (weights, gradients, optimizer), strict=True)))
        return float(step(max_norm, scale))

    strategy.step = counted
    loop.step()
    strategy.step = step
    return loop, found


def measure(rank: int, ranks: int, folder: str, rounds: int, model_dtype: str) -> None:
    """One gloo process."""
    os.environ |= {"LOCAL_RANK": str(rank), "USE_LIBUV": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    bytes_by_part: dict[str, dict[str, int]] = {}
    times: dict[str, list[Spent]] = {strategy: [] for strategy in STRATEGIES}
    loops: dict[str, TrainingLoop] = {}
    for strategy in STRATEGIES:
        loops[strategy], bytes_by_part[strategy] = measured(strategy, ranks, model_dtype)
    for number in range(rounds):
        order = STRATEGIES if number % 2 else STRATEGIES[::-1]
        for strategy in order:
            dist.barrier()
            taken = spent(lambda loop=loops[strategy]: [loop.step() for _ in range(STEPS)])  # type: ignore[misc]
            times[strategy].append(taken)
    if rank == 0:
        torch.save((bytes_by_part, times), Path(folder) / "result.pt")
    dist.barrier()
    os._exit(0)


def estimated(strategy: str, ranks: int, model_dtype: str) -> dict[str, int]:
    """Bytes by part as --dry-run has them."""
    account = memory_estimate(*settings_of(strategy, ranks, model_dtype)).to_plain()
    return {part: account[f"{part}_bytes"] for part in PARTS}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model-dtype", choices=["fp32", "bf16"], default="fp32")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (said.ranks, folder, said.rounds, said.model_dtype), nprocs=said.ranks)
        bytes_by_part, times = torch.load(Path(folder) / "result.pt", weights_only=False)
    rows = []
    for strategy in STRATEGIES:
        found, expected = bytes_by_part[strategy], estimated(strategy, said.ranks, said.model_dtype)
        sizes = [(found[part], expected[part]) for part in PARTS]
        sizes.append((sum(found.values()), sum(expected.values())))
        shown = [f"{ours / CASE.parameters:.2f} / {theirs / CASE.parameters:.2f}" for ours, theirs in sizes]
        if said.rounds:
            pairs = list(zip(times[strategy], times["ddp"], strict=True))
            shown.append(f"{1e3 * median(own.wall_s for own in times[strategy]) / STEPS:.0f}")
            shown.append(summary([own.wall_s / ddp.wall_s for own, ddp in pairs]).shown(2))
            shown.append(summary([own.cpu_s / ddp.cpu_s for own, ddp in pairs]).shown(2))
        rows.append([strategy, *shown])
    print(f"{CASE.parameters:,} parameters, {said.ranks} ranks of one core, {said.rounds} rounds of {STEPS} steps;")
    print("bytes of a parameter, measured / estimated")
    titles = ["strategy", *PARTS, "sum", *(["ms/step", "time / ddp", "CPU / ddp"] if said.rounds else [])]
    print(table(titles, rows))


if __name__ == "__main__":
    main()
