"""Where an option would change nothing: leaves that mean something only beside another.

One job: the table. `rules` refuses such a leaf when the user gave it; a default that is not used says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hrm_ray.settings.hub_name import hub_name
from hrm_ray.settings.tree import RunSettings


@dataclass(frozen=True)
class IdleLeaves:
    """`leaves` that change nothing `when` the leaves in `reads` stand as they do."""

    name: str
    leaves: tuple[str, ...]
    reads: tuple[str, ...]
    when: Callable[[RunSettings], bool]
    because: str
    mend: str


def _window_holds_the_row(settings: RunSettings) -> bool:
    window, length = settings.model.window_size, settings.data.max_seq_len
    return window is not None and length is not None and window >= length


IDLE_LEAVES: tuple[IdleLeaves, ...] = (
    IdleLeaves(
        "cycles_of_transformer",
        (
            "model.h_cycles",
            "model.l_cycles",
            "model.bp_steps",
            "model.halt_max_steps",
            "model.halt_exploration_prob",
            "model.halt_rule",
            "model.halt_margin",
        ),
        ("model.arch",),
        lambda settings: settings.model.arch == "transformer",
        "a transformer reads its input once, without cycles and halting",
        "Leave it out, or give --arch actv1",
    ),
    IdleLeaves(
        "expert_leaves_of_experts",
        (
            "model.num_experts",
            "model.num_experts_per_tok",
            "model.moe_capacity_factor",
            "model.moe_load_balance_coef",
            "model.moe_router_z_coef",
            "optimizer.auto_adjust_lr",
        ),
        ("model.use_moe",),
        lambda settings: not settings.model.use_moe,
        "there are no experts",
        "Leave it out, or give --use-moe",
    ),
    IdleLeaves(
        "expert_leaves_of_expert_training",
        ("model.expert_index", "run.experts_dir"),
        ("run.expert_id",),
        lambda settings: settings.run.expert_id is None,
        "no single expert is trained",
        "Leave it out, or give --expert-id",
    ),
    IdleLeaves(
        "puzzle_embedding_beside_one_expert",
        ("optimizer.puzzle_emb_lr", "optimizer.puzzle_emb_weight_decay"),
        ("run.expert_id",),
        lambda settings: settings.run.expert_id is not None,
        "with --expert-id the puzzle embedding is frozen",
        "Leave it out",
    ),
    IdleLeaves(
        "rope_theta_of_rope",
        ("model.rope_theta",),
        ("model.pos_encodings",),
        lambda settings: settings.model.pos_encodings != "rope",
        "positions are not rotary here",
        "Leave it out, or give --pos-encodings rope",
    ),
    IdleLeaves(
        "halt_margin_of_gain",
        ("model.halt_margin",),
        ("model.halt_rule",),
        lambda settings: settings.model.halt_rule != "gain",
        "only the rule gain has a margin",
        "Leave it out, or give --halt-rule gain",
    ),
    IdleLeaves(
        "text_leaves_of_text",
        (
            "model.lm_mask",
            "model.halt_rule",
            "model.halt_margin",
            "data.text_column",
            "data.prompt_column",
            "data.response_column",
            "data.tokenizer_path",
            "data.vocab_size",
            "data.tokenizer_train_examples",
            "data.retrain_tokenizer",
            "data.packing",
        ),
        ("model.task",),
        lambda settings: settings.model.task == "puzzle",
        "it is about text, and the data are puzzles",
        "Leave it out",
    ),
    IdleLeaves(
        "hub_config_of_hub_data",
        ("data.dataset_config",),
        ("data.dataset_file", "data.dataset_id"),
        lambda settings: settings.data.dataset_id is None and hub_name(settings.data.dataset_file or "") is None,
        "only a data set of the Hub has configurations",
        "Leave it out, or give --dataset-id",
    ),
    IdleLeaves(
        "text_column_without_prefix",
        ("data.text_column",),
        ("model.lm_mask",),
        lambda settings: settings.model.lm_mask == "prefix",
        "under --lm-mask prefix the text comes from --prompt-column and --response-column",
        "Leave it out, or give --lm-mask causal",
    ),
    IdleLeaves(
        "training_of_own_tokenizer",
        ("data.vocab_size", "data.tokenizer_train_examples", "data.retrain_tokenizer"),
        ("data.tokenizer_path",),
        lambda settings: settings.data.tokenizer_path is not None,
        "the tokenizer of --tokenizer-path is taken as it is",
        "Leave it out, or leave --tokenizer-path out",
    ),
    IdleLeaves(
        "eval_batches_need_data",
        ("data.eval_batches",),
        ("data.eval_file", "data.val_split"),
        lambda settings: settings.data.eval_file is None and settings.data.val_split is None,
        "there is nothing to evaluate on",
        "Give --eval-file or --val-split",
    ),
    IdleLeaves(
        "decay_of_wsd",
        ("optimizer.wsd_decay_ratio",),
        ("optimizer.lr_schedule",),
        lambda settings: settings.optimizer.lr_schedule != "wsd",
        "only the schedule wsd has a decay phase",
        "Leave it out, or give --lr-schedule wsd",
    ),
    IdleLeaves(
        "minimum_of_constant",
        ("optimizer.lr_min_ratio",),
        ("optimizer.lr_schedule",),
        lambda settings: settings.optimizer.lr_schedule == "constant",
        "the constant schedule never lowers the learning rate",
        "Leave it out, or give another --lr-schedule",
    ),
    IdleLeaves(
        "moments_of_sgd",
        ("optimizer.beta1", "optimizer.beta2"),
        ("optimizer.optimizer",),
        lambda settings: settings.optimizer.optimizer == "sgd",
        "sgd is plain here and keeps no moments",
        "Leave it out, or give another --optimizer",
    ),
    IdleLeaves(
        "window_within_row",
        ("model.window_size",),
        ("data.max_seq_len",),
        _window_holds_the_row,
        "a row has no more tokens than that, so each sees all before it anyway",
        "Leave it out, give a smaller --window-size, or a longer --max-seq-len",
    ),
    IdleLeaves(
        "chunks_of_a_row",
        ("memory.use_chunked_training",),
        ("memory.chunk_size", "data.max_seq_len"),
        lambda settings: (
            settings.memory.use_chunked_training
            and settings.data.max_seq_len is not None
            and settings.memory.chunk_size >= settings.data.max_seq_len
        ),
        "a row has no more tokens than a chunk",
        "Leave it out, give a smaller --chunk-size, or a longer --max-seq-len",
    ),
    IdleLeaves(
        "halting_of_several_segments",
        ("model.halt_rule", "model.halt_margin"),
        ("model.halt_max_steps", "model.task"),
        lambda settings: settings.model.task == "lm" and settings.model.halt_max_steps == 1,
        "with one segment there is no further one to halt before",
        "Leave it out, or give a larger --halt-max-steps",
    ),
    IdleLeaves(
        "chunk_leaves_of_chunked_training",
        ("memory.chunk_size", "memory.chunk_gradients", "memory.cpu_offload"),
        ("memory.use_chunked_training",),
        lambda settings: not settings.memory.use_chunked_training,
        "the sequence is not cut into chunks",
        "Give --use-chunked-training, or leave it out",
    ),
    IdleLeaves(
        "chunk_offload_needs_device_memory",
        ("memory.cpu_offload",),
        ("cluster.device",),
        lambda settings: settings.memory.cpu_offload and settings.cluster.device == "cpu",
        "on the CPU all of it is in host memory anyway",
        "Leave it out, or give another --device",
    ),
    IdleLeaves(
        "offload_needs_device_memory",
        ("memory.optimizer_offload",),
        ("cluster.device",),
        lambda settings: settings.memory.optimizer_offload and settings.cluster.device == "cpu",
        "on the CPU the optimizer's state is in host memory anyway",
        "Leave it out, or give another --device",
    ),
    IdleLeaves(
        "offload_of_moments",
        ("memory.optimizer_offload",),
        ("optimizer.optimizer",),
        lambda settings: settings.memory.optimizer_offload and settings.optimizer.optimizer == "sgd",
        "sgd is plain here and keeps no state",
        "Leave it out, or give another --optimizer",
    ),
    IdleLeaves(
        "adapter_leaves_of_peft",
        (
            "adapt.peft_method",
            "adapt.lora_r",
            "adapt.lora_alpha",
            "adapt.lora_dropout",
            "adapt.lora_target_modules",
        ),
        ("adapt.use_peft",),
        lambda settings: not settings.adapt.use_peft,
        "there are no adapters",
        "Give --use-peft, or leave it out",
    ),
    IdleLeaves(
        "ranks_of_matrices",
        ("adapt.lora_r", "adapt.lora_alpha", "adapt.lora_dropout"),
        ("adapt.use_peft", "adapt.peft_method"),
        lambda settings: settings.adapt.use_peft and settings.adapt.peft_method == "ia3",
        "ia3 learns factors, which have no rank and no dropout",
        "Leave it out, or give another --peft-method",
    ),
    IdleLeaves(
        "amp_dtype_of_amp",
        ("memory.amp_dtype",),
        ("memory.amp",),
        lambda settings: not settings.memory.amp,
        "mixed precision is off",
        "Leave it out, or give --amp",
    ),
    IdleLeaves(
        "puzzle_embedding_options",
        ("optimizer.puzzle_emb_lr", "optimizer.puzzle_emb_weight_decay"),
        ("model.puzzle_emb_ndim",),
        lambda settings: settings.model.puzzle_emb_ndim == 0,
        "there is no puzzle embedding",
        "Give --puzzle-emb-ndim, or leave it out",
    ),
)
