"""DeepSpeed ZeRO, stages 1 to 3 (Rajbhandari et al. 2020, arXiv 1910.02054), behind the interface of a strategy.

DeepSpeed owns the float32 weights of the update, the gradients and the optimizer state, as flat partitions. Checkpoints
are written by parameter name, as every other strategy writes them, and never in DeepSpeed's own format, which holds for
one number of ranks only. Names of DeepSpeed that are private stand in tests/unit/test_private_names.py.

Weights in bfloat16 are the float32 weights rounded to nearest after each update, and gradients are added in float32. A
checkpoint then has the float32 weights: they give the others to the bit, and any strategy that reads them rounds alike.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hrm_ray.bundle.weights_file import check_fit, read_tensors
from hrm_ray.errors import DataError, Fault
from hrm_ray.model.objective import AnyObjective, Batch, SegmentOutput
from hrm_ray.train.optimizer_state import OPTIMIZER_FILE, SEPARATOR
from hrm_ray.train.optimizers import BuildOptimizer
from hrm_ray.train.per_parameter_optimizer import UPDATES
from hrm_ray.train.precision import Precision, sum_gradients_in_float32
from hrm_ray.train.strategies.ddp import any_rank
from hrm_ray.train.strategies.owned_average import OwnedAverage, Ownership
from hrm_ray.train.strategies.single import AVERAGE, WEIGHTS, Ema
from hrm_ray.train.world import World

BUCKET_VALUES = 8 * 2**20
"""Largest bucket of a reduction or gather, in values. DeepSpeed's default, 5e8, would hold 2 GB on every rank."""
SMALL_BUCKET_VALUES = 2**18
"""Below this a smaller bucket costs more in further collectives than it saves."""


def reduce_bucket_values(trained_values: int) -> int:
    """Values of the bucket in which gradients are reduced: an eighth of the gradients, because stage 3 keeps it."""
    return min(BUCKET_VALUES, max(-(-trained_values // 8), min(SMALL_BUCKET_VALUES, trained_values)))


class FlatOutput(nn.Module):
    """The module that DeepSpeed or FSDP wraps. Its output is a tuple of tensors: their hooks walk tuples, lists and
    dictionaries, and would not see the loss terms in a SegmentOutput, so that their weights were not gathered for the
    backward pass."""

    objective: AnyObjective
    computing: Callable[[], AbstractContextManager[None]]

    def __init__(self, objective: AnyObjective, computing: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.model = objective.model
        # Not a submodule: its parameters are the model's, and would have two names.
        self.__dict__["objective"] = objective
        self.computing = computing
        self.output: SegmentOutput[Any] | None = None

    def forward(self, batch: Batch, carry: Any) -> tuple[Tensor, ...]:
        # DeepSpeed switches an autocast outside of its engine off.
        with self.computing():
            self.output = self.objective(batch, carry)
        return tuple(term.total for term in self.output.terms)


class ZeroStrategy:
    """Stages 1 and 2: every rank has whole weights, and a part of the optimizer state and of the float32 weights that
    are updated; in stage 2 of the gradients too, which are reduced in every backward pass."""

    stage = 1
    updates_float32_weights = True

    def __init__(self, world: World, precision: Precision) -> None:
        self.world = world
        self.precision = precision
        # Stages 2 and 3 reduce inside the passes: a rank that runs out of memory leaves the others waiting there.
        self.retries_passes = self.stage == 1
        self.average: Ema | None = None
        self._bad_step = False
        self._non_finite: list[str] = []

    def prepare(self, objective: AnyObjective, build_optimizer: BuildOptimizer, ema_decay: float | None = None) -> None:
        deepspeed = _import_deepspeed(self.world.device)
        self.objective = objective.to(self.world.device)
        self.trained = {name: p for name, p in self.objective.named_parameters() if p.requires_grad}
        self.narrow = all(parameter.dtype == torch.bfloat16 for parameter in self.trained.values())
        self.flat = FlatOutput(self.objective, lambda: self.precision.computing(self.world.device))
        with torch.no_grad():
            for buffer in self.objective.buffers():
                dist.broadcast(buffer, 0)
        values = min(BUCKET_VALUES, sum(parameter.numel() for parameter in self.objective.parameters()))
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.flat,
            optimizer=build_optimizer(self.trained.values()),
            config=self._config(values, reduce_bucket_values(sum(p.numel() for p in self.trained.values()))),
            dist_init_required=False,
        )
        if self.narrow and self.stage == 1:
            # Stage 1 adds gradients up as PyTorch does, and reduces them in the type `dtype`. Its setting for that,
            # grad_accum_dtype, chooses another optimizer, without a loss scale and without state by name.
            sum_gradients_in_float32(self.trained.values())
            self.optimizer.dtype = self.optimizer.gradient_accumulation_dtype = torch.float32
        self.average = self._new_average(ema_decay) if ema_decay is not None else None

    def _config(self, bucket_values: int, reduce_values: int) -> dict[str, Any]:
        return {
            # The loop owns accumulation: any number of backward passes, then one step.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
            "bf16": {"enabled": self.narrow},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32" if self.narrow and self.stage > 1 else None},
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": False,
                "reduce_bucket_size": reduce_values,
                "allgather_bucket_size": bucket_values,
                "stage3_prefetch_bucket_size": bucket_values,
                "stage3_max_live_parameters": bucket_values,
                "stage3_max_reuse_distance": bucket_values,
                # Every parameter is partitioned, so that one rule holds for the moving average.
                "stage3_param_persistence_threshold": 0,
            },
        }

    def _new_average(self, decay: float) -> Ema:
        return OwnedAverage(Ownership(self.objective.model, self.world), decay)

    def segment(self, batch: Batch, carry: Any) -> SegmentOutput[Any]:
        totals = self.engine(batch, carry)
        output, self.flat.output = self.flat.output, None
        if output is None:
            raise RuntimeError("DeepSpeed's engine did not call the module")
        terms = tuple(replace(term, total=total) for term, total in zip(output.terms, totals, strict=True))
        return replace(output, terms=terms)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def reduce(self, failed: bool) -> bool:
        """DeepSpeed reduces: in `step` (stage 1) or in every backward pass (stages 2 and 3, where a failure ends the
        run)."""
        return self.stage == 1 and any_rank(self.world, failed)

    def step(self, max_norm: float, scale: float) -> float:
        if self._bad_step:
            # Only after a skipped step: to look at every gradient costs time.
            self._non_finite = self._names_not_finite()
        self.optimizer.clip_grad = max_norm
        self.optimizer.override_loss_scale(scale)
        self.engine.step()
        # DeepSpeed would multiply the next losses by the scale, which the loop has done.
        self.optimizer.override_loss_scale(1.0)
        found = self.engine.get_global_grad_norm()
        norm = math.nan if found is None or float(found) < 0 else float(found)
        self._bad_step = not math.isfinite(norm)
        if self._bad_step:
            return math.inf
        self._non_finite = []
        if self.average is not None:
            self.average.update()
        return norm

    def _names_not_finite(self) -> list[str]:
        """Parameters whose gradient is not finite on any rank; a collective."""
        found = [name for name, gradient in self._gradients() if not bool(gradient.isfinite().all())]
        on_ranks: list[list[str]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(on_ranks, found)
        return [name for name in self.trained if any(name in names for names in on_ranks)]

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradients before the step: in stage 1 still this rank's own."""
        for name, parameter in self.trained.items():
            if parameter.grad is not None:
                yield name, parameter.grad

    def discard(self) -> None:
        self._non_finite = []
        optimizer = self.optimizer
        optimizer.zero_grad(set_to_none=True)
        if self.stage < 3:
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
            optimizer.all_grad_tensors = dict.fromkeys(optimizer.all_grad_tensors)
            optimizer.reset_partition_gradient_structures()
            optimizer.micro_step_id = -1

    def set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def non_finite_parameters(self) -> list[str]:
        return self._non_finite or ["a parameter that ZeRO does not name"]

    def overflowed_parameters(self) -> list[str]:
        return []

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.world.sum(tensor)

    @contextmanager
    def evaluating(self) -> Iterator[AnyObjective]:
        with self.average.in_place() if self.average is not None else nullcontext():
            yield self.objective

    def full_weights(self) -> dict[str, Tensor]:
        return dict(self.objective.model.state_dict())

    def state_files(self) -> dict[str, Mapping[str, Tensor]]:
        weights = self.full_weights() | self._float32_weights()
        state = self._optimizer_state()
        average = self._whole_average()
        if not self.world.leads:
            return {}
        files: dict[str, Mapping[str, Tensor]] = {WEIGHTS: weights, OPTIMIZER_FILE: state}
        return files | ({AVERAGE: average} if average is not None else {})

    def _float32_weights(self) -> dict[str, Tensor]:
        """The weights that are updated, by name, on the leading rank, where they are more exact than those of the
        model; a collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        if not self.narrow:
            return {}
        found: dict[str, Tensor] = {}
        for name, parameter in self._trained_of_model():
            whole = safe_get_full_fp32_param(parameter)
            if self.world.leads:
                found[name] = whole.cpu()
        return found

    def _trained_of_model(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.objective.model.named_parameters() if p.requires_grad)

    def _whole_average(self) -> dict[str, Tensor] | None:
        return self.world.to_leader(self.average.average) if self.average is not None else None

    def _flat_partitions(self) -> list[Tensor]:
        """This rank's float32 partitions, for which the optimizer keeps state."""
        partitions: list[Tensor] = self.optimizer.single_partition_of_fp32_groups
        return partitions

    def _optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer state by `parameter|key`, on the leading rank; a collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self.optimizer.optimizer.state
        first = self._flat_partitions()[0]
        state = inner.get(first, {})
        found: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            for key, value in state.items():
                per_value = isinstance(value, Tensor) and value.shape == first.shape
                tensor = safe_get_full_optimizer_state(parameter, key) if per_value else torch.as_tensor(value)
                if self.world.leads:
                    found[f"{name}{SEPARATOR}{key}"] = tensor.cpu().clone()
        return found

    def load(self, folder: Path) -> None:
        with self._whole_parameters(written=True):
            weights = read_tensors(folder / WEIGHTS)
            check_fit(self.objective.model, weights, str(folder / WEIGHTS))
            self.objective.model.load_state_dict(weights)
        # The weights that DeepSpeed updates are copies of its own.
        self.optimizer.refresh_fp32_params()
        if self.narrow:
            for name, parameter in self._trained_of_model():
                self._set_partition(parameter, weights[name].float())
        self._load_optimizer_state(folder)
        self._load_average(folder)

    def _load_average(self, folder: Path) -> None:
        if isinstance(self.average, OwnedAverage):
            self.average.load_own(folder)

    @contextmanager
    def _whole_parameters(self, *, written: bool = False) -> Iterator[None]:
        """All parameters are whole on every rank inside; `written`: their values are set there, alike on all ranks."""
        yield

    def _load_optimizer_state(self, folder: Path) -> None:
        path = folder / OPTIMIZER_FILE
        stored = read_tensors(path)
        by_parameter: dict[str, dict[str, Tensor]] = {name: {} for name in self.trained}
        for full_name, tensor in stored.items():
            name, _, key = full_name.rpartition(SEPARATOR)
            if name not in by_parameter:
                hint = "Resume with the architecture and the optimizer that wrote the checkpoint"
                raise DataError(Fault(f"{full_name!r} in {path}", "belongs to another model or optimizer", hint))
            if key != UPDATES:
                by_parameter[name][key] = tensor
        keys = next(iter(by_parameter.values()))
        if not keys:
            return
        # The state must exist before it can be set by name: DeepSpeed makes it in the first step.
        for flat in self._flat_partitions():
            state = self.optimizer.optimizer.state[flat]
            for key, value in keys.items():
                if value.dim() == 0:
                    state[key] = int(value) if value.dtype == torch.int64 else value.clone()
                elif key not in state:
                    state[key] = torch.zeros_like(flat)
        self._link_state()
        for name, tensors in by_parameter.items():
            for key, tensor in tensors.items():
                if tensor.dim() > 0 or keys[key].dim() > 0:
                    self._set_partition(self.trained[name], tensor, key)

    def _set_partition(self, parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
        """Lay this rank's part of `whole` into the float32 weights, or into the entry `key` of the optimizer state."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is None:
            safe_set_full_fp32_param(parameter, whole.to(self.world.device))
        else:
            safe_set_full_optimizer_state(parameter, whole.to(self.world.device), key)

    def _link_state(self) -> None:
        self.optimizer._lazy_init_hp_params_optimizer_state()


class Zero2Strategy(ZeroStrategy):
    """Stage 2. Before the step the gradients lie in buckets, and have no names."""

    stage = 2


class Zero3Strategy(ZeroStrategy):
    """Stage 3: the weights are partitioned too, and gathered for every module's pass.

    For an evaluation, a checkpoint and the start every rank holds the whole weights for a moment.
    """

    stage = 3
    _evaluates = False

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.trained.items():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                yield name, gradient

    def _new_average(self, decay: float) -> Ema:
        return Ema({name: p.ds_tensor for name, p in self._partitioned().items() if p.requires_grad}, decay)

    def _partitioned(self) -> dict[str, Any]:
        """The parameters by name; DeepSpeed has put its attributes on them."""
        return dict(self.objective.model.named_parameters())

    @contextmanager
    def evaluating(self) -> Iterator[AnyObjective]:
        """The whole model is on every rank inside, without the hooks that gather and free its weights."""
        average = self._gathered_average()
        with self._whole_parameters(), without_hooks(self.flat):
            if average is not None:
                with torch.no_grad():
                    for name, parameter in self.objective.model.named_parameters():
                        if name in average:
                            parameter.copy_(average[name])
            del average
            self._evaluates = True
            try:
                yield self.objective
            finally:
                self._evaluates = False

    def full_weights(self) -> dict[str, Tensor]:
        if self._evaluates:
            return dict(self.objective.model.state_dict())
        with self._whole_parameters():
            whole = self.objective.model.state_dict()
            return {name: tensor.cpu().clone() for name, tensor in whole.items()} if self.world.leads else {}

    @contextmanager
    def _whole_parameters(self, *, written: bool = False) -> Iterator[None]:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(self.objective.model.parameters()), modifier_rank=0 if written else None):
            yield

    def _gathered_average(self) -> dict[str, Tensor] | None:
        if self.average is None:
            return None
        whole: dict[str, Tensor] = {}
        shapes = {name: p.ds_shape for name, p in self._partitioned().items()}
        for name, shard in self.average.average.items():
            parts = [torch.empty_like(shard) for _ in range(self.world.size)]
            dist.all_gather(parts, shard)
            whole[name] = torch.cat(parts)[: shapes[name].numel()].view(shapes[name])
        return whole

    def _whole_average(self) -> dict[str, Tensor] | None:
        return self._gathered_average()

    def _load_average(self, folder: Path) -> None:
        if self.average is None:
            return
        stored = read_tensors(folder / AVERAGE)
        with torch.no_grad():
            for name, shard in self.average.average.items():
                shard.copy_(self._part(stored[name], shard.numel()))

    def _part(self, whole: Tensor, size: int) -> Tensor:
        """This rank's `size` values of a parameter's; the last ranks' are padded with zeros."""
        part = whole.flatten()[self.world.rank * size : (self.world.rank + 1) * size]
        return nn.functional.pad(part, (0, size - part.numel()))

    def _set_partition(self, parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        # DeepSpeed's functions for whole tensors fail where the ranks' parts are padded.
        part = self._part(whole, vars(parameter)["ds_tensor"].numel()).to(self.world.device)
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)

    def _flat_partitions(self) -> list[Tensor]:
        partitions: list[Tensor] = self.optimizer.fp32_partitioned_groups_flat
        return partitions

    def _link_state(self) -> None:
        """Stage 3 finds the state by the partition."""


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """The module and its submodules run without their hooks inside."""
    kept = [(each, each._forward_hooks, each._forward_pre_hooks) for each in module.modules()]
    try:
        for each, _, _ in kept:
            each._forward_hooks, each._forward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for each, hooks, pre_hooks in kept:
            each._forward_hooks, each._forward_pre_hooks = hooks, pre_hooks


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, which is asked for once, and told the device before it looks for one itself."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed calls collectives by names that PyTorch has renamed; one warning for each call site and rank.
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On the CPU DeepSpeed would compile this operation at the first collective, which takes a minute and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
