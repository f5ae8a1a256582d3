"""Fully sharded data parallel training by PyTorch's FSDP2 (Zhao et al. 2023, arXiv 2304.11277)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hrm_ray.bundle.weights_file import check_fit, read_tensors
from hrm_ray.errors import DataError, Fault
from hrm_ray.model.layers import Block
from hrm_ray.model.objective import AnyObjective, Batch, SegmentOutput
from hrm_ray.train.optimizer_state import OPTIMIZER_FILE, SEPARATOR, optimizer_tensors
from hrm_ray.train.optimizers import BuildOptimizer
from hrm_ray.train.per_parameter_optimizer import UPDATES
from hrm_ray.train.strategies.single import AVERAGE, WEIGHTS, Ema, SingleStrategy, clip_factor, total_norm
from hrm_ray.train.strategies.zero import FlatOutput, without_hooks


class FsdpStrategy(SingleStrategy):
    """Every rank has its rows (of the first dimension) of each weight, gradient, moment and average.

    Blocks are gathered for each of their passes, the rest of the model (embeddings, heads) from the first pass of a
    micro-batch until its backward pass. Optimizer and moving average see a rank's rows as tensors of their own, so any
    optimizer serves whose updates are made value by value. Experts are refused: their numbers were wrong in trials.
    """

    # Gradients are added among the ranks within the backward pass.
    retries_passes = False
    _evaluates = False

    def prepare(self, objective: AnyObjective, build_optimizer: BuildOptimizer, ema_decay: float | None = None) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.objective = objective.to(self.world.device)
        with torch.no_grad():
            for tensor in (*objective.parameters(), *objective.buffers()):
                dist.broadcast(tensor.data, 0)
        self.flat = FlatOutput(self.objective, lambda: self.precision.computing(self.world.device))
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        self.wrapped: list[Any] = [module for module in self.objective.model.modules() if isinstance(module, Block)]
        self.wrapped.append(self.flat)
        for module in self.wrapped:
            fully_shard(module, mesh=mesh)
        self.trained: dict[str, Any] = {n: p for n, p in self.objective.named_parameters() if p.requires_grad}
        self.rows = {name: nn.Parameter(p.detach().to_local()) for name, p in self.trained.items()}
        self.optimizer = build_optimizer(self.rows.values())
        if ema_decay is not None:
            of_model = {id(p): name for name, p in self.objective.model.named_parameters()}
            names = {name: of_model[id(p)] for name, p in self.trained.items() if id(p) in of_model}
            self.average = Ema({names[name]: rows for name, rows in self.rows.items() if name in names}, ema_decay)

    def segment(self, batch: Batch, carry: Any) -> SegmentOutput[Any]:
        totals = self.flat(batch, carry)
        output, self.flat.output = self.flat.output, None
        if output is None:
            raise RuntimeError("FSDP did not call the module")
        terms = tuple(replace(term, total=total) for term, total in zip(output.terms, totals, strict=True))
        return replace(output, terms=terms)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def reduce(self, failed: bool) -> bool:
        """Gradients are averaged in every backward pass, where a failure ends the run."""
        return False

    def step(self, max_norm: float, scale: float) -> float:
        self._non_finite = []
        for name, parameter in self.trained.items():
            self.rows[name].grad = None if parameter.grad is None else parameter.grad.to_local()
        gradients = [rows.grad for rows in self.rows.values() if rows.grad is not None]
        norm_tensor = self.world.sum(total_norm(gradients).square()).sqrt() / scale
        norm = float(norm_tensor)
        if math.isfinite(norm):
            torch._foreach_mul_(gradients, clip_factor(norm_tensor, max_norm) / scale)
            self._update()
        else:
            self._non_finite = self._names_not_finite()
        self._clear()
        return norm

    def _names_not_finite(self) -> list[str]:
        """Parameters whose gradient is not finite on any rank; a collective."""
        bad = [rows.grad is not None and not bool(rows.grad.isfinite().all()) for rows in self.rows.values()]
        found = self.world.sum(torch.tensor(bad, dtype=torch.float32, device=self.world.device)).tolist()
        return [name for name, ranks in zip(self.rows, found, strict=True) if ranks]

    def _clear(self) -> None:
        for name, parameter in self.trained.items():
            parameter.grad = self.rows[name].grad = None

    def discard(self) -> None:
        self._non_finite = []
        self._clear()

    @contextmanager
    def evaluating(self) -> Iterator[AnyObjective]:
        """The whole model is on every rank inside, without the hooks that gather and free its weights."""
        with self.average.in_place() if self.average is not None else nullcontext():
            for module in self.wrapped:
                module.unshard()
            self._evaluates = True
            try:
                with without_hooks(self.flat), _whole_in_state_dict(self.flat):
                    yield self.objective
            finally:
                self._evaluates = False
                for module in self.wrapped:
                    module.reshard()

    def full_weights(self) -> dict[str, Tensor]:
        state: dict[str, Any] = self.objective.model.state_dict()
        if self._evaluates:
            return state
        return self._on_leader((name, self._whole(tensor)) for name, tensor in state.items())

    def _on_leader(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors, of which each is made on all ranks, in host memory of the leading rank."""
        kept: dict[str, Tensor] = {}
        for name, tensor in tensors:
            if self.world.leads:
                kept[name] = tensor.cpu()
        return kept

    def _whole(self, tensor: Any) -> Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _joined(self, rows: Tensor, like: Any) -> Tensor:
        """All ranks' `rows` of a tensor of the shape of `like`; a collective."""
        from torch.distributed.tensor import DTensor

        whole: Tensor = DTensor.from_local(
            rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        ).full_tensor()
        return whole

    def _own(self, whole: Tensor, like: Any) -> Tensor:
        """This rank's rows of `whole`, where `like` is divided."""
        from torch.distributed.tensor import distribute_tensor

        whole = whole.to(self.world.device)
        # Every rank has read the whole tensor, so nothing is sent.
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()

    def state_files(self) -> dict[str, Mapping[str, Tensor]]:
        weights, trained = self.full_weights(), dict(self.objective.model.named_parameters())
        state = self._on_leader(
            (name, self._joined(value, self.trained[name.rpartition(SEPARATOR)[0]]) if value.dim() else value)
            for name, value in optimizer_tensors(self.optimizer, self.rows).items()
        )
        average: Mapping[str, Tensor] = self.average.average if self.average is not None else {}
        whole = self._on_leader((name, self._joined(rows, trained[name])) for name, rows in average.items())
        if not self.world.leads:
            return {}
        files: dict[str, Mapping[str, Tensor]] = {WEIGHTS: weights, OPTIMIZER_FILE: state}
        return files | ({AVERAGE: whole} if whole else {})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        weights = read_tensors(folder / WEIGHTS)
        check_fit(self.objective.model, weights, str(folder / WEIGHTS))
        parameters: dict[str, Any] = dict(self.objective.model.named_parameters())
        for name, tensor in self.objective.model.state_dict().items():
            if name in parameters:
                parameters[name].to_local().copy_(self._own(weights[name], parameters[name]))
            else:
                tensor.copy_(weights[name])
        path = folder / OPTIMIZER_FILE
        for full_name, value in read_tensors(path).items():
            name, _, key = full_name.rpartition(SEPARATOR)
            if name not in self.trained or (value.dim() and value.shape != self.trained[name].shape):
                hint = "Resume with the architecture and the optimizer that wrote the checkpoint"
                raise DataError(Fault(f"{full_name!r} in {path}", "belongs to another model or optimizer", hint))
            if key != UPDATES:
                own = self._own(value, self.trained[name]).clone() if value.dim() else value
                self.optimizer.state[self.rows[name]][key] = own
        if self.average is not None:
            for name, value in read_tensors(folder / AVERAGE).items():
                self.average.average[name].copy_(self._own(value, parameters[name]))


@contextmanager
def _whole_in_state_dict(flat: nn.Module) -> Iterator[None]:
    """`state_dict` gives the weights as they are inside, where FSDP's own hook would divide them first."""
    kept = [(module, module._state_dict_pre_hooks) for module in flat.modules()]
    try:
        for module, _ in kept:
            module._state_dict_pre_hooks = OrderedDict()
        yield
    finally:
        for module, hooks in kept:
            module._state_dict_pre_hooks = hooks
