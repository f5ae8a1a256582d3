"""The training problem of `splits` under every strategy, each run from the same checkpoint and ending in one.

It runs in the test process (strategy single) and in spawned gloo processes alike.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hrm_ray.bundle.weights_file import read_tensors, save_tensors
from hrm_ray.model.objective import SegmentOutput
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.evaluate import EvalSet, evaluate
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.strategies import zero
from hrm_ray.train.strategies.base import Strategy
from hrm_ray.train.world import World
from hrm_ray.types import IGNORE_LABEL, Columns
from tests.support.fail_at import script
from tests.support.splits import CUTS, Rows, config_for, settings_for, warm_heads

STEPS = 4


@dataclass(frozen=True)
class Case:
    """A problem: a scenario of `splits` with further settings, by section."""

    name: str
    scenario: str = "text"
    optimizer: str = "adam-atan2"
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bad_steps: tuple[int, ...] = ()
    """Steps, counted from 1, whose loss is not a number."""
    rows: int = 44
    """Of an epoch. With 26 the fourth batch of 8 has 2 rows, both of rank 0."""


class HeldOutRows(Rows):
    """The rows with the number of bytes that their labels stand for: one each."""

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        columns = super().rows(indices)
        return columns | {"label_bytes": (columns["labels"] != IGNORE_LABEL).sum(-1).astype(np.int32)}


@dataclass
class Ended:
    """What a run gave: mean losses, gradient norms, figures of an evaluation after it, and its checkpoint's tensors."""

    losses: list[float]
    norms: list[float]
    figures: dict[str, float]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]
    ended_as: tuple[int, int]


def loop_of(case: Case, strategy: str, cut: str) -> tuple[RunSettings, TrainingLoop]:
    """The loop of this rank; all cuts have the same effective batch."""
    chosen = CUTS[cut]
    settings = settings_for(case.scenario, case.optimizer, chosen, case.more)
    settings = settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"strategy": strategy})})
    config = config_for(settings)
    world = World.here("cpu", 1)
    loop = assemble(settings, config, Rows(config.task, case.rows), world, 100)

    def spoil(objective: nn.Module, given: Any, output: SegmentOutput[Any]) -> SegmentOutput[Any] | None:
        if loop.progress.batch_idx not in case.bad_steps:
            return None
        return replace(output, terms=tuple(replace(term, total=term.total * math.nan) for term in output.terms))

    loop.parts.objective.register_forward_hook(spoil)
    script(loop, chosen.failures)
    return settings, loop


def save_files(strategy: Strategy, folder: Path) -> None:
    """Write what a strategy gives for a checkpoint, on rank 0; a collective."""
    for name, tensors in strategy.state_files().items():
        save_tensors(tensors, folder / name)


def write_start(case: Case, folder: Path) -> None:
    """A checkpoint of one process from which every strategy starts: warm heads, and an optimizer two steps old."""
    _, loop = loop_of(case, "single", "1x1x8")
    warm_heads(loop)
    if not case.bad_steps:
        for _ in range(2):
            loop.step()
    folder.mkdir(parents=True)
    save_files(loop.parts.strategy, folder)


def trained(
    case: Case, strategy: str, cut: str, start: Path, end: Path, steps: int = STEPS, steps_before: int = 0
) -> Ended:
    """Load `start`, train, evaluate, and save to `end`; tensors are read from the files, on every rank. The rows of
    `steps_before` updates, made before `start` is loaded, are those that the run which saved it has trained."""
    settings, loop = loop_of(case, strategy, cut)
    world = loop.world
    for _ in range(steps_before):
        loop.step()
        loop.flush_metrics()
    loop.parts.strategy.load(start)
    losses, norms = [], []
    for number in range(1, steps + 1):
        report = loop.step()
        assert report is not None and report.applied == (number not in case.bad_steps)
        if report.applied:
            losses.append(loop.flush_metrics()["objective"])
            norms.append(report.norm)
    held_out = EvalSet.of_run(HeldOutRows(loop.parts.objective.model.config.task), settings, world)
    assert held_out is not None
    with loop.parts.strategy.evaluating() as objective:
        figures = evaluate(objective, held_out, world)
    if world.leads:
        end.mkdir(parents=True)
    world.barrier()
    save_files(loop.parts.strategy, end)
    world.barrier()
    files = {name: end / f"{name}.safetensors" for name in ("model", "optimizer", "ema")}
    tensors = {name: read_tensors(path) if path.is_file() else {} for name, path in files.items()}
    ended_as = (loop.parts.shape.accumulation, loop.parts.shape.batch_size)
    return Ended(losses, norms, figures, tensors["model"], tensors["optimizer"], tensors["ema"], ended_as)


def in_two_processes(
    rank: int,
    ranks: int,
    folder: Path,
    runs: list[tuple[Case, str, str]],
    resumed: list[tuple[Case, str, str]],
    interrupted: list[tuple[Case, str]],
) -> None:
    """A gloo process: all `runs` (case, strategy, cut), `resumed` (case, strategy whose end is the start, strategy that
    goes on) and `interrupted` (case, strategy), with and without an interruption; the leading rank saves the results.
    """
    os.environ |= {"USE_LIBUV": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    # As in larger models, gradients are reduced in several buckets, some of them smaller than a single gradient.
    zero.SMALL_BUCKET_VALUES = 100
    results: dict[tuple[str, ...], Ended] = {}
    for case, strategy, cut in runs:
        end = folder / f"end-{case.name}-{strategy}-{cut}"
        results[case.name, strategy, cut] = trained(case, strategy, cut, folder / f"start-{case.name}", end)
    for case, first, then in resumed:
        start, end = folder / f"end-{case.name}-{first}-2x2x2", folder / f"then-{case.name}-{first}-{then}"
        results[case.name, first, "then", then] = trained(case, then, "2x1x4", start, end)
        if first == then:
            again = trained(case, then, "2x1x4", start, folder / f"again-{case.name}-{first}", steps=0)
            results[case.name, first, "saved again"] = again
    for case, strategy in interrupted:
        start, end = folder / f"start-{case.name}", folder / f"end-{case.name}-{strategy}-2x2x2"
        for name, begin, further, before in (("whole", start, STEPS, 0), ("resumed", end, 0, STEPS)):
            to = folder / f"{name}-{case.name}-{strategy}"
            ended = trained(case, strategy, "2x2x2", begin, to, STEPS + further, before)
            results[case.name, strategy, name] = ended
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads abort the interpreter's own tear-down now and then, when all results are long written.
    os._exit(0)
