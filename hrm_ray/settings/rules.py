"""Which leaves cannot go together, as one table of pure functions.

One job: find combinations that cannot be honoured, or in which an option that the user gave would change nothing.
Single values are the sections' matter; what the machine or the data can do is asked later. The rules themselves are
in `rules_model`, `rules_data`, `rules_launch`, `rules_memory`, `rules_adapt`, `rules_expert` and `idle`.
"""

from __future__ import annotations

from collections.abc import Set

from hrm_ray.errors import Fault
from hrm_ray.settings.no_effect import IDLE_LEAVES
from hrm_ray.settings.rule import NoEffectRule, Rule, said
from hrm_ray.settings.rules_adapt import ADAPT_RULES
from hrm_ray.settings.rules_data import DATA_RULES
from hrm_ray.settings.rules_expert import EXPERT_RULES
from hrm_ray.settings.rules_launch import LAUNCH_RULES
from hrm_ray.settings.rules_memory import MEMORY_RULES
from hrm_ray.settings.rules_model import MODEL_RULES
from hrm_ray.settings.tree import RunSettings


def broken_rules(settings: RunSettings, faulty: Set[str] = frozenset()) -> list[Fault]:
    """A fault for every rule that the settings break; rules that read a `faulty` leaf are skipped."""
    faults = (rule.check(settings) for rule in RULES if not faulty & set(rule.reads))
    return [fault for fault in faults if fault is not None]


def _idle_rule(idle: NoEffectRule) -> Rule:
    """Refuses leaves that the user gave where they would change nothing."""

    def check(settings: RunSettings) -> Fault | None:
        given = [key for key in idle.leaves if key in settings.given]
        if not given or not idle.when(settings):
            return None
        return Fault(said(settings, *given), f"it would change nothing: {idle.because}", idle.hint)

    return Rule(idle.name, (*idle.leaves, *idle.reads), check)


RULES: tuple[Rule, ...] = (
    *MODEL_RULES,
    *MEMORY_RULES,
    *ADAPT_RULES,
    *EXPERT_RULES,
    *DATA_RULES,
    *LAUNCH_RULES,
    *(_idle_rule(idle) for idle in IDLE_LEAVES),
)
