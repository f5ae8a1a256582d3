"""Checks of options against each other: combinations that cannot work, and options that change nothing.

The sections check single values; what the machine or the data can do is checked later, in `hrm_ray.launch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, TypeVar, cast

from hrm_ray.errors import Fault
from hrm_ray.settings.base import Section
from hrm_ray.settings.needs import NoEffect
from hrm_ray.settings.options import options
from hrm_ray.settings.rule import Rule
from hrm_ray.settings.rules_model import MODEL_RULES
from hrm_ray.settings.rules_run import RUN_RULES
from hrm_ray.settings.tree import RunSettings

Found = TypeVar("Found")

RULES: dict[str, Rule] = {**MODEL_RULES, **RUN_RULES}
"""All rules by name."""


def broken_rules(settings: RunSettings, faulty: Set[str] = frozenset()) -> list[Fault]:
    """A fault for every rule that the settings break, except rules that read a `faulty` leaf.

    Under --strict also one for every option without effect.
    """
    found: list[Fault] = []
    for rule in RULES.values():
        fault, reads = watch(rule, settings)
        if fault is not None and not reads & faulty:
            found.append(fault)
    return found + (as_faults(without_effect(settings, faulty)) if settings.cluster.strict else [])


def without_effect(settings: RunSettings, faulty: Set[str] = frozenset()) -> list[NoEffect]:
    """The options that the user gave and that change nothing in this run; without what depends on a `faulty` leaf."""
    found = list(settings.overridden)
    for key, option in options().items():
        for needs in option.traits.needs if key in settings.given else ():
            holds, reads = watch(needs.holds, settings)
            if not holds and not reads & faulty:
                found.append(NoEffect(option.written(settings.leaf(key)), needs.because, needs.hint))
                break
    return found


def as_faults(found: Sequence[NoEffect]) -> list[Fault]:
    """Options without effect as errors, for --strict."""
    return [Fault(each.option, f"it has no effect here: {each.reason}", each.hint) for each in found]


def as_note(found: Sequence[NoEffect]) -> str:
    """Options without effect in one line; those with the same reason stand together."""
    by_reason: dict[str, list[str]] = {}
    for each in found:
        by_reason.setdefault(each.reason, []).append(each.option)
    parts = []
    for reason, (*others, last) in by_reason.items():
        parts.append(f"{', '.join(others)} and {last} ({reason})" if others else f"{last} ({reason})")
    return "no effect here: " + ", ".join(parts)


def watch(read: Callable[[RunSettings], Found], settings: RunSettings) -> tuple[Found, set[str]]:
    """What a rule or condition gives for the settings, and the leaves that it read, by dotted key."""
    recorder = _Recorder(settings)
    return read(cast(RunSettings, recorder)), recorder.reads


class _Recorder:
    """Stands for settings, and notes which leaves are read of them."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings, self.given, self.complete = settings, settings.given, settings.complete
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
