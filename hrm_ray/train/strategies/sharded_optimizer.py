"""Data parallel training in which each rank keeps a part of the optimizer state (ZeRO stage 1, Rajbhandari et al. 2020,
arXiv 1910.02054)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from hrm_ray.bundle.weights_file import fill_module, read_tensors
from hrm_ray.model.objective import AnyObjective
from hrm_ray.train.optimizer_state import OPTIMIZER_FILE, load_optimizer, optimizer_tensors
from hrm_ray.train.optimizers import BuildOptimizer
from hrm_ray.train.per_parameter_optimizer import PerParameterOptimizer
from hrm_ray.train.strategies.ddp import DdpStrategy
from hrm_ray.train.strategies.owned_average import OwnedAverage, Ownership
from hrm_ray.train.strategies.single import AVERAGE, WEIGHTS


class ShardedOptimizerStrategy(DdpStrategy):
    """Each parameter is updated by one rank, its owner, which alone has its optimizer state and moving average.

    Weights and gradients are whole on every rank, as under ddp, and so are the numbers: an owner computes what every
    rank would. Not torch's ZeroRedundancyOptimizer, which builds its optimizer from a class: here any optimizer serves,
    with its state by the parameter's name, so that checkpoints are those of every other strategy.
    """

    def prepare(self, objective: AnyObjective, build_optimizer: BuildOptimizer, ema_decay: float | None = None) -> None:
        # The optimizer has all parameters, and makes state for those that have a gradient when it updates.
        super().prepare(objective, build_optimizer)
        self.ownership = Ownership(objective, self.world)
        if ema_decay is not None:
            self.average = OwnedAverage(Ownership(objective.model, self.world), ema_decay)

    def _update(self) -> None:
        for parameter in self.ownership.others:
            parameter.grad = None
        self.optimizer.step()
        self.ownership.send_values()
        if self.average is not None:
            self.average.update()

    def overflowed_parameters(self) -> list[str]:
        if not isinstance(self.optimizer, PerParameterOptimizer):
            return []
        names: list[list[str]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(names, super().overflowed_parameters())
        return [name for of_rank in names for name in of_rank]

    def state_files(self) -> dict[str, Mapping[str, Tensor]]:
        state = self.world.to_leader(optimizer_tensors(self.optimizer, self.ownership.own))
        average = self.world.to_leader(self.average.average) if self.average is not None else {}
        if not self.world.leads:
            return {}
        files: dict[str, Mapping[str, Tensor]] = {WEIGHTS: self.full_weights(), OPTIMIZER_FILE: state}
        return files | ({AVERAGE: average} if average else {})

    def load(self, folder: Path) -> None:
        fill_module(self.objective.model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
        own = self.ownership.own
        load_optimizer(self.optimizer, dict(self.objective.named_parameters()), folder, only=own.keys())
        if isinstance(self.average, OwnedAverage):
            self.average.load_own(folder)
