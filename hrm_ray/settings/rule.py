"""What a rule between leaves is, and how a fault names leaves.

One job: the two things every file of rules is written with. The table of all rules is in `rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hrm_ray.errors import Fault
from hrm_ray.settings.options import options
from hrm_ray.settings.tree import RunSettings


@dataclass(frozen=True)
class Rule:
    """A combination that is refused. `check` reads no leaf outside `reads`, so that a rule is skipped, and reports
    nothing untrue, when one of its leaves is itself faulty."""

    name: str
    reads: tuple[str, ...]
    check: Callable[[RunSettings], Fault | None]


def said(settings: RunSettings, *keys: str) -> str:
    """Leaves with their values as a user would write them: `--num-heads 3 with --hidden-size 64`."""
    return " with ".join(options()[key].written(settings.leaf(key)) for key in keys)


@dataclass(frozen=True)
class NoEffectRule:
    """`leaves` that change nothing `when` the leaves in `reads` stand as they do."""

    name: str
    leaves: tuple[str, ...]
    reads: tuple[str, ...]
    when: Callable[[RunSettings], bool]
    because: str
    hint: str
