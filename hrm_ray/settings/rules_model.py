"""Rules about the network, its objective, adapters and experts."""

from __future__ import annotations

from hrm_ray.errors import Fault
from hrm_ray.settings.adapt import FFN_PROJECTIONS, PROJECTIONS
from hrm_ray.settings.rule import Rule, refuse, written
from hrm_ray.settings.tree import RunSettings


def _heads_divide(settings: RunSettings) -> Fault | None:
    width, heads = settings.model.hidden_size, settings.model.num_heads
    if width % heads == 0:
        return None
    near = min((n for n in range(1, width + 1) if width % n == 0), key=lambda divisor: abs(divisor - heads))
    return Fault(
        written(settings, "model.num_heads", "model.hidden_size"),
        "the number of heads does not divide the hidden size",
        f"Give a divisor such as --num-heads {near}",
    )


def _head_size_even(settings: RunSettings) -> Fault | None:
    size, rest = divmod(settings.model.hidden_size, settings.model.num_heads)
    if settings.model.pos_encodings != "rope" or rest or size % 2 == 0:
        return None
    return Fault(
        written(settings, "model.num_heads", "model.hidden_size"),
        f"rotary positions need an even head size, and this one is {size}",
        "Give fewer heads, or --pos-encodings learned",
    )


def _layers_once(settings: RunSettings) -> Fault | None:
    given = [key for key in ("model.h_layers", "model.l_layers") if key in settings.given]
    if settings.model.num_layers is None or not given:
        return None
    return Fault(
        written(settings, "model.num_layers", *given),
        "--num-layers sets the layers of H and L itself",
        "Give --num-layers, or --h-layers and --l-layers",
    )


def _layers_even(settings: RunSettings) -> Fault | None:
    number = settings.model.num_layers
    if number is None or number % 2 == 0:
        return None
    return Fault(
        f"--num-layers {number}",
        "the layers are split evenly over H and L",
        f"Give --num-layers {number + 1}, or --h-layers and --l-layers",
    )


def _gradient_within_segment(settings: RunSettings) -> Fault | None:
    model = settings.model
    updates = model.h_cycles * (model.l_cycles + 1)
    if model.arch == "transformer" or model.bp_steps <= updates:
        return None
    return Fault(
        f"--bp-steps {model.bp_steps}",
        f"a segment has only {updates} updates (--h-cycles {model.h_cycles}, --l-cycles {model.l_cycles})",
        f"Give at most --bp-steps {updates}, or more cycles",
    )


def _prefix_names_columns(settings: RunSettings) -> Fault | None:
    columns = {"--prompt-column": settings.data.prompt_column, "--response-column": settings.data.response_column}
    missing = [name for name, value in columns.items() if value is None]
    if settings.model.lm_mask != "prefix" or not missing or settings.data.messages_column is not None:
        return None
    return Fault(
        "--lm-mask prefix",
        f"it needs the columns of prompt and response, and {' and '.join(missing)} is missing",
        "Give --prompt-column and --response-column, or --messages-column for chats",
    )


def _columns_or_messages(settings: RunSettings) -> Fault | None:
    others = [key for key in ("data.prompt_column", "data.response_column") if settings.leaf(key) is not None]
    others += [key for key in ("data.text_column",) if key in settings.given]
    if settings.data.messages_column is None or not others:
        return None
    return Fault(
        written(settings, "data.messages_column", *others),
        "a chat's messages hold all of its text",
        "Give --messages-column, or the other columns",
    )


def _columns_need_prefix(settings: RunSettings) -> Fault | None:
    named = [key for key in ("data.prompt_column", "data.response_column") if settings.leaf(key) is not None]
    if settings.model.lm_mask == "prefix" or not named:
        return None
    return Fault(
        written(settings, *named),
        "prompt and response are distinguished only under --lm-mask prefix",
        "Add --lm-mask prefix, or name the text with --text-column",
    )


def _quantised_needs_peft(settings: RunSettings) -> Fault | None:
    loads = [key for key in ("memory.load_in_8bit", "memory.load_in_4bit") if settings.leaf(key)]
    if not loads or settings.adapt.use_peft:
        return None
    return Fault(
        written(settings, *loads),
        "quantised weights are frozen, so there would be little left to train",
        "Add --use-peft, or leave it out",
    )


def _targets_exist(settings: RunSettings) -> Fault | None:
    """Layers that are known, but not in this model: experts are stacked tensors, and only SwiGLU has a gate."""
    if not settings.adapt.use_peft:
        return None
    missing: tuple[str, ...] = ()
    if settings.model.use_moe:
        missing, why = FFN_PROJECTIONS, "with --use-moe the experts are stacked tensors without"
    elif not settings.model.swiglu:
        missing, why = ("gate_proj",), "without SwiGLU there is no"
    wrong = [name for name in settings.adapt.targets if name in missing]
    if not wrong:
        return None
    hint = f"The layers are {', '.join(name for name in PROJECTIONS if name not in missing)}"
    if settings.model.use_moe:
        hint += "; or give --no-moe"
    return Fault(written(settings, "adapt.lora_target_modules"), f"{why} {', '.join(wrong)}", hint)


MODEL_RULES: dict[str, Rule] = {
    "heads_divide": _heads_divide,
    "head_size_even": _head_size_even,
    "layers_even": _layers_even,
    "layers_once": _layers_once,
    "width_once": refuse(
        lambda s: s.model.d_ff is not None and "model.expansion" in s.given,
        ("model.d_ff", "model.expansion"),
        "both set the width of the feed-forward layer",
        "Give one of the two",
    ),
    "gradient_within_segment": _gradient_within_segment,
    "columns_or_messages": _columns_or_messages,
    "experts_to_choose_from": refuse(
        lambda s: s.model.use_moe and s.model.num_experts_per_tok > s.model.num_experts,
        ("model.num_experts_per_tok", "model.num_experts"),
        "a token cannot be routed to more experts than there are",
        "Give at most --num-experts-per-tok {model.num_experts}",
    ),
    "text_in_rollout": refuse(
        lambda s: s.model.task == "lm" and s.model.supervision == "segment",
        ("model.supervision", "text"),
        "a language model is trained on all segments of a batch in one update",
        "Give --supervision rollout, or leave it out",
    ),
    "text_without_exploration": refuse(
        lambda s: s.model.task == "lm" and bool(s.model.halt_exploration_prob),
        ("model.halt_exploration_prob", "text"),
        "a text has a fixed number of segments in training, so there is nothing to explore",
        "Leave it out",
    ),
    "prefix_names_columns": _prefix_names_columns,
    "prefix_has_two_columns": refuse(
        lambda s: s.data.prompt_column is not None and s.data.prompt_column == s.data.response_column,
        ("data.prompt_column", "data.response_column"),
        "the prompt would contain the whole response, and the model would learn to copy",
        "Name two columns",
    ),
    "columns_need_prefix": _columns_need_prefix,
    "puzzle_without_prefix": refuse(
        lambda s: s.model.task == "puzzle" and s.model.lm_mask == "prefix",
        ("model.lm_mask", "puzzles"),
        "a puzzle is read with full attention; the masks are for text",
        "Leave it out",
    ),
    "window_for_text": refuse(
        lambda s: s.model.task == "puzzle" and s.model.window_size is not None,
        ("model.window_size", "puzzles"),
        "every cell of a puzzle must attend to every other cell",
        "Leave it out",
    ),
    "transformer_for_text": refuse(
        lambda s: s.model.task == "puzzle" and s.model.arch == "transformer",
        ("model.arch", "puzzles"),
        "it is the causal baseline for text, and a puzzle needs full attention",
        "Give --arch actv1, or text data",
    ),
    "puzzle_embedding_for_puzzles": refuse(
        lambda s: s.model.task == "lm" and s.model.puzzle_emb_ndim > 0,
        ("model.puzzle_emb_ndim", "text"),
        "text has no puzzle identifiers",
        "Leave it out",
    ),
    "chunks_for_text": refuse(
        lambda s: s.model.task == "puzzle" and s.memory.use_chunked_training,
        ("memory.use_chunked_training", "puzzles"),
        "a puzzle is read with full attention, so no part of it can be computed before the rest",
        "Leave it out",
    ),
    "chunks_without_prefix": refuse(
        lambda s: s.model.lm_mask == "prefix" and s.memory.use_chunked_training,
        ("memory.use_chunked_training", "model.lm_mask"),
        "a prompt has full attention, so its beginning cannot be computed before its end",
        "Give --lm-mask causal, or leave --use-chunked-training out",
    ),
    # Only a type that the user gave: that of an older stored run is a default.
    "activations_of_weights": refuse(
        lambda s: (
            "memory.activations" in s.given
            and s.memory.activations is not None
            and s.memory.model_dtype not in ("fp32", s.memory.activations)
        ),
        ("memory.activations", "memory.model_dtype"),
        "beside 16-bit weights the activations have the type of the weights",
        "Leave --activations out, or give --model-dtype fp32",
    ),
    "one_type_of_16_bits": refuse(
        lambda s: s.memory.activations == "bf16" and s.memory.amp is True and s.memory.amp_dtype == "fp16",
        ("memory.activations", "memory.amp_dtype"),
        "products in float16 and states in bfloat16 are added in float32, which saves nothing",
        "Give --amp-dtype bf16, or leave --activations out",
    ),
    "eight_bits_of_adamw": refuse(
        lambda s: s.optimizer.use_8bit_optimizer and s.optimizer.optimizer != "adamw",
        ("optimizer.use_8bit_optimizer", "optimizer.optimizer"),
        "bitsandbytes keeps the moments of adamw in 8 bits",
        "Give --optimizer adamw, or leave --use-8bit-optimizer out",
    ),
    "one_quantised_load": refuse(
        lambda s: s.memory.load_in_8bit and s.memory.load_in_4bit,
        ("memory.load_in_8bit", "memory.load_in_4bit"),
        "weights are stored in 8 or in 4 bits, not both",
        "Give one of the two",
    ),
    "quantised_needs_peft": _quantised_needs_peft,
    "targets_exist": _targets_exist,
    "one_expert_is_trained": refuse(
        lambda s: s.model.expert_index is not None and s.run.expert_id is None,
        ("model.expert_index",),
        "without --expert-id the whole model would be trained, not this expert",
        "Add --expert-id NAME, or leave it out",
    ),
    "expert_starts_from_a_bundle": refuse(
        lambda s: s.run.expert_id is not None and s.model.student_init is None,
        ("run.expert_id",),
        "one expert is trained inside an existing model",
        "Add --student-init BUNDLE",
    ),
    "expert_of_a_dense_model": refuse(
        lambda s: s.run.expert_id is not None and not s.model.use_moe,
        ("run.expert_id", "--no-moe"),
        "a dense model has no experts",
        "Leave one of the two out",
    ),
    "expert_exists": refuse(
        lambda s: (
            s.run.expert_id is not None
            and s.model.use_moe
            and s.model.expert_index is not None
            and s.model.expert_index >= s.model.num_experts
        ),
        ("model.expert_index", "model.num_experts"),
        "experts are counted from 0",
        "Give a smaller --expert-index than {model.num_experts}",
    ),
    "expert_without_adapters": refuse(
        lambda s: s.run.expert_id is not None and s.adapt.use_peft,
        ("run.expert_id", "adapt.use_peft"),
        "one trains an expert with all else frozen, the other adapters and heads with all experts frozen",
        "Leave one of the two out",
    ),
}
