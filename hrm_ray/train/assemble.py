"""Builds one worker's training loop from the settings: model, weights, objective, optimizer, strategy, loader.

The only place where settings become objects, as straight-line code. The module starts nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeAlias, cast

from torch import nn

from hrm_ray.bundle.start_weights import start_weights
from hrm_ray.bundle.weights_file import fill_module
from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.attention_backends import load_kernel
from hrm_ray.model.build import build_model, build_objective
from hrm_ray.model.chunked import Chunking
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.losses import LossKind
from hrm_ray.model.objective import AnyObjective, regularise
from hrm_ray.model.router_losses import RouterLosses
from hrm_ray.model.transformer import Transformer
from hrm_ray.model.transforms.activation_checkpointing import apply_activation_checkpointing
from hrm_ray.model.transforms.attend import use_kernel
from hrm_ray.model.transforms.cast_weights import cast_weights
from hrm_ray.model.transforms.compile import compile_blocks, compiles
from hrm_ray.model.transforms.peft import Adapters, apply_peft
from hrm_ray.model.transforms.quantise import quantise_projections
from hrm_ray.model.transforms.single_expert import train_single_expert
from hrm_ray.settings.adaptive_lr import AdaptiveLrSettings
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.adaptive_lr import AdaptiveLr
from hrm_ray.train.attention_choice import kernel_of
from hrm_ray.train.claimed_loader import ClaimedLoader
from hrm_ray.train.claimed_rows import ClaimedPuzzles, ClaimedText
from hrm_ray.train.loaders import BatchLoader, BatchSize, RolloutLoader, SlotLoader, StopCondition, exploration
from hrm_ray.train.loop import TrainingLoop, TrainState
from hrm_ray.train.microbatch import wanted_columns
from hrm_ray.train.optimizers import BuildOptimizer, SparseSignSGD, builder, followed_by
from hrm_ray.train.per_parameter_optimizer import PerParameterOptimizer, StateStorage
from hrm_ray.train.precision import NARROW, LossScaler, activation_dtype, choose_precision
from hrm_ray.train.schedules import LrSchedule, Schedule
from hrm_ray.train.strategies import STRATEGIES
from hrm_ray.train.stream_loader import StreamLoader, TextStream
from hrm_ray.train.world import World
from hrm_ray.types import SampleSet, StopReason

TrainingData: TypeAlias = SampleSet | TextStream | ClaimedText | ClaimedPuzzles
"""What a loop trains on: a set of puzzles, text, or the ranges of either that a block trainer claims."""


def assemble(
    settings: RunSettings,
    config: ModelConfig,
    data: TrainingData,
    world: World,
    schedule_steps: int,
    stop_poll: Callable[[], StopReason | None] = lambda: None,
    *,
    resumes: bool = False,
    adaptive_lr: AdaptiveLrSettings | None = None,
) -> TrainingLoop:
    """The loop of one worker. `settings` are resolved; `schedule_steps` is the schedule's length; `adaptive_lr` is the
    content of --adaptive-lr-config."""
    config = replace(config, forward_dtype=activation_dtype(settings.memory, world.device))
    model = build_model(config)
    model.initialise(settings.run.seed)
    # A resumed run has its weights in the checkpoint, and the start weights may be gone by now.
    if settings.model.student_init is not None and not resumes:
        fill_module(model, start_weights(settings.model.student_init, config), str(settings.model.student_init))
    adapters = _transform(model, settings, schedule_steps)
    use_kernel(model, load_kernel(kernel_of(settings, config, world.device)))
    memory = settings.memory
    calls = compile_blocks(model, strict=settings.cluster.strict) if compiles(settings, world.device) else None
    if memory.gradient_checkpointing:
        apply_activation_checkpointing(model)
    objective = objective_of(model, settings, adapters)
    precision = choose_precision(memory.amp is True, memory.amp_dtype, memory.model_dtype, world.device)
    strategy_name = settings.cluster.strategy_for(world.size)
    if strategy_name == "single" and world.size > 1:
        raise RuntimeError(f"the strategy single has one worker, and there are {world.size}")
    strategy = STRATEGIES[strategy_name](world, precision)
    build = _build_optimizer(settings, world, adapters, widens=not strategy.updates_float32_weights)
    strategy.prepare(objective, build, settings.optimizer.ema)
    chosen = settings.optimizer
    schedule = Schedule(
        chosen.lr_schedule, chosen.warmup_steps, schedule_steps, chosen.lr_min_ratio, chosen.wsd_decay_ratio
    )
    adaptive = AdaptiveLr(adaptive_lr, chosen.warmup_steps) if adaptive_lr is not None else None
    shape = BatchSize(chosen.batch_size, chosen.gradient_accumulation_steps, world.rank, world.size)
    carried = config.task == "puzzle" and settings.model.supervision == "segment"
    table = model.embedding.puzzle_emb if isinstance(model, ActV1) else None
    parts = TrainState(
        strategy=strategy,
        objective=objective,
        loader=_loader(settings, config, data, shape, carried),
        shape=shape,
        lr_schedule=LrSchedule(schedule, chosen.lr, chosen.puzzle_emb_lr, adaptive),
        wanted=wanted_columns(config),
        carried=carried,
        grad_clip=chosen.grad_clip,
        max_bad_steps=chosen.max_bad_steps,
        seed=settings.run.seed,
        draws=config.dropout_rate > 0 or (settings.adapt.use_peft and settings.adapt.lora_dropout > 0),
        sparse=SparseSignSGD(table, chosen.puzzle_emb_weight_decay) if table is not None and table.trained else None,
        scaler=LossScaler() if precision.scaled else None,
        adapters=adapters,
        compiled=calls,
    )
    objective.train()
    return TrainingLoop(parts, stop_poll)


def _transform(model: nn.Module, settings: RunSettings, schedule_steps: int) -> Adapters | None:
    """Apply the transforms of the settings to the model; returns the adapters, if any."""
    # This order: quantising starts from float32 weights, and adapters stay float32 beside narrow ones.
    memory = settings.memory
    if memory.load_in_8bit or memory.load_in_4bit:
        quantise_projections(model, 8 if memory.load_in_8bit else 4)
    if memory.model_dtype != "fp32":
        cast_weights(model, NARROW[memory.model_dtype])
    if settings.run.expert_id is not None and settings.model.expert_index is not None:
        train_single_expert(model, settings.model.expert_index)
    if not settings.adapt.use_peft:
        return None
    return apply_peft(model, settings.adapt, seed=settings.run.seed, total_steps=schedule_steps)


def objective_of(model: ActV1 | Transformer, settings: RunSettings, adapters: Adapters | None = None) -> AnyObjective:
    """What the settings train `model` for."""
    chosen, memory = settings.model, settings.memory
    chunking: Chunking | None = None
    if memory.use_chunked_training:
        exact = memory.chunk_gradients == "exact"
        chunking = Chunking(memory.chunk_size, exact=exact, offload=memory.cpu_offload)
    objective = build_objective(
        model,
        cast(LossKind, chosen.loss),
        supervision=str(chosen.supervision),
        halt_margin=chosen.halt_margin,
        router_losses=RouterLosses(chosen.moe_load_balance_coef, chosen.moe_router_z_coef),
        chunking=chunking,
    )
    if adapters is not None and adapters.ranks is not None:
        regularise(objective, adapters.ranks.regulariser())
    return objective


def _build_optimizer(settings: RunSettings, world: World, adapters: Adapters | None, *, widens: bool) -> BuildOptimizer:
    """What builds the optimizer; with `widens` it makes 16-bit weights float32 for their update."""
    build = builder(settings.optimizer)
    offload = settings.memory.optimizer_offload and world.device.type != "cpu"
    if (widens and settings.memory.model_dtype != "fp32") or offload:
        storage = StateStorage(world.device, offload=offload)
        build = partial(PerParameterOptimizer, build=build, seed=settings.run.seed, storage=storage)
    if adapters is not None and adapters.ranks is not None:
        build = followed_by(build, adapters.ranks.after_update)
    return build


def _loader(
    settings: RunSettings, config: ModelConfig, data: TrainingData, shape: BatchSize, carried: bool
) -> BatchLoader:
    seed, linear, run = settings.run.seed, settings.data.linear_dataset, settings.run
    stop_condition = StopCondition(run.epochs, after_epoch=run.stop_after_epoch, after_block=run.stop_after_block)
    if isinstance(data, TextStream):
        return StreamLoader(data, shape, seed=seed, stop_condition=stop_condition)
    explore = exploration(seed, settings.model.halt_exploration_prob or 0.0, config.halt_max_steps)
    if isinstance(data, ClaimedText | ClaimedPuzzles):
        return ClaimedLoader(data, shape, carried=carried, explore=explore if carried else None)
    if not carried:
        return RolloutLoader(data, shape, seed=seed, linear=linear, stop_condition=stop_condition)
    return SlotLoader(data, shape, seed=seed, linear=linear, stop_condition=stop_condition, explore=explore)
