"""Training on one device; also the base of strategies that keep whole weights on each rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm_ray.bundle.weights_file import fill_module, read_tensors
from hrm_ray.model.objective import AnyObjective, Batch, SegmentOutput
from hrm_ray.train.optimizer_state import OPTIMIZER_FILE, load_optimizer, optimizer_tensors
from hrm_ray.train.optimizers import BuildOptimizer
from hrm_ray.train.per_parameter_optimizer import PerParameterOptimizer, multiply_gradients
from hrm_ray.train.precision import Precision, sum_gradients_in_float32
from hrm_ray.train.world import World

WEIGHTS, AVERAGE = "model.safetensors", "ema.safetensors"
"""Files of a checkpoint."""


class Ema:
    """average <- decay * average + (1 - decay) * weight after every weight update (HRM-Text's rule, no warm-up)."""

    def __init__(self, trained: Mapping[str, Tensor], decay: float) -> None:
        self.trained = dict(trained)
        self.decay = decay
        # float32 whatever the weights' type: what one update adds is too small for bfloat16.
        self.average = {name: p.detach().to(torch.float32, copy=True) for name, p in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        pairs = [(average, self.trained[name].detach()) for name, average in self.average.items()]
        wide = [(average, weight) for average, weight in pairs if weight.dtype == torch.float32]
        if wide:
            torch._foreach_lerp_([average for average, _ in wide], [weight for _, weight in wide], 1 - self.decay)
        # One by one: only one float32 copy of a narrow weight exists at a time.
        for average, weight in pairs:
            if weight.dtype != torch.float32:
                average.lerp_(weight.float(), 1 - self.decay)

    def load(self, average: dict[str, Tensor]) -> None:
        """Restore a stored average."""
        for name, tensor in average.items():
            self.average[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the average inside this context, with its own weights after it, to the bit."""
        kept = {name: p.detach().clone() for name, p in self.trained.items()}
        try:
            self._fill(self.average)
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, source: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(source[name])


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, float32."""
    # Squares of float16 numbers overflow above 255, and a sum in bfloat16 keeps eight bits.
    norms = torch._foreach_norm(gradients, 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """The factor that brings gradients of norm `norm` to a norm of at most `max_norm` (0: no clipping)."""
    if max_norm == 0:
        return torch.ones_like(norm)
    # The small number is PyTorch's, against a norm of zero (torch.nn.utils.clip_grads_with_norm_).
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


class SingleStrategy:
    """One worker with the whole model, the whole optimizer and, as `average`, the whole moving average."""

    retries_passes = True
    updates_float32_weights = False

    def __init__(self, world: World, precision: Precision) -> None:
        self.world = world
        self.precision = precision
        self.average: Ema | None = None
        self._non_finite: list[str] = []

    def prepare(self, objective: AnyObjective, build_optimizer: BuildOptimizer, ema_decay: float | None = None) -> None:
        self.objective = objective.to(self.world.device)
        self.optimizer = build_optimizer(p for p in self.objective.parameters() if p.requires_grad)
        if ema_decay is not None:
            trained = {name: p for name, p in self.objective.model.named_parameters() if p.requires_grad}
            self.average = Ema(trained, ema_decay)

    def segment(self, batch: Batch, carry: Any) -> SegmentOutput[Any]:
        with self.precision.computing(self.world.device):
            output: SegmentOutput[Any] = self.objective(batch, carry)
        return output

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        # A step of one pass on one rank adds nothing up, and keeps narrow gradients at half the bytes.
        if not last or self.world.size > 1:
            sum_gradients_in_float32(self.objective.parameters())
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def reduce(self, failed: bool) -> bool:
        return failed

    def step(self, max_norm: float, scale: float) -> float:
        self._non_finite = []
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        norm_tensor = total_norm(gradients) / scale
        norm = float(norm_tensor)
        if math.isfinite(norm):
            multiply_gradients(self.optimizer, gradients, clip_factor(norm_tensor, max_norm) / scale)
            self._update()
        else:
            self._non_finite = [
                name
                for name, p in self.objective.named_parameters()
                if p.grad is not None and not bool(torch.isfinite(p.grad).all())
            ]
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _update(self) -> None:
        """Update weights and moving average from the gradients, which are scaled and clipped."""
        self.optimizer.step()
        if self.average is not None:
            self.average.update()

    def discard(self) -> None:
        self._non_finite = []
        self.optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def non_finite_parameters(self) -> list[str]:
        return self._non_finite

    def overflowed_parameters(self) -> list[str]:
        if not isinstance(self.optimizer, PerParameterOptimizer) or not self.optimizer.overflowed:
            return []
        overflowed = {id(parameter) for parameter in self.optimizer.overflowed}
        return [name for name, parameter in self.objective.named_parameters() if id(parameter) in overflowed]

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.world.sum(tensor)

    @contextmanager
    def evaluating(self) -> Iterator[AnyObjective]:
        with self.average.in_place() if self.average is not None else nullcontext():
            yield self.objective

    def full_weights(self) -> dict[str, Tensor]:
        return dict(self.objective.model.state_dict())

    def state_files(self) -> dict[str, Mapping[str, Tensor]]:
        if not self.world.leads:
            return {}
        state = optimizer_tensors(self.optimizer, dict(self.objective.named_parameters()))
        files: dict[str, Mapping[str, Tensor]] = {WEIGHTS: self.full_weights(), OPTIMIZER_FILE: state}
        if self.average is not None:
            files[AVERAGE] = self.average.average
        return files

    def load(self, folder: Path) -> None:
        fill_module(self.objective.model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
        load_optimizer(self.optimizer, dict(self.objective.named_parameters()), folder)
        if self.average is not None:
            self.average.load(read_tensors(folder / AVERAGE))
