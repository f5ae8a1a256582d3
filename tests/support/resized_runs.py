"""A run that goes on from its checkpoints with other numbers of gloo processes, and the same run in one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hrm_ray.rundir import RunDir
from hrm_ray.settings.adaptive_lr import AdaptiveLrSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.checkpoint import load_checkpoint, save_checkpoint
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.plan import largest_divisor
from hrm_ray.train.world import World
from tests.support.splits import Cut, Rows, config_for, settings_for

ROWS, MICRO_BATCH = 6, 2
"""Rows of the effective batch, and the micro-batch that is asked for."""
PATH, STEPS = (2, 3, 1), 3
"""Numbers of processes one after the other, and the updates of each. Three do not divide the tensors evenly."""


@dataclass(frozen=True)
class Case:
    """A scenario of `splits` under a strategy."""

    scenario: str
    strategy: str
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def loop_of(case: Case, ranks: int, strategy: str, micro_batch: int) -> TrainingLoop:
    rows = ROWS // ranks
    batch = largest_divisor(rows, micro_batch)
    settings = settings_for(case.scenario, "adam-atan2", Cut(ranks, rows // batch, batch), case.more)
    settings = settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"strategy": strategy})})
    config = config_for(settings)
    # A window ends in the middle of a phase, so that its sum goes from one number of ranks to the next.
    adaptive = AdaptiveLrSettings(window_steps=2, plateau_windows=1, cooldown_windows=0)
    return assemble(settings, config, Rows(config.task), World.here("cpu", 1), 100, adaptive_lr=adaptive)


def stepped(loop: TrainingLoop, steps: int) -> list[list[float]]:
    """Loss, gradient norm and learning rate of each step."""
    found = []
    for _ in range(steps):
        report = loop.step()
        assert report is not None and report.applied
        found.append([loop.flush_metrics()["objective"], report.norm, report.lr])
    return found


@dataclass
class Ended:
    """What a run gave: the figures of its steps, and the weights that an evaluation at its end would use."""

    figures: list[list[float]]
    weights: dict[str, Tensor]


def ended(loop: TrainingLoop, figures: list[list[float]]) -> Ended:
    with loop.parts.strategy.evaluating():
        weights = {name: tensor.detach().clone() for name, tensor in loop.parts.strategy.full_weights().items()}
    return Ended(figures, weights)


def undisturbed(case: Case) -> Ended:
    loop = loop_of(case, 1, "single", ROWS)
    return ended(loop, stepped(loop, STEPS * len(PATH)))


def in_processes(rank: int, phase: int, folder: Path, cases: Mapping[str, Case]) -> None:
    """One of the processes of a phase: all cases, each from where the phase before ended."""
    os.environ |= {"USE_LIBUV": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    ranks = PATH[phase]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{phase}", rank=rank, world_size=ranks)
    results: dict[str, Ended] = {}
    for name, case in cases.items():
        run_dir = RunDir(folder / name)
        run_dir.root.mkdir(exist_ok=True)
        loop = loop_of(case, ranks, case.strategy, MICRO_BATCH)
        if phase:
            load_checkpoint(loop, run_dir.checkpoint(STEPS * phase))
        figures = stepped(loop, STEPS)
        save_checkpoint(loop, run_dir, {}, keep=9)
        results[name] = ended(loop, figures)
    if rank == 0:
        torch.save(results, folder / f"phase{phase}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads abort the interpreter's own tear-down now and then, when all results are long written.
    os._exit(0)
