"""Conditions that options need to have an effect. A field of the settings names the conditions that it needs.

An option that the user gave where a condition does not hold is noted, and refused under --strict (`rules`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hrm_ray.settings.hub_name import hub_name

if TYPE_CHECKING:
    from hrm_ray.settings.tree import RunSettings


class NoEffect(NamedTuple):
    """An option that the user gave, as written, and why it changes nothing in this run."""

    option: str
    reason: str
    hint: str = "Leave it out"


def overridden(before: str, now: str) -> NoEffect:
    """An option that was given again with another value; both as written."""
    return NoEffect(before, f"overridden by {now}", "Give it once")


@dataclass(frozen=True)
class Needs:
    """A condition. If `holds` is false the option changes nothing; `because` and `hint` are for the message."""

    name: str
    holds: Callable[[RunSettings], bool]
    because: str
    hint: str = "Leave it out"


# Model

CYCLES = Needs(
    "cycles_of_transformer",
    lambda s: s.model.arch != "transformer",
    "a transformer reads its input once, without cycles or halting",
    "Leave it out, or give --arch actv1",
)
EXPERTS = Needs(
    "expert_leaves_of_experts",
    lambda s: s.model.use_moe,
    "the model has no experts",
    "Leave it out, or give --use-moe",
)
ONE_EXPERT = Needs(
    "expert_leaves_of_expert_training",
    lambda s: s.run.expert_id is not None,
    "no single expert is trained",
    "Leave it out, or give --expert-id",
)
ROOM_TO_EXPLORE = Needs(
    "exploration_has_room",
    lambda s: not s.model.halt_exploration_prob or s.model.halt_max_steps > 1,
    "with one segment there is no other moment to halt at",
    "Leave it out, or give a larger --halt-max-steps",
)
TRAINED_PUZZLE_EMBEDDING = Needs(
    "puzzle_embedding_beside_one_expert",
    lambda s: s.run.expert_id is None,
    "with --expert-id the puzzle embedding is frozen",
)
PUZZLE_EMBEDDING = Needs(
    "puzzle_embedding_options",
    lambda s: s.model.puzzle_emb_ndim != 0,
    "the model has no puzzle embedding",
    "Give --puzzle-emb-ndim, or leave it out",
)
ROPE = Needs(
    "rope_theta_of_rope",
    lambda s: s.model.pos_encodings == "rope",
    "the positions are not rotary",
    "Leave it out, or give --pos-encodings rope",
)
GAIN_RULE = Needs(
    "halt_margin_of_gain",
    lambda s: s.model.halt_rule == "gain",
    "only the halt rule gain has a margin",
    "Leave it out, or give --halt-rule gain",
)
SEVERAL_SEGMENTS = Needs(
    "halting_of_several_segments",
    lambda s: s.model.task != "lm" or s.model.halt_max_steps > 1,
    "with one segment there is nothing to halt early",
    "Leave it out, or give a larger --halt-max-steps",
)
CARRIED_PUZZLES = Needs(
    "exploration_of_carried_puzzles",
    lambda s: s.model.task != "puzzle" or s.model.supervision != "rollout",
    "under --supervision rollout every puzzle is trained on all its segments, so none halts",
    "Leave it out, or give --supervision segment",
)
WINDOW_WITHIN_ROW = Needs(
    "window_within_row",
    lambda s: s.model.window_size is None or s.data.max_seq_len is None or s.model.window_size < s.data.max_seq_len,
    "no row has more tokens than the window",
    "Leave it out, give a smaller --window-size, or a longer --max-seq-len",
)

# Data

TEXT = Needs("text_leaves_of_text", lambda s: s.model.task != "puzzle", "it applies to text, and the data is puzzles")
HUB_DATA = Needs(
    "hub_config_of_hub_data",
    lambda s: s.data.dataset_id is not None or hub_name(s.data.dataset_file or "") is not None,
    "only a data set of the Hub has configurations",
    "Leave it out, or give --dataset-id",
)
ONE_TEXT_COLUMN = Needs(
    "text_column_without_prefix",
    lambda s: s.model.lm_mask != "prefix",
    "under --lm-mask prefix the text comes from --prompt-column and --response-column",
    "Leave it out, or give --lm-mask causal",
)
OWN_TOKENIZER = Needs(
    "training_of_own_tokenizer",
    lambda s: s.data.tokenizer_path is None,
    "the tokenizer of --tokenizer-path is used unchanged",
    "Leave it out, or leave --tokenizer-path out",
)
FIXED_VOCABULARY = Needs(
    "size_that_the_data_decides",
    lambda s: not s.data.auto_vocab_size,
    "with --auto-vocab-size the vocabulary's size is chosen from the data",
    "Leave one of the two out; --min-vocab-size and --max-vocab-size are the bounds",
)
AUTO_VOCABULARY = Needs(
    "bounds_of_auto_vocabulary",
    lambda s: s.data.auto_vocab_size,
    "the vocabulary has the size of --vocab-size",
    "Give --auto-vocab-size, or leave it out",
)
EVALUATION = Needs(
    "eval_batches_need_data",
    lambda s: s.data.eval_file is not None or s.data.val_split is not None,
    "there is no data to evaluate on",
    "Give --eval-file or --val-split",
)
EVALUATION_OR_SAMPLE = Needs(
    "eval_every_needs_data_or_prompt",
    lambda s: EVALUATION.holds(s) or s.run.sample_prompt is not None,
    "there is no data to evaluate on",
    "Give --eval-file or --val-split",
)
SHUFFLED = Needs(
    "buffer_of_shuffled_data",
    lambda s: not s.data.linear_dataset,
    "the data is read in order",
    "Leave it out, or give --no-linear-dataset",
)
WHOLE_TEXTS = Needs(
    "stride_of_documents",
    lambda s: s.model.lm_mask != "prefix",
    "pairs of prompt and response are never divided",
    "Leave it out, or give --lm-mask causal",
)
CHUNK_WITHIN_BLOCK = Needs(
    "chunk_within_block",
    lambda s: s.data.dataset_chunk_size <= s.data.samples_per_block,
    "a block has fewer samples, so it is one chunk",
    "Leave it out, or give a larger --samples-per-block",
)
OVERLAP = Needs(
    "stride_within_row_only",
    lambda s: s.data.stride is None or s.data.stride != s.data.max_seq_len,
    "sequences that begin --max-seq-len tokens apart do not overlap anyway",
    "Leave it out, or give a smaller --stride",
)

# Optimizer

WSD = Needs(
    "decay_of_wsd",
    lambda s: s.optimizer.lr_schedule == "wsd",
    "only the schedule wsd has a decay phase",
    "Leave it out, or give --lr-schedule wsd",
)
FALLING_LR = Needs(
    "minimum_of_constant",
    lambda s: s.optimizer.lr_schedule != "constant",
    "the constant schedule never lowers the learning rate",
    "Leave it out, or give another --lr-schedule",
)
MOMENTS = Needs(
    "moments_of_sgd",
    lambda s: s.optimizer.optimizer != "sgd",
    "sgd has no momentum here and keeps no state",
    "Leave it out, or give another --optimizer",
)
MOMENTS_TO_OFFLOAD = Needs(
    "offload_of_moments",
    lambda s: not s.memory.optimizer_offload or s.optimizer.optimizer != "sgd",
    "sgd has no momentum here and keeps no state",
    "Leave it out, or give another --optimizer",
)

# Memory and adapters

FLOAT32_WEIGHTS = Needs(
    "activations_of_float32_weights",
    lambda s: s.memory.model_dtype == "fp32",
    "with --model-dtype the activations have the type of the weights",
)
AMP = Needs(
    "amp_dtype_of_amp", lambda s: s.memory.amp is not False, "mixed precision is off", "Leave it out, or give --amp"
)
CHUNKS = Needs(
    "chunk_leaves_of_chunked_training",
    lambda s: s.memory.use_chunked_training,
    "the sequence is not cut into chunks",
    "Give --use-chunked-training, or leave it out",
)
SEVERAL_CHUNKS = Needs(
    "chunks_of_a_row",
    lambda s: (
        not s.memory.use_chunked_training or s.data.max_seq_len is None or s.memory.chunk_size < s.data.max_seq_len
    ),
    "a row has no more tokens than a chunk",
    "Leave it out, give a smaller --chunk-size, or a longer --max-seq-len",
)
ADAPTERS = Needs(
    "adapter_leaves_of_peft",
    lambda s: s.adapt.use_peft,
    "the model has no adapters",
    "Give --use-peft, or leave it out",
)
MATRIX_ADAPTERS = Needs(
    "ranks_of_matrices",
    lambda s: not s.adapt.use_peft or s.adapt.peft_method != "ia3",
    "ia3 learns factors, which have no rank and no dropout",
    "Leave it out, or give another --peft-method",
)

# Run

TRAINED_BEFORE = Needs(
    "training_again_needs_a_run",
    lambda s: not s.data.force_train or ((s.run.resume or s.run.resume_from is not None) and s.run.epochs is not None),
    "only a resumed run with --epochs has an epoch to add",
    "Leave it out, or give --resume and --epochs",
)
RESUMED = Needs(
    "new_ledger_of_resume",
    lambda s: s.run.resume or s.run.resume_from is not None,
    "a new run has a new ledger anyway",
)
NO_STEPS = Needs(
    "iterate_with_steps",
    lambda s: not s.run.iterate or s.run.steps is None,
    "with --steps a run begins as many epochs as it needs anyway",
    "Leave one of the two out",
)

# Workers

MERGED = Needs(
    "merges_of_independent_trainers",
    lambda s: s.cluster.parallel_independent,
    "only independent trainers are merged",
    "Give --parallel-independent, or leave it out",
)
OUTER_STEP = Needs(
    "rate_of_an_outer_step",
    lambda s: not s.cluster.parallel_independent or s.cluster.outer_optimizer != "none",
    "under --outer-optimizer none the changes are added as they are",
    "Leave it out, or give another --outer-optimizer",
)
