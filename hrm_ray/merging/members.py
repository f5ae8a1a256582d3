"""The members of a merge: their files, whether they fit the anchor, and figures of what they change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hrm_ray.errors import DataError, Fault
from hrm_ray.merging.rules import TOUCHED, Rule, rule_of
from hrm_ray.merging.tensor_file import TensorFile

_SHOWN = 2
"""Differences that a message names: names of tensors are long."""

RuleOf = Callable[[str, bool], Rule]


@dataclass(frozen=True)
class Member:
    """What is merged into an anchor: a file, and its weight in the sum of changes (all weights together: 1).

    Without `base` the file holds the changes themselves, in float32 or bfloat16; it may leave out tensors that are only
    copied. With `base` it holds whole weights, and `base` is the file of those that they were trained from, the
    anchor's or an older one's.

    Members of one `series` follow each other, as the reports of a trainer do: their changes are added up, and each has
    the weight of the whole series, which counts once.
    """

    path: Path
    weight: float
    base: Path | None = None
    series: str | None = None


@dataclass(frozen=True)
class MemberFigures:
    """The Euclidean norm of a member's change over all tensors that are averaged, and whether all of it is finite."""

    norm: float
    finite: bool


def check_member(anchor: Path, member: Member, rule: RuleOf = rule_of) -> None:
    """Raises DataError unless the member's file is whole and has the names, shapes and kinds of the anchor's tensors.
    Reads headers only."""
    with ExitStack() as stack:
        whole, file = stack.enter_context(TensorFile(anchor)), stack.enter_context(TensorFile(member.path))
        base = stack.enter_context(TensorFile(member.base)) if member.base else None
        check_fit(whole, OpenMember(file, member.weight, base), rule)


class OpenMember:
    """A member while it is merged, with the sum of squares of its change so far."""

    def __init__(self, file: TensorFile, weight: float, base: TensorFile | None, series: str | None = None) -> None:
        self.file = file
        self.weight = weight
        self.base = base
        self.series = series
        self.squares = 0.0
        self.finite = True

    def figures(self) -> MemberFigures:
        return MemberFigures(self.squares**0.5, self.finite)


def check_fit(anchor: TensorFile, member: OpenMember, rule: RuleOf) -> None:
    """Raises DataError that lists what of a member does not fit the anchor."""
    theirs, ours = member.file.tensors, anchor.tensors
    counts = {name for name in theirs if name.endswith(TOUCHED) and name.removesuffix(TOUCHED) in ours}
    wrong = [f"{name} is not in that" for name in theirs if name not in ours and name not in counts]
    for name, stored in ours.items():
        copied = rule(name, stored.is_float) in (Rule.EQUAL, Rule.KEPT)
        if name not in theirs:
            if member.base is not None or not copied:
                wrong.append(f"{name} is missing")
        elif theirs[name].shape != stored.shape:
            wrong.append(f"{name} has shape {list(theirs[name].shape)}, not {list(stored.shape)}")
        elif (not copied and not theirs[name].is_float) or (
            copied and member.base is not None and theirs[name].dtype != stored.dtype
        ):
            wrong.append(f"{name} has type {theirs[name].dtype}, not {stored.dtype}")
    for name in sorted(counts):
        rows = ours[name.removesuffix(TOUCHED)].shape[:1]
        if theirs[name].shape != rows or not theirs[name].is_float:
            wrong.append(f"{name} is not one float for each row")
    if wrong:
        shown = "; ".join(wrong[:_SHOWN]) + (f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else "")
        hint = "Merge weights of the same architecture"
        raise DataError(Fault(str(member.file.path), f"does not fit {anchor.path}: {shown}", hint))
    if member.base is not None and member.base is not anchor:
        check_fit(anchor, OpenMember(member.base, 0.0, anchor), rule)
