"""Checks of options against each other: combinations that cannot work, and options that would change nothing.

The sections check single values; what the machine or the data can do is checked later, in `hrm_ray.launch`.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, cast

from hrm_ray.errors import Fault
from hrm_ray.settings.base import Section
from hrm_ray.settings.needs import Needs
from hrm_ray.settings.options import options
from hrm_ray.settings.rule import Rule, written
from hrm_ray.settings.rules_model import MODEL_RULES
from hrm_ray.settings.rules_run import RUN_RULES
from hrm_ray.settings.tree import RunSettings


def broken_rules(settings: RunSettings, faulty: Set[str] = frozenset()) -> list[Fault]:
    """A fault for every rule that the settings break, except rules that read a `faulty` leaf."""
    found: list[Fault] = []
    for rule in RULES.values():
        fault, reads = check(rule, settings)
        if fault is not None and not reads & faulty:
            found.append(fault)
    return found


def check(rule: Rule, settings: RunSettings) -> tuple[Fault | None, set[str]]:
    """The fault that a rule finds, if any, and the leaves that it read, by dotted key."""
    recorder = _Recorder(settings)
    return rule(cast(RunSettings, recorder)), recorder.reads


class _Recorder:
    """Stands for settings, and notes which leaves are read of them."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings, self.given = settings, settings.given
        self.reads: set[str] = set()

    def __getattr__(self, section: str) -> _SectionRecorder:
        return _SectionRecorder(section, getattr(self.settings, section), self.reads)

    def leaf(self, dotted: str) -> Any:
        self.reads.add(dotted)
        return self.settings.leaf(dotted)


class _SectionRecorder:
    def __init__(self, name: str, section: Section, reads: set[str]) -> None:
        self._name, self._section, self._reads = name, section, reads

    def __getattr__(self, leaf: str) -> Any:
        if leaf in type(self._section).model_fields:
            self._reads.add(f"{self._name}.{leaf}")
            return getattr(self._section, leaf)
        # A property, such as `step_limit`: computed on this recorder, so that the leaves it reads are noted.
        return getattr(type(self._section), leaf).fget(self)


def _no_effect(needs: Needs) -> Rule:
    """Refuses the options that need this condition, where the user gave them and it does not hold."""
    leaves = [key for key, option in options().items() if needs in option.traits.needs]

    def rule(settings: RunSettings) -> Fault | None:
        given = [key for key in leaves if key in settings.given]
        if not given or needs.holds(settings):
            return None
        return Fault(written(settings, *given), f"it would change nothing: {needs.because}", needs.hint)

    return rule


NO_EFFECT: dict[str, Rule] = {
    needs.name: _no_effect(needs) for option in options().values() for needs in option.traits.needs
}
RULES: dict[str, Rule] = {**MODEL_RULES, **RUN_RULES, **NO_EFFECT}
"""All rules by name."""
