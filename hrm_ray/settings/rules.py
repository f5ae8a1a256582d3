"""Which leaves cannot go together, as one table of pure functions.

One job: find combinations that cannot be honoured, or in which an option that the user gave would change nothing.
Single values are the sections' matter; what the machine or the data can do is asked later.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

from hrm_ray.errors import Fault
from hrm_ray.settings.idle import IDLE_LEAVES, IdleLeaves
from hrm_ray.settings.options import options
from hrm_ray.settings.tree import RunSettings


@dataclass(frozen=True)
class Rule:
    """A combination that is refused. `check` reads no leaf outside `reads`, so that a rule is skipped, and reports
    nothing untrue, when one of its leaves is itself faulty."""

    name: str
    reads: tuple[str, ...]
    check: Callable[[RunSettings], Fault | None]


def broken_rules(settings: RunSettings, faulty: Set[str] = frozenset()) -> list[Fault]:
    """A fault for every rule that the settings break; rules that read a `faulty` leaf are skipped."""
    faults = (rule.check(settings) for rule in RULES if not faulty & set(rule.reads))
    return [fault for fault in faults if fault is not None]


def said(settings: RunSettings, *keys: str) -> str:
    """Leaves with their values as a user would write them: `--num-heads 3 with --hidden-size 64`."""
    return " with ".join(options()[key].written(settings.leaf(key)) for key in keys)


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


def _warmup_within_run(settings: RunSettings) -> Fault | None:
    steps, warmup = settings.run.step_limit, settings.optimizer.warmup_steps
    if steps is None or warmup < steps:
        return None
    return Fault(
        f"--warmup-steps {warmup} with --steps {steps}{'' if settings.run.steps is not None else ' (default)'}",
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


def _one_held_out_set(settings: RunSettings) -> Fault | None:
    if settings.data.val_split is None or settings.data.eval_file is None:
        return None
    return Fault(
        said(settings, "data.val_split", "data.eval_file"),
        "both say what to evaluate on",
        "Give one of the two",
    )


def _evaluation_needs_data(settings: RunSettings) -> Fault | None:
    if settings.run.eval_every == 0 or settings.data.val_split is not None or settings.data.eval_file is not None:
        return None
    return Fault(
        said(settings, "run.eval_every"),
        "there is nothing to evaluate on",
        "Give --eval-file or --val-split",
    )


def _idle_rule(idle: IdleLeaves) -> Rule:
    """Refuses leaves that the user gave where they would change nothing."""

    def check(settings: RunSettings) -> Fault | None:
        given = [key for key in idle.leaves if key in settings.given]
        if not given or not idle.when(settings):
            return None
        return Fault(said(settings, *given), f"it would change nothing: {idle.because}", idle.mend)

    return Rule(idle.name, (*idle.leaves, *idle.reads), check)


RULES: tuple[Rule, ...] = (
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
    Rule("text_in_rollout", ("model.task", "model.supervision"), _text_in_rollout),
    Rule("text_without_exploration", ("model.task", "model.halt_exploration_prob"), _text_without_exploration),
    Rule("exploration_has_room", ("model.halt_max_steps", "model.halt_exploration_prob"), _exploration_has_room),
    Rule("columns_with_prefix", ("model.lm_mask", "data.prompt_column", "data.response_column"), _columns_with_prefix),
    Rule("puzzle_without_prefix", ("model.task", "model.lm_mask"), _puzzle_without_prefix),
    Rule("transformer_for_text", ("model.task", "model.arch"), _transformer_for_text),
    Rule("puzzle_embedding_for_puzzles", ("model.task", "model.puzzle_emb_ndim"), _puzzle_embedding_for_puzzles),
    Rule("warmup_within_run", ("run.steps", "run.epochs", "optimizer.warmup_steps"), _warmup_within_run),
    Rule("workers_need_ray", ("cluster.launcher", "cluster.world_size"), _workers_need_ray),
    Rule("workers_need_ddp", ("cluster.ddp", "cluster.world_size"), _workers_need_ddp),
    Rule("ddp_needs_ray", ("cluster.ddp", "cluster.launcher"), _ddp_needs_ray),
    Rule("address_needs_ray", ("cluster.launcher", "cluster.ray_address"), _address_needs_ray),
    Rule("gpu_numbers_for_gpus", ("cluster.cuda_ids", "cluster.device"), _gpu_numbers_for_gpus),
    Rule("gpu_for_each_worker", ("cluster.cuda_ids", "cluster.world_size"), _gpu_for_each_worker),
    Rule("resume_one_way", ("run.resume", "run.resume_from"), _resume_one_way),
    Rule("one_held_out_set", ("data.val_split", "data.eval_file"), _one_held_out_set),
    Rule("evaluation_needs_data", ("run.eval_every", "data.val_split", "data.eval_file"), _evaluation_needs_data),
    *(_idle_rule(idle) for idle in IDLE_LEAVES),
)
