"""Which leaves about adapters and quantised weights cannot go together.

One job: those rules.
"""

from __future__ import annotations

from hrm_ray.errors import Fault
from hrm_ray.settings.adapt import ATTENTION_PROJECTIONS, FFN_PROJECTIONS, PROJECTIONS
from hrm_ray.settings.rule import Rule, said
from hrm_ray.settings.tree import RunSettings

_LOADS = ("memory.load_in_8bit", "memory.load_in_4bit")


def _loads(settings: RunSettings) -> list[str]:
    return [key for key in _LOADS if settings.leaf(key)]


def _one_quantised_load(settings: RunSettings) -> Fault | None:
    loads = _loads(settings)
    if len(loads) < 2:
        return None
    return Fault(said(settings, *loads), "weights are held in one or the other", "Give one of the two")


def _quantised_needs_peft(settings: RunSettings) -> Fault | None:
    loads = _loads(settings)
    if not loads or settings.adapt.use_peft:
        return None
    return Fault(
        said(settings, *loads),
        "quantised weights are frozen, so that there would be little left to train",
        "Add --use-peft, or leave it out",
    )


def _targets_there_are(settings: RunSettings) -> Fault | None:
    """Names that are known, but not of layers in this model: experts are stacks, and only SwiGLU has a gate."""
    if not settings.adapt.use_peft:
        return None
    missing, there = set(), list(PROJECTIONS)
    if settings.model.use_moe:
        missing, there = set(FFN_PROJECTIONS), list(ATTENTION_PROJECTIONS)
    elif not settings.model.swiglu:
        missing, there = {"gate_proj"}, [name for name in PROJECTIONS if name != "gate_proj"]
    wrong = [name for name in settings.adapt.targets if name in missing]
    if not wrong:
        return None
    why = "with --use-moe the experts are stacks without" if settings.model.use_moe else "without SwiGLU there is no"
    hint = f"The layers are {', '.join(there)}{'; or give --no-moe' if settings.model.use_moe else ''}"
    return Fault(said(settings, "adapt.lora_target_modules"), f"{why} {', '.join(wrong)}", hint)


ADAPT_RULES: tuple[Rule, ...] = (
    Rule("one_quantised_load", _LOADS, _one_quantised_load),
    Rule("quantised_needs_peft", (*_LOADS, "adapt.use_peft"), _quantised_needs_peft),
    Rule(
        "targets_there_are",
        ("adapt.use_peft", "adapt.lora_target_modules", "model.use_moe", "model.swiglu"),
        _targets_there_are,
    ),
)
