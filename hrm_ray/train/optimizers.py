"""Optimizers: the table of choices, AdamATan2, and the sparse rule of the puzzle table.

One job: turn gradients into weight updates. Learning rates come from schedules.py, clipping from the strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hrm_ray.model.embedding import PuzzleTable
from hrm_ray.settings.optimizer import OptimizerSettings
from hrm_ray.train.world import World

BuildOptimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


class AdamATan2(torch.optim.Optimizer):
    """Adam whose update is atan2(m, sqrt(v)): scale-free, without an epsilon.

    p <- p (1 - lr w); p <- p - lr / (1 - b1^t) * atan2(m, sqrt(v) / sqrt(1 - b2^t)). The first moment's correction
    stays outside (ACTV1_SPEC, section 9; sapientinc/HRM-Text `adam_atan2`). Corrections are taken in double.
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; the others are left alone, decay included."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            by_age: dict[int, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                by_age.setdefault(int(state["step"]), []).append(parameter)
            for age, parameters in by_age.items():
                self._update(parameters, age, group["lr"], beta1, beta2, group["weight_decay"])

    def _update(
        self, parameters: list[torch.nn.Parameter], age: int, lr: float, beta1: float, beta2: float, decay: float
    ) -> None:
        weights: list[Tensor] = [p.data for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        first = [self.state[p]["exp_avg"] for p in parameters]
        second = [self.state[p]["exp_avg_sq"] for p in parameters]
        torch._foreach_mul_(weights, 1 - lr * decay)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, (1 - beta2**age) ** 0.5)
        updates = [torch.atan2(m, s, out=s) for m, s in zip(first, scale, strict=True)]
        torch._foreach_add_(weights, updates, alpha=-lr / (1 - beta1**age))


def _adamw(settings: OptimizerSettings, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    listed = list(params)
    # On the CPU PyTorch's default passes over memory once per operation; its fused kernel once in all.
    fused = True if all(parameter.device.type == "cpu" for parameter in listed) else None
    return torch.optim.AdamW(
        listed,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=fused,
    )


def _adam_atan2(settings: OptimizerSettings, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return AdamATan2(params, lr=settings.lr, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay)


def _adamw_8bit(settings: OptimizerSettings, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits by blocks of 256, each with its scale (Dettmers et al. 2022, arXiv 2110.02861).

    Parameters of fewer than 4096 values keep float32 moments, as bitsandbytes advises.
    """
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(
        list(params), lr=settings.lr, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay
    )


def _sgd(settings: OptimizerSettings, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=settings.lr, weight_decay=settings.weight_decay)


OPTIMIZERS: dict[str, Callable[[OptimizerSettings, Iterable[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam-atan2": _adam_atan2,
    "sgd": _sgd,
}
"""By the name that `--optimizer` takes."""


def builder(settings: OptimizerSettings) -> BuildOptimizer:
    """The optimizer that the settings name, waiting for its parameters."""
    rule = _adamw_8bit if settings.use_8bit_optimizer else OPTIMIZERS[settings.optimizer]
    return lambda params: rule(settings, params)


def followed_by(build: BuildOptimizer, after: Callable[[], None]) -> BuildOptimizer:
    """The optimizer that `build` makes; `after` is called after each of its updates, with the gradients still there."""

    def built(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = build(params)
        optimizer.register_step_post_hook(lambda *_: after())
        return optimizer

    return built


class SparseSignSGD:
    """Updates the rows of a puzzle table that a step used, by the sign of their summed gradient.

    row <- row (1 - lr w) - lr sign(sum of gradients over the whole step and all ranks); rows not used do not change
    (ACTV1_SPEC, section 10; sapientinc/HRM `CastedSparseEmbeddingSignSGD_Distributed`). It keeps no state.
    """

    def __init__(self, table: PuzzleTable, weight_decay: float) -> None:
        self.table = table
        self.weight_decay = weight_decay

    def gradients(self, world: World) -> tuple[Tensor, Tensor]:
        """(identifiers [K], their gradients [K, E]) of everything taken since the last update, over all ranks.

        The loop scales losses by the number of ranks, for strategies that average; rows are summed, so it is undone.
        """
        taken = [used for rows in self.table.taken if (used := rows.used()) is not None]
        self.table.taken.clear()
        ndim = self.table.weights.shape[1]
        if taken:
            identifiers = torch.cat([i for i, _ in taken]).long()
            gradients = torch.cat([g for _, g in taken])
        else:
            identifiers = torch.zeros(0, dtype=torch.long, device=self.table.weights.device)
            gradients = self.table.weights.new_zeros(0, ndim)
        identifiers, gradients = world.gather_rows(identifiers), world.gather_rows(gradients)
        present, place = identifiers.unique(return_inverse=True)
        summed = gradients.new_zeros(present.shape[0], ndim).index_add_(0, place, gradients)
        return present, summed / world.size

    def forget(self) -> None:
        """Drop what the passes of an abandoned step have taken."""
        self.table.taken.clear()

    @torch.no_grad()
    def apply(self, present: Tensor, summed: Tensor, lr: float) -> None:
        """Update the rows `present` [K] by their summed gradients [K, E], as `gradients` gave them."""
        table = self.table.weights
        table[present] = table[present] * (1 - lr * self.weight_decay) - lr * summed.sign()
