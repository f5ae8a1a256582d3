"""Estimates how long a weight update takes on the CPU, from timed updates of a smaller model of the same width."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace

import torch

from hrm_ray.model.config import ModelConfig
from hrm_ray.model.describe import count_parameters, training_flops
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.memory_estimate import SCHEDULE_STEPS, NoRows, ones_batch
from hrm_ray.train.world import World

MOST_PARAMETERS = 60_000_000
"""Larger timed models are not built: they would take gigabytes and many seconds."""
MOST_POSITIONS = 1024
"""Positions of the timed micro-batch, if that is not one row; the time of more grows in proportion."""
UPDATES = 3
"""Timed updates, after one that is not timed; the fastest counts."""


def update_s(settings: RunSettings, config: ModelConfig, threads: int) -> float | None:
    """Seconds of one weight update on this machine's CPU; None where even the timed model would be large.

    One layer for each level, one segment and one micro-batch are timed; the rest is in proportion to the FLOPs.
    """
    timed = replace(config, h_layers=1, l_layers=1, halt_max_steps=1)
    if count_parameters(timed).total > MOST_PARAMETERS:
        return None
    chosen = settings.optimizer
    rows = max(1, min(chosen.batch_size, MOST_POSITIONS // config.total_positions))
    fastest = _timed(settings, timed, rows, threads)
    supervision = settings.model.supervision or "rollout"
    share = training_flops(config, supervision) / training_flops(timed, supervision)
    return fastest * share * chosen.batch_size / rows * chosen.gradient_accumulation_steps


def _timed(settings: RunSettings, config: ModelConfig, rows: int, threads: int) -> float:
    """Seconds of the fastest of some updates on random tokens."""
    plain = settings.model_copy(
        update={
            "optimizer": settings.optimizer.model_copy(update={"batch_size": rows, "gradient_accumulation_steps": 1}),
            "cluster": settings.cluster.model_copy(update={"strategy": "single", "compile": False}),
        }
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=()):
            # A resumed run: start weights are not read.
            world = World(0, 1, torch.device("cpu"), grouped=False)
            loop = assemble(plain, config, NoRows(), world, SCHEDULE_STEPS, resumes=True)
            batch = ones_batch(loop, config, settings.data.packing)
            batch["inputs"] = torch.randint(config.vocab_size, batch["inputs"].shape, dtype=torch.int32)
            if loop.parts.carried:
                loop.carries = [loop.parts.objective.initial_carry(batch)]
            taken = []
            for _ in range(1 + UPDATES):
                start = time.perf_counter()
                loop.passes([batch], lambda: defaultdict(lambda: float(batch["inputs"].numel())))
                loop.parts.strategy.step(loop.parts.grad_clip, 1e-4)
                if loop.parts.sparse is not None:
                    loop.parts.sparse.forget()
                taken.append(time.perf_counter() - start)
            return min(taken[1:])
    finally:
        torch.set_num_threads(before)
