"""The only place where settings become objects, as straight-line code.

One job: model -> weights -> objective -> strategy -> loop, for one worker. It starts nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.build import build_model, build_objective
from hrm_ray.model.config import ModelConfig, swiglu_width
from hrm_ray.model.transforms.recompute import recompute_blocks
from hrm_ray.settings.model import LossKind
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.ema import Ema
from hrm_ray.train.evaluate import HeldOut
from hrm_ray.train.feed import BatchShape, Feed, RolloutFeed, SlotFeed, exploration
from hrm_ray.train.loop import LoopParts, Rates, TrainingLoop
from hrm_ray.train.microbatch import wanted_columns
from hrm_ray.train.optimizers import SparseSignSGD, builder
from hrm_ray.train.schedules import Schedule
from hrm_ray.train.start_weights import start_weights
from hrm_ray.train.strategies import STRATEGIES
from hrm_ray.train.weights_file import fill_module
from hrm_ray.train.world import World
from hrm_ray.values import SampleSet, StopReason


@dataclass(frozen=True)
class Workplace:
    """What a worker trains with: the loop, and the held-out set if there is one."""

    loop: TrainingLoop
    held_out: HeldOut | None


def assemble(
    settings: RunSettings,
    config: ModelConfig,
    samples: SampleSet,
    held_out: SampleSet | None,
    world: World,
    schedule_steps: int,
    stop_poll: Callable[[], StopReason | None],
    *,
    resumes: bool = False,
) -> Workplace:
    """Put the parts of one worker together. `settings` are resolved; `schedule_steps` is the schedule's length."""
    model = build_model(config)
    model.initialise(settings.run.seed)
    # A resumed run has its weights in the checkpoint; what it once started from may be gone.
    if settings.model.student_init is not None and not resumes:
        fill_module(model, start_weights(settings.model.student_init, config), str(settings.model.student_init))
    if settings.memory.gradient_checkpointing:
        recompute_blocks(model)
    objective = build_objective(
        model,
        cast(LossKind, settings.model.loss),
        supervision=str(settings.model.supervision),
        halt_margin=settings.model.halt_margin,
    )
    assert world.size == 1 or settings.cluster.ddp is not False, "several workers need DDP"
    strategy = STRATEGIES["ddp" if world.size > 1 or (world.grouped and settings.cluster.ddp) else "single"](world)
    strategy.prepare(objective, builder(settings.optimizer))
    shape = BatchShape(
        settings.optimizer.batch_size, settings.optimizer.gradient_accumulation_steps, world.rank, world.size
    )
    carried = config.task == "puzzle" and settings.model.supervision == "segment"
    table = model.embedding.puzzle_emb if isinstance(model, ActV1) else None
    parts = LoopParts(
        strategy=strategy,
        objective=objective,
        feed=_feed(settings, config, samples, shape, carried),
        shape=shape,
        rates=Rates(_schedule(settings, schedule_steps), settings.optimizer.lr, settings.optimizer.puzzle_emb_lr),
        wanted=wanted_columns(config),
        carried=carried,
        grad_clip=settings.optimizer.grad_clip,
        max_bad_steps=settings.optimizer.max_bad_steps,
        sparse=SparseSignSGD(table, settings.optimizer.puzzle_emb_weight_decay) if table is not None else None,
        ema=Ema(model, settings.optimizer.ema) if settings.optimizer.ema is not None else None,
    )
    evaluation = (
        HeldOut(held_out, shape.batch_size, settings.data.eval_batches * shape.accumulation * shape.size)
        if held_out is not None
        else None
    )
    objective.train()
    return Workplace(TrainingLoop(parts, stop_poll), evaluation)


def _feed(settings: RunSettings, config: ModelConfig, samples: SampleSet, shape: BatchShape, carried: bool) -> Feed:
    seed, linear, epochs = settings.run.seed, settings.data.linear_dataset, settings.run.epochs
    if not carried:
        return RolloutFeed(samples, shape, seed=seed, linear=linear, epochs=epochs)
    explore = exploration(seed, settings.model.halt_exploration_prob or 0.0, config.halt_max_steps)
    return SlotFeed(samples, shape, seed=seed, linear=linear, epochs=epochs, explore=explore)


def _schedule(settings: RunSettings, steps: int) -> Schedule:
    chosen = settings.optimizer
    return Schedule(chosen.lr_schedule, chosen.warmup_steps, steps, chosen.lr_min_ratio, chosen.wsd_decay_ratio)


def schedule_length(settings: RunSettings, samples: int, effective_batch: int, halt_max_steps: int) -> int:
    """Weight updates the learning-rate schedule is laid out for.

    With --steps that many (or what the epochs need, if fewer). With --epochs alone: batches in all epochs; in carried
    supervision a row stays for up to `halt_max_steps` updates, so that is an upper bound, and the schedule may not
    reach its end.
    """
    limit = settings.run.step_limit
    if settings.run.epochs is None:
        return limit or 0
    longest = halt_max_steps if settings.model.supervision == "segment" else 1
    needed = settings.run.epochs * -(-samples // effective_batch) * longest
    return needed if limit is None else min(limit, needed)


def model_config(
    settings: RunSettings, vocab_size: int, *, seq_len: int | None = None, puzzle_identifiers: int = 1
) -> ModelConfig:
    """The architecture that resolved settings ask for, given what the data decides."""
    chosen = settings.model
    transformer = chosen.arch == "transformer"
    width = chosen.d_ff if chosen.d_ff is not None else swiglu_width(chosen.hidden_size, chosen.expansion)
    assert chosen.task is not None
    return ModelConfig(
        task=chosen.task,
        vocab_size=vocab_size,
        seq_len=seq_len or settings.data.max_seq_len or 0,
        hidden_size=chosen.hidden_size,
        num_heads=chosen.num_heads,
        intermediate_size=width,
        h_layers=chosen.h_layers,
        l_layers=chosen.l_layers,
        h_cycles=1 if transformer else chosen.h_cycles,
        l_cycles=1 if transformer else chosen.l_cycles,
        halt_max_steps=1 if transformer else chosen.halt_max_steps,
        arch=chosen.arch,
        pos_encodings=chosen.pos_encodings,
        rope_theta=chosen.rope_theta,
        rms_norm_eps=chosen.rms_norm_eps,
        lm_mask=chosen.lm_mask,
        bp_steps=1 if transformer else chosen.bp_steps,
        halt_rule="none" if transformer else chosen.halt_rule,
        puzzle_emb_ndim=chosen.puzzle_emb_ndim,
        num_puzzle_identifiers=puzzle_identifiers,
    )
