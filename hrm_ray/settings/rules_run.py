"""Rules about the data, the length of the run, its workers and its devices."""

from __future__ import annotations

from hrm_ray.errors import Fault
from hrm_ray.settings.hub_name import hub_name
from hrm_ray.settings.rule import Rule, gives_way, refuse, written
from hrm_ray.settings.tree import RunSettings


def _hub_config_once(settings: RunSettings) -> Fault | None:
    name, config = hub_name(settings.data.dataset_file or ""), settings.data.dataset_config
    if name is None or name.config is None or config is None or name.config == config:
        return None
    return Fault(
        written(settings, "data.dataset_file", "data.dataset_config"),
        f"the address names the configuration {name.config}, the option another one",
        "Name it once",
    )


def _hub_split_once(settings: RunSettings) -> Fault | None:
    name, split = hub_name(settings.data.dataset_file or ""), settings.data.split
    # Only a split that the user gave: the split of an address stands above the default.
    if name is None or name.split is None or "data.split" not in settings.given or name.split == split:
        return None
    return Fault(
        written(settings, "data.dataset_file", "data.split"),
        f"the address names the split {name.split}, the option another one",
        "Name it once",
    )


def _stride_within_row(settings: RunSettings) -> Fault | None:
    stride, length = settings.data.stride, settings.data.max_seq_len
    if stride is None or length is None or stride <= length:
        return None
    return Fault(
        written(settings, "data.stride", "data.max_seq_len"),
        f"{stride - length} tokens between two sequences would never be trained on",
        f"Leave it out, or give less than --stride {length}",
    )


def _schedule_of_endless_run(settings: RunSettings) -> Fault | None:
    run, schedule = settings.run, settings.optimizer.lr_schedule
    endless = [name for name in ("iterate", "stop_after_epoch", "stop_after_block") if settings.leaf(f"run.{name}")]
    if not endless or run.steps is not None or run.epochs is not None:
        return None
    adalora = settings.adapt.use_peft and settings.adapt.peft_method == "adalora"
    if schedule == "constant" and not adalora:
        return None
    what = "the rank schedule of adalora depends on" if adalora else f"--lr-schedule {schedule} depends on"
    return Fault(
        written(settings, f"run.{endless[0]}"),
        f"{what} the length of the run, which is not given",
        f"Give --steps or --epochs{'' if adalora else ', or --lr-schedule constant'}",
    )


def _warmup_within_run(settings: RunSettings) -> Fault | None:
    steps, warmup = settings.run.step_limit, settings.optimizer.warmup_steps
    if steps is None or warmup < steps or gives_way(settings, "optimizer.warmup_steps"):
        return None
    return Fault(
        f"--warmup-steps {warmup} with --steps {steps}{'' if settings.run.steps is not None else ' (default)'}",
        "the warm-up would last until the end of the run",
        f"Give at most --warmup-steps {steps - 1}, or more --steps",
    )


def _gpu_for_each_worker(settings: RunSettings) -> Fault | None:
    world, numbers = settings.cluster.world_size, settings.cluster.cuda_numbers
    if world is None or not numbers or len(numbers) >= world:
        return None
    return Fault(
        written(settings, "cluster.cuda_ids", "cluster.world_size"),
        f"{world} workers need {world} GPUs, and {len(numbers)} named",
        f"Name more GPUs, or give --world-size {len(numbers)}",
    )


def _zero(settings: RunSettings) -> bool:
    """Whether DeepSpeed trains the model."""
    return settings.cluster.strategy in ("zero1", "zero2", "zero3")


def _locally(settings: RunSettings) -> bool:
    """Whether the local launcher was chosen; with --parallel-independent that alone is refused."""
    return settings.cluster.launcher == "local" and not settings.cluster.parallel_independent


def _divides(settings: RunSettings) -> bool:
    """Whether workers divide the optimizer state."""
    return _zero(settings) or settings.cluster.strategy in ("sharded-optimizer", "fsdp")


RUN_RULES: dict[str, Rule] = {
    "one_training_set": refuse(
        lambda s: s.data.dataset_file is not None and s.data.dataset_id is not None,
        ("data.dataset_file", "data.dataset_id"),
        "both name the training data",
        "Give one of the two",
    ),
    "hub_config_once": _hub_config_once,
    "hub_split_once": _hub_split_once,
    "hub_id_is_one": refuse(
        lambda s: s.data.dataset_id is not None and "://" in s.data.dataset_id,
        ("data.dataset_id",),
        "this is an address, not the id of a data set",
        "Give --dataset-id ORGANISATION/NAME, or the address to --dataset-file",
    ),
    "stride_within_row": _stride_within_row,
    "vocabulary_bounds_in_order": refuse(
        lambda s: (
            s.data.auto_vocab_size
            and s.data.min_vocab_size > s.data.max_vocab_size
            and gives_way(s, "data.min_vocab_size") == gives_way(s, "data.max_vocab_size")
        ),
        ("data.min_vocab_size", "data.max_vocab_size"),
        "there is no size in between",
        "Give at most --min-vocab-size {data.max_vocab_size}, or a larger --max-vocab-size",
    ),
    "one_held_out_set": refuse(
        lambda s: s.data.val_split is not None and s.data.eval_file is not None,
        ("data.val_split", "data.eval_file"),
        "both name the evaluation data",
        "Give one of the two",
    ),
    "iterate_without_end": refuse(
        lambda s: s.run.iterate and s.run.epochs is not None,
        ("run.iterate", "run.epochs"),
        "--iterate trains until the run is stopped, --epochs ends it",
        "Give one of the two",
    ),
    "blocks_for_text": refuse(
        lambda s: s.model.task == "puzzle" and s.run.stop_after_block,
        ("run.stop_after_block", "puzzles"),
        "puzzles have no blocks, so the run would not end",
        "Give --stop-after-epoch, --steps or --epochs",
    ),
    "schedule_of_endless_run": _schedule_of_endless_run,
    "warmup_within_run": _warmup_within_run,
    "resume_one_way": refuse(
        lambda s: s.run.resume and s.run.resume_from is not None,
        ("run.resume", "run.resume_from"),
        "one resumes from the newest checkpoint, the other from the named one",
        "Give one of the two",
    ),
    "workers_need_ray": refuse(
        lambda s: _locally(s) and s.cluster.world_size not in (None, 1),
        ("cluster.launcher", "cluster.world_size"),
        "the local launcher runs one worker, in this process",
        "Give --launcher ray",
    ),
    "workers_in_order": refuse(
        lambda s: (
            s.cluster.min_workers is not None
            and s.cluster.max_workers is not None
            and s.cluster.min_workers > s.cluster.max_workers
        ),
        ("cluster.min_workers", "cluster.max_workers"),
        "there is no number of workers in between",
        "Give at most --min-workers {cluster.max_workers}",
    ),
    "fewer_workers_need_ray": refuse(
        lambda s: _locally(s) and s.cluster.min_workers not in (None, 1),
        ("cluster.launcher", "cluster.min_workers"),
        "the local launcher runs one worker, in this process",
        "Give --launcher ray",
    ),
    "more_workers_need_ray": refuse(
        lambda s: _locally(s) and s.cluster.max_workers not in (None, 1),
        ("cluster.launcher", "cluster.max_workers"),
        "the local launcher runs one worker, in this process",
        "Give --launcher ray",
    ),
    "single_stays_single": refuse(
        lambda s: s.cluster.strategy == "single" and s.cluster.max_workers not in (None, 1),
        ("cluster.strategy", "cluster.max_workers"),
        "the strategy single runs one worker",
        "Use --strategy ddp, or leave --max-workers out",
    ),
    "strategy_without_adalora": refuse(
        lambda s: _divides(s) and s.adapt.use_peft and s.adapt.peft_method == "adalora",
        ("cluster.strategy", "adapt.peft_method"),
        "AdaLoRA needs every gradient on every worker after the update",
        "Use --strategy ddp, or another --peft-method",
    ),
    "independent_trainers_in_processes": refuse(
        lambda s: s.cluster.parallel_independent and s.cluster.launcher == "local",
        ("cluster.launcher", "cluster.parallel_independent"),
        "independent trainers run in processes of their own",
        "Give --launcher subprocess or ray, or leave it out",
    ),
    "processes_for_independent_trainers": refuse(
        # That of a stored run, which is resumed with a strategy, gives way.
        lambda s: (
            s.cluster.launcher == "subprocess" and "cluster.launcher" in s.given and not s.cluster.parallel_independent
        ),
        ("cluster.launcher",),
        "it runs trainers that share no step",
        "Give --parallel-independent too, or --launcher ray",
    ),
    "independent_trainers_are_single": refuse(
        lambda s: s.cluster.parallel_independent and s.cluster.strategy not in (None, "single"),
        ("cluster.parallel_independent", "cluster.strategy"),
        "independent trainers share no gradients, so there is no strategy to choose",
        "Leave --strategy out",
    ),
    "independent_trainers_come_and_go": refuse(
        lambda s: (
            s.cluster.parallel_independent and (s.cluster.min_workers is not None or s.cluster.max_workers is not None)
        ),
        ("cluster.parallel_independent",),
        "--min-workers and --max-workers are for workers that train together",
        "Leave them out: a run can be resumed with any --world-size",
    ),
    "batch_sizes_of_independent_trainers": refuse(
        lambda s: s.cluster.trainer_batch_sizes is not None and not s.cluster.parallel_independent,
        ("cluster.trainer_batch_sizes", "cluster.parallel_independent"),
        "workers that train together have one batch size",
        "Give one number, or --parallel-independent",
    ),
    "batch_sizes_are_not_shared_out": refuse(
        lambda s: s.cluster.trainer_batch_sizes is not None and s.optimizer.effective_batch_size is not None,
        ("cluster.trainer_batch_sizes", "optimizer.effective_batch_size"),
        "trainers of unequal batch sizes have no common effective batch",
        "Leave one of them out",
    ),
    "processes_on_one_machine": refuse(
        lambda s: s.cluster.launcher == "subprocess" and s.cluster.ray_address is not None,
        ("cluster.launcher", "cluster.ray_address"),
        "processes of this machine use no cluster",
        "Give --launcher ray, or leave the address out",
    ),
    "independent_trainers_train_the_whole_model": refuse(
        lambda s: s.cluster.parallel_independent and s.run.expert_id is not None,
        ("cluster.parallel_independent", "run.expert_id"),
        "a single expert is trained by one worker",
        "Leave --parallel-independent out",
    ),
    "independent_trainers_without_adalora": refuse(
        lambda s: s.cluster.parallel_independent and s.adapt.use_peft and s.adapt.peft_method == "adalora",
        ("cluster.parallel_independent", "adapt.peft_method"),
        "each trainer would choose ranks of its own, and adapters of other ranks cannot be merged",
        "Give another --peft-method",
    ),
    "independent_trainers_without_adaptive_lr": refuse(
        lambda s: s.cluster.parallel_independent and s.optimizer.adaptive_lr_config is not None,
        ("cluster.parallel_independent", "optimizer.adaptive_lr_config"),
        "each trainer would see only its own part of the loss",
        "Leave --adaptive-lr-config out",
    ),
    "independent_trainers_keep_their_ledger": refuse(
        lambda s: s.cluster.parallel_independent and (s.run.new_ledger or s.data.force_train),
        ("cluster.parallel_independent",),
        "--new-ledger and --force-train are for workers that train together",
        "Leave them out; to train longer, resume with more --steps or --epochs",
    ),
    "fsdp_without_experts": refuse(
        lambda s: s.cluster.strategy == "fsdp" and s.model.use_moe,
        ("cluster.strategy", "model.use_moe"),
        "FSDP2 trained experts wrongly in trials",
        "Use --strategy zero3, or --no-moe",
    ),
    "fsdp_with_float32_weights": refuse(
        lambda s: s.cluster.strategy == "fsdp" and s.memory.model_dtype != "fp32",
        ("cluster.strategy", "memory.model_dtype"),
        "FSDP2 adds the gradients of several passes in the type of the weights",
        "Use --amp with --model-dtype fp32, or --strategy zero3",
    ),
    "fsdp_with_wide_state": refuse(
        lambda s: s.cluster.strategy == "fsdp" and s.optimizer.use_8bit_optimizer,
        ("cluster.strategy", "optimizer.use_8bit_optimizer"),
        "blocks of 8-bit moments would depend on the number of workers",
        "Use --strategy sharded-optimizer",
    ),
    "fsdp_keeps_state_on_the_device": refuse(
        lambda s: s.cluster.strategy == "fsdp" and s.memory.optimizer_offload,
        ("cluster.strategy", "memory.optimizer_offload"),
        "the state of divided weights is not kept in host memory",
        "Use --strategy sharded-optimizer",
    ),
    "zero_trains_the_whole_model": refuse(
        lambda s: _zero(s) and s.run.expert_id is not None,
        ("cluster.strategy", "run.expert_id"),
        "a single expert is a part of its layer's tensor, and ZeRO divides whole tensors",
        "Use --strategy ddp",
    ),
    "zero_with_wide_state": refuse(
        lambda s: _zero(s) and s.optimizer.use_8bit_optimizer,
        ("cluster.strategy", "optimizer.use_8bit_optimizer"),
        "DeepSpeed joins tensors, and 8-bit moments of joined tensors change when they are saved by name: "
        "each resume would change the next update by about 1.5 %",
        "Use --strategy sharded-optimizer",
    ),
    "zero_without_float16_weights": refuse(
        lambda s: _zero(s) and s.memory.model_dtype == "fp16",
        ("cluster.strategy", "memory.model_dtype"),
        "the loss of float16 weights would be scaled twice, by DeepSpeed and by this run",
        "Use --model-dtype bf16, or --strategy sharded-optimizer",
    ),
    "zero_with_one_type_of_weights": refuse(
        lambda s: _zero(s) and s.memory.model_dtype != "fp32" and s.adapt.use_peft,
        ("cluster.strategy", "memory.model_dtype"),
        "adapters are float32 beside 16-bit weights, and DeepSpeed joins both in one buffer of one type",
        "Use --model-dtype fp32, or --strategy sharded-optimizer",
    ),
    "zero_keeps_its_own_state": refuse(
        lambda s: _zero(s) and s.memory.optimizer_offload,
        ("cluster.strategy", "memory.optimizer_offload"),
        "ZeRO keeps the optimizer state itself",
        "Use --strategy sharded-optimizer",
    ),
    "single_has_one_worker": refuse(
        lambda s: (
            s.cluster.strategy == "single"
            and s.cluster.world_size not in (None, 1)
            and not s.cluster.parallel_independent
        ),
        ("cluster.strategy", "cluster.world_size"),
        "the strategy single runs one worker",
        "Use --strategy ddp, or --world-size 1",
    ),
    "strategy_of_workers_needs_ray": refuse(
        lambda s: _locally(s) and s.cluster.strategy not in (None, "single"),
        ("cluster.strategy", "cluster.launcher"),
        "the local launcher has one worker, and nothing to share with others",
        "Use --strategy single, or --launcher ray",
    ),
    "address_needs_ray": refuse(
        lambda s: s.cluster.launcher == "local" and s.cluster.ray_address is not None,
        ("cluster.ray_address", "cluster.launcher"),
        "the local launcher uses no cluster",
        "Give --launcher ray, or leave the address out",
    ),
    # Only numbers that the user gave: a run that is resumed on another device does without those stored.
    "gpu_numbers_for_gpus": refuse(
        lambda s: (
            "cluster.cuda_ids" in s.given
            and s.cluster.cuda_ids is not None
            and s.cluster.device not in ("auto", "cuda")
        ),
        ("cluster.cuda_ids", "cluster.device"),
        "GPU numbers apply to CUDA devices only",
        "Give --device cuda, or leave the numbers out",
    ),
    "gpu_for_each_worker": _gpu_for_each_worker,
}
