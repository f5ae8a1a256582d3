"""The decisions of parallel-independent training, as pure functions: no clock, no file, no process.

When a round closes, with which weights and which of its members, and how many weight updates lie between two reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Literal, TypeAlias

from hrm_ray.train.activity import Phase

LEASE_S = 60.0
"""A lease ends so long after it was given or renewed."""
RENEW_S = 15.0
"""Seconds between two renewals."""
STOOD_STILL_S = LEASE_S / 2
"""A coordinator that looked at nothing for so long stood still itself: no trainer is blamed for that time."""
HANG_AFTER_S = 600.0
"""A trainer is ended after so long without progress: its start, its first step (which may be compiled for minutes), its
checkpoints and reading always have this time, and without --hang-after everything has."""
WAIT_S = 0.5
"""Seconds after which a trainer without a range asks again."""
FIRST_MERGE_EVERY = 50
"""Weight updates of a trainer between two reports with which `auto` begins."""
LEAST_MERGE_EVERY, MOST_MERGE_EVERY = 8, 500
MERGE_SHARE = 0.03
"""The share of the trainers' time that merging may take under `auto`."""
MOST_UPDATES = 100
"""Weight updates in a report, at most, unless --merge-every asks for more."""
MOST_ROUNDS_BEHIND = 3
"""A report is refused whose anchor is older than so many rounds. A trainer lays a newer anchor between any two steps,
so only one whose single step takes longer than these rounds is so late."""
SPOILS_FROM = 3
"""A trainer is named as one that makes merges worse from so many rejected reports on, if they are at least a quarter of
all of its reports."""
MOST_REJECTIONS = 3
"""A trainer with so many rejected reports in a row is ended: it would use up the attempts of good data."""
NORM_LIMIT = 3.0
"""A change whose norm is so many times the median of its round is rejected."""
LOSS_TOLERANCE = 0.01
"""The share by which the held-out loss may rise in a round."""
GUARD_SAMPLES = 256
"""Held-out samples that the guard evaluates."""

MergeEvery: TypeAlias = "int | Literal['auto', 'end']"


@dataclass(frozen=True)
class Member:
    """A staged contribution: its trainer, its samples, and the seconds and weight updates that they took (0 where the
    coordinator was started since)."""

    name: str
    trainer: str
    sequences: int
    seconds: float = 0.0
    updates: int = 0
    generation: int = 0

    @property
    def series(self) -> str:
        """Reports of one series follow each other. A trainer that is started again begins a series, for it goes back to
        the anchor."""
        return f"{self.trainer}/{self.generation}"


def round_closes(
    staged: Sequence[Member],
    active: frozenset[str],
    durations: Mapping[str, float],
    since_s: float,
    now_s: float,
    *,
    at_end: bool,
    idle: bool,
) -> bool:
    """Whether the staged contributions are merged now.

    `active` are the trainers at work, `durations` the seconds of each one's last report, `since_s` when the round
    before closed. A round waits for a report of every trainer, but not past the median of their durations and three
    median deviations. `idle`: nobody can report more before this round closes. `at_end`: only then.
    """
    if not staged:
        return False
    if idle:
        return True
    if at_end:
        return False
    if active <= {member.trainer for member in staged}:
        return True
    known = [durations[trainer] for trainer in active if trainer in durations]
    known = known or [member.seconds for member in staged]
    return now_s >= since_s + _deadline_s(known)


def _deadline_s(durations: Sequence[float]) -> float:
    middle = median(durations)
    deviation = median(abs(duration - middle) for duration in durations)
    # Equal trainers have no deviation, and still do not report at the same instant.
    return middle + max(3 * deviation, 0.25 * middle)


@dataclass(frozen=True)
class Watched:
    """What earlier looks at the trainers have seen: when the last was, and each one's progress with the time since when
    it stands."""

    looked_s: float
    stands: Mapping[str, tuple[object, float]] = field(default_factory=dict)


def hung(
    before: Watched, progress: Mapping[str, tuple[object, Phase]], now_s: float, hang_after_s: float | None
) -> tuple[Watched, dict[str, float]]:
    """One look at the trainers' processes: those that hang, with the seconds for which nothing has moved.

    `progress` is what each was seen to have done, a value that changes with it, and its phase. Time in which nobody
    looked does not count.
    """
    watched = now_s - before.looked_s <= STOOD_STILL_S
    stands: dict[str, tuple[object, float]] = {}
    for name, (mark, _) in progress.items():
        old, since_s = before.stands.get(name, (None, now_s))
        stands[name] = mark, since_s if watched and mark == old else now_s
    found = {}
    for name, (_, phase) in progress.items():
        steady = phase in ("step", "records")
        limit_s = HANG_AFTER_S if hang_after_s is None else hang_after_s if steady else max(hang_after_s, HANG_AFTER_S)
        if now_s - stands[name][1] > limit_s:
            found[name] = now_s - stands[name][1]
            stands[name] = stands[name][0], now_s  # said once
    return Watched(now_s, stands), found


def round_share(reporters: Collection[str], samples_per_s: Mapping[str, float]) -> float:
    """The part of all trainers, each counted by its speed, that a round has reports of.

    The round's mean change is scaled by it, so that a report that comes late and alone moves the anchor as far as it
    would have in the round of the others: otherwise the anchor would go the same way twice. The momentum takes the
    scaled change and fades as in any round, so all that a change ever moves is the same in few rounds and in many.
    `samples_per_s` are the speeds of those at work and of those that took part in the round before (0: not known, then
    the mean of the others).
    """
    known = [speed for speed in samples_per_s.values() if speed > 0]
    usual = fmean(known) if known else 1.0
    speeds = {name: samples_per_s.get(name, 0.0) or usual for name in {*samples_per_s, *reporters}}
    if speeds.keys() == set(reporters):
        return 1.0
    return sum(speeds[name] for name in set(reporters)) / sum(speeds.values())


def merge_weights(members: Sequence[Member], by: Literal["samples", "equal"]) -> tuple[float, ...]:
    """The weight of each member's change. Those of one series follow each other, so each of them has the weight of
    all; the weights of the series add up to 1."""
    samples: dict[str, int] = {}
    for member in members:
        samples[member.series] = samples.get(member.series, 0) + member.sequences
    total = sum(samples.values())
    if by == "equal" or not total:
        return (1 / len(samples),) * len(members)
    return tuple(samples[member.series] / total for member in members)


def report_updates(
    merge_every: MergeEvery, current: int | None, merge_s: float = 0.0, update_s: float = 0.0, trainers: int = 1
) -> int:
    """Weight updates of a trainer between two reports.

    Under `auto` the smallest number with which merging, which one process does while `trainers` go on, takes at most
    MERGE_SHARE of their time, after a round that took `merge_s` with updates of `update_s`; at most twice or half as
    many as `current`.
    """
    if merge_every == "end":
        return MOST_UPDATES
    if merge_every != "auto":
        return merge_every
    if current is None or merge_s <= 0 or update_s <= 0:
        return FIRST_MERGE_EVERY if current is None else current
    wanted = math.ceil(min(merge_s / MERGE_SHARE / update_s / max(trainers, 1), MOST_MERGE_EVERY))
    near = min(max(wanted, current // 2), 2 * current)
    return min(max(near, LEAST_MERGE_EVERY), MOST_MERGE_EVERY)


def makes_worse(reports: int, rejections: int) -> bool:
    """Whether so many of a trainer's reports were rejected that it is to be named, with its device."""
    return rejections >= SPOILS_FROM and 4 * rejections >= reports


def unfit(norms: Mapping[str, float], samples: Mapping[str, int]) -> dict[str, str]:
    """Members that a round rejects for the norms of their changes, with the reason.

    A norm must be out of the ordinary both as it is and divided by the root of its samples: the change of several
    reports' updates is larger than the others, and an update of the last few samples of an epoch is as large as one of
    a whole batch.
    """
    rejected = {name: "its change is not finite" for name, norm in norms.items() if not math.isfinite(norm)}
    # A change of nothing, all of whose updates were skipped, does no harm and says nothing of the others.
    sound = {name: norm for name, norm in norms.items() if name not in rejected and norm > 0}
    if len(sound) < 3:
        return rejected  # of two nobody can say which is the odd one
    of_root = {name: norm / math.sqrt(max(1, samples[name])) for name, norm in sound.items()}
    middle, middle_of_root = median(sound.values()), median(of_root.values())
    for name, norm in sound.items():
        if norm > NORM_LIMIT * middle and of_root[name] > NORM_LIMIT * middle_of_root:
            rejected[name] = f"its change has {norm / middle:.1f} times the median norm of its round"
    return rejected


@dataclass(frozen=True)
class Choice:
    """The members that a round takes (none: it is not committed), those that it leaves out, with the reason, and the
    held-out loss."""

    taken: tuple[str, ...]
    rejected: Mapping[str, str]
    loss: float


def leave_one_out(members: Sequence[str], loss_of: Callable[[tuple[str, ...]], float], before: float) -> Choice:
    """Choose the members of a round by the held-out loss of the merge: all, unless the loss rises and does not without
    one of them.

    `loss_of` merges and evaluates; `before` is the loss of the anchor. A sole member is taken whatever its loss is: in
    plain training too the loss may rise. Without one of its members a round must be better by more than the tolerance.
    Weights without a finite loss never take the place of those with one: then the members are taken whose change alone
    has one, or none.
    """
    everyone = tuple(members)
    loss = loss_of(everyone)
    if loss <= before * (1 + LOSS_TOLERANCE):
        return Choice(everyone, {}, loss)
    ruined = math.isfinite(before) and not math.isfinite(loss)
    if len(members) > 1:
        others = {name: tuple(each for each in members if each != name) for name in members}
        losses = {name: loss_of(rest) for name, rest in others.items()}
        finite = {name: found for name, found in losses.items() if math.isfinite(found)}
        worst = min(finite, key=lambda name: finite[name], default=None)
        if worst is not None and not (math.isfinite(loss) and finite[worst] > loss * (1 - LOSS_TOLERANCE)):
            reason = f"without it the held-out loss is {finite[worst]:.4f}, with it {loss:.4f}"
            return Choice(others[worst], {worst: reason}, finite[worst])
    if not ruined:
        return Choice(everyone, {}, loss)
    sound = tuple(name for name in members if math.isfinite(loss_of((name,)))) if len(members) > 2 else ()
    rest = loss_of(sound) if sound else math.nan
    taken = sound if math.isfinite(rest) else ()
    reason = f"the held-out loss with it is not finite, and was {before:.4f}"
    return Choice(taken, {name: reason for name in members if name not in taken}, rest)
