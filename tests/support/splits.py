"""One training problem, cut in different ways over ranks and micro-batches, for comparing the results.

One job: scenarios and the function that runs one of them with one cut. It runs in the test process and in spawned
gloo processes alike.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from hrm_ray.model.config import ModelConfig, model_config
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.world import World
from hrm_ray.types import IGNORE_LABEL, Columns
from tests.support.fail_at import FailAt, script

VOCABULARY, SEQ_LEN, IDENTIFIERS = 17, 12, 5


@dataclass(frozen=True)
class Cut:
    """How the effective batch of 8 is cut."""

    ranks: int
    accumulation: int
    batch: int
    failures: tuple[FailAt, ...] = ()


CUTS = {
    "1x1x8": Cut(1, 1, 8),
    "1x2x4": Cut(1, 2, 4),
    "2x1x4": Cut(2, 1, 4),
    "2x2x2": Cut(2, 2, 2),
    # Memory runs out on the way: twice in one step, and on one of two ranks in the backward pass of its last batch.
    "1x1x8 -> 1x4x2": Cut(1, 1, 8, (FailAt(0, 3, fits=2),)),
    "2x2x2 -> 2x4x1": Cut(2, 2, 2, (FailAt(1, 4, fits=1, in_backward=True, passes=1),)),
}

TEXT = {
    "task": "lm",
    "use_moe": False,
    "supervision": "rollout",
    "halt_exploration_prob": 0.0,
    "loss": "softmax",
    "halt_max_steps": 3,
}
PUZZLE = {
    "task": "puzzle",
    "use_moe": False,
    "supervision": "segment",
    "halt_exploration_prob": 0.5,
    "loss": "stablemax",
    "halt_max_steps": 3,
}
EXPERTS = {"use_moe": True, "num_experts": 4, "moe_capacity_factor": 0.8, "moe_load_balance_coef": 0.1}
"""A capacity that drops, and a balance loss that shows in the gradients."""
SCENARIOS: dict[str, dict[str, Any]] = {
    "text": TEXT,
    "transformer": TEXT | {"arch": "transformer", "halt_max_steps": 1},
    "text-experts": TEXT | EXPERTS,
    "chunked": TEXT | {"window_size": 7, "halt_max_steps": 2},
    "chunked-exact-experts": TEXT | EXPERTS | {"halt_max_steps": 2},
    "text-one-expert-trained": TEXT | EXPERTS | {"expert_index": 2},
    "puzzle-carried": PUZZLE,
    "puzzle-experts": PUZZLE | EXPERTS | {"bp_steps": 4},
    "puzzle-embedding": PUZZLE | {"puzzle_emb_ndim": 24, "pos_encodings": "learned"},
    "puzzle-rollout": PUZZLE | {"supervision": "rollout", "puzzle_emb_ndim": 8},
}
MEMORY: dict[str, dict[str, Any]] = {
    "chunked": {"use_chunked_training": True, "chunk_size": 5},
    "chunked-exact-experts": {"use_chunked_training": True, "chunk_size": 5, "chunk_gradients": "exact"},
}
"""What a scenario asks of section `memory`."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.5},
    "adam-atan2": {"optimizer": "adam-atan2", "lr": 1e-3},
}
STEPS = 10


class Rows:
    """A fixed SampleSet of unequal rows: different numbers of labels, one to three documents in a row."""

    def __init__(self, task: str, count: int = 44) -> None:
        draw = np.random.default_rng(7)
        self.inputs = draw.integers(1, VOCABULARY, (count, SEQ_LEN)).astype(np.int32)
        self.labels = draw.integers(1, VOCABULARY, (count, SEQ_LEN)).astype(np.int32)
        lengths = draw.integers(1, SEQ_LEN + 1, count)
        self.labels[np.arange(SEQ_LEN) >= lengths[:, None]] = IGNORE_LABEL
        self.identifiers = draw.integers(0, IDENTIFIERS, count).astype(np.int32)
        self.documents = np.sort(draw.integers(0, 3, (count, SEQ_LEN)), axis=1).astype(np.int32)
        self.task = task

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        active = indices >= 0
        at = np.where(active, indices, 0)
        labels = np.where(active[:, None], self.labels[at], np.int32(IGNORE_LABEL))
        columns: Columns = {"inputs": self.inputs[at], "labels": labels, "active": active}
        if self.task == "puzzle":
            return columns | {"puzzle_identifiers": self.identifiers[at]}
        return columns | {"documents": self.documents[at]}


def settings_for(
    scenario: str, optimizer: str, cut: Cut, more: Mapping[str, Mapping[str, Any]] | None = None
) -> RunSettings:
    """The settings of a scenario, with `more` over them, by section."""
    more = more or {}
    sections: dict[str, dict[str, Any]] = {
        "model": {"hidden_size": 16, "num_heads": 2, "h_layers": 1, "l_layers": 1, "d_ff": 24, **SCENARIOS[scenario]},
        "data": {"linear_dataset": False},
        "optimizer": {
            "batch_size": cut.batch,
            "gradient_accumulation_steps": cut.accumulation,
            "grad_clip": 0.0,
            "lr_schedule": "constant",
            "weight_decay": 0.1,
            **OPTIMIZERS[optimizer],
        },
        "memory": {"amp": False, **MEMORY.get(scenario, {})},
        "run": {"seed": 3, "expert_id": "one" if "expert_index" in SCENARIOS[scenario] else None},
    }
    return RunSettings.model_validate(
        {name: {**sections.get(name, {}), **more.get(name, {})} for name in sections.keys() | more.keys()}
    )


def config_for(settings: RunSettings) -> ModelConfig:
    return model_config(settings, VOCABULARY, seq_len=SEQ_LEN, puzzle_identifiers=IDENTIFIERS)


def warm_heads(loop: TrainingLoop) -> None:
    """Halting scores away from their start, so that rows really halt at different segments."""
    model = loop.parts.objective.model
    state = model.state_dict()
    generator = torch.Generator().manual_seed(11)
    if "q_head.weight" in state:
        state["q_head.weight"].copy_(torch.randn(state["q_head.weight"].shape, generator=generator) / 2)
        state["q_head.bias"].copy_(torch.tensor([0.5, 0.0]))


@dataclass
class Result:
    """What one cut gave: first step's gradients, weights after the last step, mean losses, halted slots seen."""

    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    losses: list[float]
    halted_early: int
    ended_as: tuple[int, int]
    metrics: dict[str, float]
    """All that was logged of the first step."""


def run(scenario: str, optimizer: str, cut: Cut, device: str = "cpu") -> Result:
    """Train STEPS updates as this rank's part of `cut`; tensors of the result are on the CPU."""
    settings = settings_for(scenario, optimizer, cut)
    config = config_for(settings)
    world = World.here(device, 1)
    assert world.size == cut.ranks
    samples = Rows(config.task)
    loop = assemble(settings, config, samples, world, STEPS)
    warm_heads(loop)
    script(loop, cut.failures)
    gradients = _capture(loop)
    losses, halted_early, metrics = [], 0, {}
    for _ in range(STEPS):
        report = loop.step()
        assert report is not None and report.applied
        logged = loop.flush_metrics()
        losses.append(logged["objective"])
        metrics = metrics or logged
        for carry in loop.carries or []:
            halted_early += int((carry.halted & carry.data["active"] & (carry.steps < config.halt_max_steps)).sum())
    weights = {name: t.cpu().clone() for name, t in loop.parts.strategy.full_weights().items()}
    ended_as = (loop.parts.shape.accumulation, loop.parts.shape.batch_size)
    return Result({name: t.cpu() for name, t in gradients.items()}, weights, losses, halted_early, ended_as, metrics)


def _capture(loop: TrainingLoop) -> dict[str, Tensor]:
    """Fills with the first step's gradients: what the optimizer sees, and the puzzle table's summed rows."""
    seen: dict[str, Tensor] = {}
    strategy, sparse = loop.parts.strategy, loop.parts.sparse
    step = strategy.step

    def step_and_keep(max_norm: float, scale: float) -> float:
        for name, parameter in loop.parts.objective.named_parameters():
            if name not in seen and parameter.grad is not None:
                seen[name] = parameter.grad.clone()
        return step(max_norm, scale)

    strategy.step = step_and_keep  # type: ignore[method-assign]
    if sparse is not None:
        gather = sparse.gradients

        def gather_and_keep(world: World) -> tuple[Tensor, Tensor]:
            present, summed = gather(world)
            if "puzzle rows" not in seen:
                table = torch.zeros_like(sparse.table.weights)
                table[present] = summed
                seen["puzzle rows"] = table
            return present, summed

        sparse.gradients = gather_and_keep  # type: ignore[method-assign]
    return seen


def spawned_rank(rank: int, ranks: int, rendezvous: str, out: str) -> None:
    """A gloo process: runs every scenario with every cut of `ranks` ranks; the leading rank saves the results."""
    os.environ["USE_LIBUV"] = "0"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    results = {
        (scenario, optimizer, name): run(scenario, optimizer, cut)
        for scenario in SCENARIOS
        for optimizer in OPTIMIZERS
        for name, cut in CUTS.items()
        if cut.ranks == ranks
    }
    if rank == 0:
        torch.save(results, Path(out))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads abort the interpreter's own tear-down now and then, when all results are long written.
    os._exit(0)
