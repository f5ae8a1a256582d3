"""The learning-rate control decides alike on every rank, and as one process with the whole batch would."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hrm_ray.rundir import RunDir
from hrm_ray.settings.adaptive_lr import AdaptiveLrSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.checkpoint import load_checkpoint, save_checkpoint
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.world import World
from tests.support.splits import Cut, Rows, config_for, settings_for

pytestmark = pytest.mark.agreement

RULE = AdaptiveLrSettings(
    window_steps=3, plateau_windows=1, min_improvement=0.02, divergence_rise=0.05, cooldown_windows=0
)
"""Reacts to the noise of ten small batches, so that there is something to agree on."""
STEPS, STORED = 16, 7
SCENARIOS = ("text", "puzzle-carried")


def loop_for(scenario: str, cut: Cut) -> TrainingLoop:
    settings = settings_for(scenario, "sgd", cut)
    config = config_for(settings)
    world = World.here("cpu", 1)
    return assemble(settings, config, Rows(config.task), world, STEPS, adaptive_lr=RULE)


def lr_schedule(loop: TrainingLoop, steps: int) -> tuple[list[float], list[str]]:
    """Learning rates of so many updates, and why they changed."""
    lrs, reasons = [], []
    for _ in range(steps):
        report = loop.step()
        assert report is not None and report.applied
        lrs.append(report.lr)
        if report.adapted is not None:
            reasons.append(report.adapted.reason)
    return lrs, reasons


def run(scenario: str, cut: Cut, folder: Path) -> tuple[list[float], list[str], float]:
    """Some updates, a checkpoint inside a window, and the rest in a loop of its own that took the checkpoint up."""
    loop, run_dir = loop_for(scenario, cut), RunDir(folder / f"{scenario}-{cut.ranks}")
    run_dir.root.mkdir(exist_ok=True)
    first = lr_schedule(loop, STORED)
    checkpoint = save_checkpoint(loop, run_dir, {}, keep=1)
    on = lr_schedule(loop, STEPS - STORED)
    again = loop_for(scenario, cut)
    load_checkpoint(again, checkpoint)
    assert lr_schedule(again, STEPS - STORED) == on
    assert again.parts.lr_schedule.adaptive is not None
    return first[0] + on[0], first[1] + on[1], again.parts.lr_schedule.adaptive.factor


def spawned(rank: int, rendezvous: str, folder: str) -> None:
    os.environ["USE_LIBUV"] = "0"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    found = {scenario: run(scenario, Cut(2, 2, 2), Path(folder)) for scenario in SCENARIOS}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # gloo's threads abort the interpreter's own tear-down now and then, when all results are long written.
    os._exit(0)


def test_ranks_and_one_process_decide_alike(tmp_path: Path) -> None:
    """Both ranks exactly alike; one process the same rates, its reasons to the sixth digit that they show."""
    threads = torch.get_num_threads()
    mp.spawn(spawned, (str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    for scenario in SCENARIOS:
        lrs, reasons, factor = run(scenario, Cut(1, 1, 8), tmp_path)
        assert (lrs, factor) == (ranks[0][scenario][0], ranks[0][scenario][2])
        assert len(reasons) == len(ranks[0][scenario][1]) == STEPS // RULE.window_steps
        assert factor < 1, "nothing happened to agree on"
    torch.set_num_threads(threads)
