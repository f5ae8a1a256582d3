"""Where an option would change nothing: leaves that mean something only beside another.

One job: the table. `rules` refuses such a leaf when the user gave it; a default that is not used says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        "puzzle_embedding_options",
        ("optimizer.puzzle_emb_lr", "optimizer.puzzle_emb_weight_decay"),
        ("model.puzzle_emb_ndim",),
        lambda settings: settings.model.puzzle_emb_ndim == 0,
        "there is no puzzle embedding",
        "Give --puzzle-emb-ndim, or leave it out",
    ),
)
