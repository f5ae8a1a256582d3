"""Which leaves about workers, devices, the run, its vocabulary and its evaluation cannot go together.

One job: those rules.
"""

from __future__ import annotations

from hrm_ray.errors import Fault
from hrm_ray.settings.rule import Rule, said
from hrm_ray.settings.tree import RunSettings


def _warmup_within_run(settings: RunSettings) -> Fault | None:
    steps, warmup = settings.run.step_limit, settings.optimizer.warmup_steps
    if steps is None or warmup < steps:
        return None
    profile = settings.run.profile
    of_profile = profile != "hrm-hf" and "optimizer.warmup_steps" not in settings.given
    return Fault(
        f"--warmup-steps {warmup}{f' (of --profile {profile})' if of_profile else ''} with --steps {steps}"
        f"{'' if settings.run.steps is not None else ' (default)'}",
        "the warm-up would last to the end of the run",
        f"Give at most --warmup-steps {steps - 1}, or more --steps",
    )


def _workers_need_ray(settings: RunSettings) -> Fault | None:
    world = settings.cluster.world_size
    if settings.cluster.launcher != "local" or world is None or world == 1:
        return None
    return Fault(
        said(settings, "cluster.launcher", "cluster.world_size"),
        "the local launcher runs one worker, in this process",
        "Give --launcher ray",
    )


def _workers_need_ddp(settings: RunSettings) -> Fault | None:
    world = settings.cluster.world_size
    if settings.cluster.ddp is not False or world is None or world == 1:
        return None
    return Fault(
        said(settings, "cluster.ddp", "cluster.world_size"),
        "there is no other way yet to use several workers",
        "Give --ddp, or --world-size 1",
    )


def _ddp_needs_ray(settings: RunSettings) -> Fault | None:
    if settings.cluster.launcher != "local" or not settings.cluster.ddp:
        return None
    return Fault(
        said(settings, "cluster.ddp", "cluster.launcher"),
        "the local launcher has one worker, whose gradients there is nothing to average with",
        "Leave out --ddp, or give --launcher ray",
    )


def _address_needs_ray(settings: RunSettings) -> Fault | None:
    if settings.cluster.launcher != "local" or settings.cluster.ray_address is None:
        return None
    return Fault(
        said(settings, "cluster.ray_address", "cluster.launcher"),
        "the local launcher uses no cluster",
        "Give --launcher ray, or leave the address out",
    )


def _gpu_numbers_for_gpus(settings: RunSettings) -> Fault | None:
    if settings.cluster.cuda_ids is None or settings.cluster.device in ("auto", "cuda"):
        return None
    return Fault(
        said(settings, "cluster.cuda_ids", "cluster.device"),
        "GPU numbers mean something only where CUDA devices are used",
        "Give --device cuda, or leave the numbers out",
    )


def _gpu_for_each_worker(settings: RunSettings) -> Fault | None:
    world, numbers = settings.cluster.world_size, settings.cluster.cuda_numbers
    if world is None or not numbers or len(numbers) >= world:
        return None
    return Fault(
        said(settings, "cluster.cuda_ids", "cluster.world_size"),
        f"{world} workers need as many GPUs, and {len(numbers)} named",
        f"Name more GPUs, or give --world-size {len(numbers)}",
    )


def _resume_one_way(settings: RunSettings) -> Fault | None:
    if not settings.run.resume or settings.run.resume_from is None:
        return None
    return Fault(
        said(settings, "run.resume", "run.resume_from"),
        "one goes on from the newest checkpoint, the other from the named one",
        "Give one of the two",
    )


def _vocabulary_bounds_in_order(settings: RunSettings) -> Fault | None:
    least, most = settings.data.min_vocab_size, settings.data.max_vocab_size
    if least <= most:
        return None
    return Fault(
        said(settings, "data.min_vocab_size", "data.max_vocab_size"),
        "there is no size in between",
        f"Give at most --min-vocab-size {most}, or a larger --max-vocab-size",
    )


def _one_held_out_set(settings: RunSettings) -> Fault | None:
    if settings.data.val_split is None or settings.data.eval_file is None:
        return None
    return Fault(
        said(settings, "data.val_split", "data.eval_file"),
        "both say what to evaluate on",
        "Give one of the two",
    )


def _evaluation_needs_data(settings: RunSettings) -> Fault | None:
    """Only what this user said is refused: a profile evaluates where there is something to evaluate on."""
    if settings.run.eval_every == 0 or "run.eval_every" not in settings.given:
        return None
    if settings.data.val_split is not None or settings.data.eval_file is not None:
        return None
    return Fault(
        said(settings, "run.eval_every"),
        "there is nothing to evaluate on",
        "Give --eval-file or --val-split",
    )


LAUNCH_RULES: tuple[Rule, ...] = (
    Rule(
        "warmup_within_run",
        (
            "run.steps",
            "run.epochs",
            "run.iterate",
            "run.stop_after_epoch",
            "run.stop_after_block",
            "run.profile",
            "optimizer.warmup_steps",
        ),
        _warmup_within_run,
    ),
    Rule("workers_need_ray", ("cluster.launcher", "cluster.world_size"), _workers_need_ray),
    Rule("workers_need_ddp", ("cluster.ddp", "cluster.world_size"), _workers_need_ddp),
    Rule("ddp_needs_ray", ("cluster.ddp", "cluster.launcher"), _ddp_needs_ray),
    Rule("address_needs_ray", ("cluster.launcher", "cluster.ray_address"), _address_needs_ray),
    Rule("gpu_numbers_for_gpus", ("cluster.cuda_ids", "cluster.device"), _gpu_numbers_for_gpus),
    Rule("gpu_for_each_worker", ("cluster.cuda_ids", "cluster.world_size"), _gpu_for_each_worker),
    Rule("resume_one_way", ("run.resume", "run.resume_from"), _resume_one_way),
    Rule("vocabulary_bounds_in_order", ("data.min_vocab_size", "data.max_vocab_size"), _vocabulary_bounds_in_order),
    Rule("one_held_out_set", ("data.val_split", "data.eval_file"), _one_held_out_set),
    Rule("evaluation_needs_data", ("run.eval_every", "data.val_split", "data.eval_file"), _evaluation_needs_data),
)
