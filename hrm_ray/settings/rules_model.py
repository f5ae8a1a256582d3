"""Which model and data leaves cannot go together.

One job: the rules about the network, its mask, its supervision and its text columns.
"""

from __future__ import annotations

from collections.abc import Callable

from hrm_ray.errors import Fault
from hrm_ray.settings.rule import Rule, said
from hrm_ray.settings.tree import RunSettings


def _heads_divide(settings: RunSettings) -> Fault | None:
    model = settings.model
    if model.hidden_size % model.num_heads == 0:
        return None
    near = min((n for n in range(1, model.hidden_size + 1) if model.hidden_size % n == 0), key=_near(model.num_heads))
    return Fault(
        said(settings, "model.num_heads", "model.hidden_size"),
        "the number of heads does not divide the hidden size",
        f"Give a divisor such as --num-heads {near}",
    )


def _head_size_even(settings: RunSettings) -> Fault | None:
    model = settings.model
    if model.pos_encodings != "rope" or model.hidden_size % model.num_heads:
        return None
    if model.hidden_size // model.num_heads % 2 == 0:
        return None
    return Fault(
        said(settings, "model.num_heads", "model.hidden_size"),
        f"rotary positions need an even head size, and this one is {model.hidden_size // model.num_heads}",
        "Give fewer heads, or --pos-encodings learned",
    )


def _near(wanted: int) -> Callable[[int], int]:
    return lambda candidate: abs(candidate - wanted)


def _layers_even(settings: RunSettings) -> Fault | None:
    number = settings.model.num_layers
    if number is None or number % 2 == 0:
        return None
    return Fault(
        f"--num-layers {number}",
        "the layers are split evenly over H and L",
        f"Give --num-layers {number + 1}, or --h-layers and --l-layers",
    )


def _layers_once(settings: RunSettings) -> Fault | None:
    given = [key for key in ("model.h_layers", "model.l_layers") if key in settings.given]
    if settings.model.num_layers is None or not given:
        return None
    return Fault(
        said(settings, "model.num_layers", *given),
        "--num-layers sets the layers of H and L itself",
        "Give --num-layers, or --h-layers and --l-layers",
    )


def _width_once(settings: RunSettings) -> Fault | None:
    if settings.model.d_ff is None or "model.expansion" not in settings.given:
        return None
    return Fault(
        said(settings, "model.d_ff", "model.expansion"),
        "both set the width of the feed-forward part",
        "Give one of the two",
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


def _experts_to_choose_from(settings: RunSettings) -> Fault | None:
    model = settings.model
    if not model.use_moe or model.num_experts_per_tok <= model.num_experts:
        return None
    return Fault(
        said(settings, "model.num_experts_per_tok", "model.num_experts"),
        "a token cannot go through more experts than there are",
        f"Give at most --num-experts-per-tok {model.num_experts}",
    )


def _text_in_rollout(settings: RunSettings) -> Fault | None:
    if settings.model.task != "lm" or settings.model.supervision != "segment":
        return None
    return Fault(
        "--supervision segment with text",
        "a language model learns all segments of a batch together",
        "Give --supervision rollout, or leave it out",
    )


def _text_without_exploration(settings: RunSettings) -> Fault | None:
    if settings.model.task != "lm" or not settings.model.halt_exploration_prob:
        return None
    return Fault(
        f"--halt-exploration-prob {settings.model.halt_exploration_prob} with text",
        "the number of segments of a text is fixed in training, so there is nothing to explore",
        "Leave it out",
    )


def _exploration_has_room(settings: RunSettings) -> Fault | None:
    model = settings.model
    given = "model.halt_exploration_prob" in settings.given
    if model.halt_max_steps > 1 or not model.halt_exploration_prob or not given:
        return None
    return Fault(
        said(settings, "model.halt_exploration_prob", "model.halt_max_steps"),
        "with one segment there is no other moment to halt at",
        "Give --halt-max-steps 2 or more, or leave the exploration out",
    )


def _columns_with_prefix(settings: RunSettings) -> Fault | None:
    data = settings.data
    named = [key for key in ("data.prompt_column", "data.response_column") if settings.leaf(key) is not None]
    if settings.model.lm_mask == "prefix" and len(named) < 2:
        missing = [name for name, value in _prefix_columns(data.prompt_column, data.response_column) if value is None]
        return Fault(
            "--lm-mask prefix",
            f"it needs to know which fields are prompt and response, and lacks {' and '.join(missing)}",
            "Give --prompt-column and --response-column",
        )
    if data.prompt_column is not None and data.prompt_column == data.response_column:
        return Fault(
            said(settings, *named),
            "the prompt would show the whole response, and the model would learn to copy",
            "Name two fields",
        )
    if settings.model.lm_mask != "prefix" and named:
        return Fault(
            said(settings, *named),
            "prompt and response are told apart only under --lm-mask prefix",
            "Add --lm-mask prefix, or name the text with --text-column",
        )
    return None


def _prefix_columns(prompt: str | None, response: str | None) -> tuple[tuple[str, str | None], ...]:
    return (("--prompt-column", prompt), ("--response-column", response))


def _puzzle_without_prefix(settings: RunSettings) -> Fault | None:
    if settings.model.task != "puzzle" or settings.model.lm_mask != "prefix":
        return None
    return Fault(
        "--lm-mask prefix with puzzles",
        "a puzzle is read with full attention; the masks are for text",
        "Leave it out",
    )


def _window_for_text(settings: RunSettings) -> Fault | None:
    if settings.model.task != "puzzle" or settings.model.window_size is None:
        return None
    return Fault(
        f"{said(settings, 'model.window_size')} with puzzles",
        "every cell of a puzzle must see every other, at whatever distance",
        "Leave it out",
    )


def _transformer_for_text(settings: RunSettings) -> Fault | None:
    if settings.model.arch != "transformer" or settings.model.task != "puzzle":
        return None
    return Fault(
        "--arch transformer with puzzles",
        "it is the causal baseline for text, and a puzzle needs full attention",
        "Give --arch actv1, or text",
    )


def _puzzle_embedding_for_puzzles(settings: RunSettings) -> Fault | None:
    if settings.model.task != "lm" or settings.model.puzzle_emb_ndim == 0:
        return None
    return Fault(
        f"{said(settings, 'model.puzzle_emb_ndim')} with text",
        "text has no puzzle identifiers",
        "Leave it out",
    )


MODEL_RULES: tuple[Rule, ...] = (
    Rule("heads_divide", ("model.hidden_size", "model.num_heads"), _heads_divide),
    Rule("head_size_even", ("model.hidden_size", "model.num_heads", "model.pos_encodings"), _head_size_even),
    Rule("layers_even", ("model.num_layers",), _layers_even),
    Rule("layers_once", ("model.num_layers", "model.h_layers", "model.l_layers"), _layers_once),
    Rule("width_once", ("model.d_ff", "model.expansion"), _width_once),
    Rule(
        "gradient_within_segment",
        ("model.arch", "model.bp_steps", "model.h_cycles", "model.l_cycles"),
        _gradient_within_segment,
    ),
    Rule(
        "experts_to_choose_from",
        ("model.use_moe", "model.num_experts", "model.num_experts_per_tok"),
        _experts_to_choose_from,
    ),
    Rule("text_in_rollout", ("model.task", "model.supervision"), _text_in_rollout),
    Rule("text_without_exploration", ("model.task", "model.halt_exploration_prob"), _text_without_exploration),
    Rule("exploration_has_room", ("model.halt_max_steps", "model.halt_exploration_prob"), _exploration_has_room),
    Rule("columns_with_prefix", ("model.lm_mask", "data.prompt_column", "data.response_column"), _columns_with_prefix),
    Rule("puzzle_without_prefix", ("model.task", "model.lm_mask"), _puzzle_without_prefix),
    Rule("window_for_text", ("model.task", "model.window_size"), _window_for_text),
    Rule("transformer_for_text", ("model.task", "model.arch"), _transformer_for_text),
    Rule("puzzle_embedding_for_puzzles", ("model.task", "model.puzzle_emb_ndim"), _puzzle_embedding_for_puzzles),
)
