"""Which leaves about the training of one expert cannot go together.

One job: those rules.
"""

from __future__ import annotations

from hrm_ray.errors import Fault
from hrm_ray.settings.rule import Rule, said
from hrm_ray.settings.tree import RunSettings


def _expert_is_named(settings: RunSettings) -> Fault | None:
    if settings.run.expert_id is None or settings.model.expert_index is not None:
        return None
    return Fault(
        said(settings, "run.expert_id"),
        "it does not say which expert of every block is trained",
        "Add --expert-index, counted from 0",
    )


def _expert_starts_from_a_bundle(settings: RunSettings) -> Fault | None:
    if settings.run.expert_id is None or settings.model.student_init is not None:
        return None
    return Fault(
        said(settings, "run.expert_id"),
        "one expert is trained inside a model that is there already",
        "Add --student-init BUNDLE",
    )


def _expert_is_there(settings: RunSettings) -> Fault | None:
    model = settings.model
    if settings.run.expert_id is None:
        return None
    if not model.use_moe:
        return Fault(
            f"{said(settings, 'run.expert_id')} with --no-moe",
            "a dense model has no experts",
            "Leave one of the two out",
        )
    if model.expert_index is None or model.expert_index < model.num_experts:
        return None
    return Fault(
        said(settings, "model.expert_index", "model.num_experts"),
        "experts are counted from 0",
        f"Give at most --expert-index {model.num_experts - 1}",
    )


def _expert_without_adapters(settings: RunSettings) -> Fault | None:
    if settings.run.expert_id is None or not settings.adapt.use_peft:
        return None
    return Fault(
        said(settings, "run.expert_id", "adapt.use_peft"),
        "one trains an expert with all else frozen, the other adapters and heads with all experts frozen",
        "Leave one of the two out",
    )


EXPERT_RULES: tuple[Rule, ...] = (
    Rule("expert_is_named", ("run.expert_id", "model.expert_index"), _expert_is_named),
    Rule("expert_starts_from_a_bundle", ("run.expert_id", "model.student_init"), _expert_starts_from_a_bundle),
    Rule(
        "expert_is_there",
        ("run.expert_id", "model.use_moe", "model.expert_index", "model.num_experts"),
        _expert_is_there,
    ),
    Rule("expert_without_adapters", ("run.expert_id", "adapt.use_peft"), _expert_without_adapters),
)
