"""Optimizers: the table of choices, AdamATan2, and sign-SGD for the rows of the puzzle table."""

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

    p <- p (1 - lr w); p <- p - lr / (1 - b1^t) * atan2(m, sqrt(v) / sqrt(1 - b2^t)). The first moment's bias correction
    stays outside of atan2 (ACTV1_SPEC, section 9; sapientinc/HRM-Text `adam_atan2`).
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; the others do not decay either."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            # Parameters with the same number of updates share their bias corrections, and so one fused update.
            by_step: dict[int, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                by_step.setdefault(int(state["step"]), []).append(parameter)
            for step, parameters in by_step.items():
                self._update(parameters, step, group["lr"], beta1, beta2, group["weight_decay"])

    def _update(
        self, parameters: list[torch.nn.Parameter], step: int, lr: float, beta1: float, beta2: float, decay: float
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
        torch._foreach_div_(scale, (1 - beta2**step) ** 0.5)
        updates = [torch.atan2(m, s, out=s) for m, s in zip(first, scale, strict=True)]
        torch._foreach_add_(weights, updates, alpha=-lr / (1 - beta1**step))


def _adamw(settings: OptimizerSettings, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    listed = list(params)
    # On the CPU PyTorch's default goes through memory once per operation, its fused kernel once per update.
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
    """AdamW with 8-bit moments in blocks of 256, one scale per block (Dettmers et al. 2022, arXiv 2110.02861).

    bitsandbytes keeps float32 moments for parameters of fewer than 4096 values.
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
    """A function that builds the chosen optimizer for given parameters."""
    make = _adamw_8bit if settings.use_8bit_optimizer else OPTIMIZERS[settings.optimizer]
    return lambda params: make(settings, params)


def followed_by(build: BuildOptimizer, after: Callable[[], None]) -> BuildOptimizer:
    """Like `build`; `after` is called after each update, before the gradients are cleared."""

    def built(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = build(params)
        optimizer.register_step_post_hook(lambda *_: after())
        return optimizer

    return built


def sum_by_identifier(identifiers: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(the different identifiers [D] in order, the sum [D, E] of each one's `rows`), for identifiers [K], rows [K, E].

    The additions are made in an order that depends on the order of the rows alone. `index_add_` on CUDA adds in the
    order in which its threads arrive, so ranks would differ in the last bit of a sum, and then in its sign.
    """
    identifiers, order = identifiers.sort(stable=True)
    rows = rows[order]
    while True:
        different, counts = identifiers.unique_consecutive(return_counts=True)
        if different.shape[0] == identifiers.shape[0]:
            return different, rows
        # Every second row of an identifier is added to the one before it, which halves their number.
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        second = (torch.arange(rows.shape[0], device=rows.device) - first) % 2 == 1
        at = second.nonzero().squeeze(1)
        rows[at - 1] += rows[at]
        identifiers, rows = identifiers[~second], rows[~second]


class SparseSignSGD:
    """Sign-SGD, without state, for the rows of a puzzle table that a step used.

    row <- row (1 - lr w) - lr sign(sum of gradients over the whole step and all ranks); rows not used do not change
    (ACTV1_SPEC, section 10; sapientinc/HRM `CastedSparseEmbeddingSignSGD_Distributed`).
    """

    def __init__(self, table: PuzzleTable, weight_decay: float) -> None:
        self.table = table
        self.weight_decay = weight_decay

    def gradients(self, world: World) -> tuple[Tensor, Tensor]:
        """(identifiers [K], their gradients [K, E]) of all rows used since the last update, on any rank.

        Every rank gets the same bits. The loop scales losses by the number of ranks, for strategies that average; rows
        are summed, so the scale is divided out.
        """
        taken = [used for rows in self.table.taken if (used := rows.used()) is not None]
        self.table.taken.clear()
        weights = self.table.weights
        # A rank whose slots are all idle has no rows, but takes part in gathering those of the others.
        identifiers = torch.cat([weights.new_zeros(0, dtype=torch.long), *(i.long() for i, _ in taken)])
        gradients = torch.cat([weights.new_zeros(0, weights.shape[1]), *(g for _, g in taken)])
        present, summed = sum_by_identifier(*world.gather_rows(identifiers, gradients))
        return present, summed / world.size

    def forget(self) -> None:
        """Drop the rows that the passes of an abandoned step used."""
        self.table.taken.clear()

    @torch.no_grad()
    def apply(self, present: Tensor, summed: Tensor, lr: float) -> None:
        """Update the rows `present` [K] by their summed gradients [K, E], as `gradients` gave them."""
        table = self.table.weights
        table[present] = table[present] * (1 - lr * self.weight_decay) - lr * summed.sign()
