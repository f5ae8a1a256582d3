"""Helpers to write a rule between options. The rules are in `rules_model` and `rules_run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from hrm_ray.errors import Fault
from hrm_ray.settings.options import options
from hrm_ray.settings.tree import SECTIONS, RunSettings

Rule: TypeAlias = Callable[[RunSettings], Fault | None]
"""Gives what is wrong with a combination of options, or None. `rules` notes which leaves it reads."""


_BATCH_SIZES = "cluster.trainer_batch_sizes"


def refuse(broken: Callable[[RunSettings], bool], shows: tuple[str, ...], reason: str, hint: str) -> Rule:
    """A rule that is one condition. `reason` and `hint` may contain leaves, such as {model.num_experts}."""

    def rule(settings: RunSettings) -> Fault | None:
        if not broken(settings):
            return None
        sections = {name: getattr(settings, name) for name in SECTIONS}
        return Fault(written(settings, *shows), reason.format(**sections), hint.format(**sections))

    return rule


def gives_way(settings: RunSettings, key: str) -> bool:
    """Whether the value of a leaf is a default, which may be changed where it does not fit: that of a new run for which
    the user gave none."""
    return key not in settings.given and not settings.complete


def written(settings: RunSettings, *shown: str) -> str:
    """Leaves as a user would write them, `--num-heads 3 with --hidden-size 64`; other text stays as it is."""
    return " with ".join(_written(settings, part) for part in shown)


def _written(settings: RunSettings, part: str) -> str:
    if part not in options():
        return part
    value = settings.leaf(part)
    if part == _BATCH_SIZES and part not in settings.given:
        return options()["optimizer.batch_size"].written(value)  # it was given as --batch-size 4,2
    return options()[part].written(value)
