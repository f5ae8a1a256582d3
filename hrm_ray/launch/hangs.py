"""Decides from the workers' heartbeats whether a run hangs: what the user is warned of, and when the run is ended.

A worker makes progress with each batch, step, evaluation and checkpoint (`train.activity`), and a thread in it sends
that, with the time since, every second. All ranks work in step, so a run makes progress while any rank does, and stalls
soon after one rank does. No clock is read here, and nothing is waited for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from hrm_ray.train.activity import Activity, Phase

BEAT_INTERVAL_S = 1.0
"""Seconds between two heartbeats of a worker."""
SILENT_S = 5.0
"""A worker whose last heartbeat is older does not answer."""
WARN_S, WARN_STEPS = 30.0, 10
"""A stall is reported after so many seconds, or median step times if that is longer."""
END_S, END_STEPS = 120.0, 20
"""Without --hang-after a stalled run is ended after so many seconds, or median step times if that is longer."""
LONG_S = 60.0
"""A phase whose usual time is not known, such as the first step, is reported when it lasts so long without progress."""
UNKNOWN_S = 1800.0
"""Such a phase is a hang after so many seconds without progress, or after --hang-after if that is longer."""
DATA_S = 600.0
"""A wait for data may take so long: to start the run again would not make the data come sooner."""
MEASURED = 10
"""An evaluation, a checkpoint or a wait for data is a hang after so many times the longest one before."""
MEASURED_WARN = 3
"""It is reported after so many times the longest one before."""
LONGEST_S = 6 * 3600.0
"""No run is without progress for longer, unless --hang-after is."""
UNWATCHED_S = 10.0
"""After a longer pause of the watcher itself, what happened meanwhile is not known: a stall counts from its end."""

_STEADY: frozenset[Phase] = frozenset({"step", "records"})
_ONCE: frozenset[Phase] = frozenset({"starting", "first step", "ending"})
_SAID: dict[Phase, str] = {
    "starting": "starting",
    "first step": "in its first step (reading data, compiling)",
    "data": "waiting for data",
    "step": "in the step",
    "records": "writing records",
    "evaluation": "evaluating",
    "checkpoint": "saving a checkpoint",
    "ending": "writing the final files",
}


@dataclass(frozen=True)
class Heartbeat:
    """What a worker does; times in seconds."""

    rank: int
    node: str
    pid: int
    phase: Phase
    step: int
    marks: int
    """Increases with each progress."""
    idle_s: float
    """Since the last progress, when this was sent."""
    step_s: float | None = None
    """The median step; None before one was measured."""
    longest_s: float | None = None
    """The longest time without progress in earlier phases of this kind; None where this is the first."""
    first_step_s: float = 0.0
    """The same in the first step, which may have compiled: a later step may compile again."""
    collectives: int | None = None
    """Collectives that this rank has begun; None where that is not known."""
    age_s: float = 0.0
    """Since this was received."""

    @classmethod
    def of(cls, activity: Activity, rank: int, node: str, pid: int, collectives: int | None = None) -> Heartbeat:
        """What the worker of `activity` does now."""
        phase, longest_s = activity.phase, activity.longest_s
        return cls(
            rank,
            node,
            pid,
            phase,
            activity.step,
            activity.marks,
            activity.idle_s,
            activity.step_s,
            longest_s.get(phase),
            longest_s.get("first step", 0.0),
            collectives,
        )

    @property
    def silent(self) -> bool:
        return self.age_s > SILENT_S

    @property
    def does(self) -> str:
        return "does not answer" if self.silent else f"is {_SAID[self.phase]}"

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.node}) {self.does}"


@dataclass(frozen=True)
class Limits:
    """How long a run may be without progress before that is reported, and before the run is ended."""

    warn_s: float
    end_s: float
    known: bool
    """Whether the usual time of the present phase is known; otherwise a long one is no cause for a warning."""


def limits(heartbeats: Collection[Heartbeat], hang_after_s: float | None) -> Limits:
    """The limits that hold while ranks are in these phases: the longest of theirs.

    What a rank does that does not answer is not known, so the phases of the others count. One that has not answered for
    as long as a step may take is gone: no phase lets a worker be silent, and the limits of a step hold.
    """
    gone_s = max(beat.age_s for beat in heartbeats)
    heartbeats = [beat for beat in heartbeats if not beat.silent] or heartbeats
    step_s = max((beat.step_s for beat in heartbeats if beat.step_s is not None), default=None)
    first_step_s = max((beat.first_step_s for beat in heartbeats), default=0.0)
    end_s = hang_after_s or min(LONGEST_S, max(END_S, END_STEPS * (step_s or 0.0), 2 * first_step_s))
    warn_s = max(WARN_S, WARN_STEPS * (step_s or 0.0))
    known = True
    ends_s, warns_s = [end_s], [warn_s]
    for beat in heartbeats:
        if beat.phase in _STEADY and (step_s is not None or hang_after_s is not None):
            continue
        if beat.phase == "data":
            # An epoch fills the shuffle buffer again, as the first step did.
            ends_s.append(max(DATA_S, 2 * first_step_s))
        elif beat.phase in _STEADY | _ONCE or beat.longest_s is None:
            known = False
            ends_s.append(UNKNOWN_S)
            warns_s.append(LONG_S)
        if beat.phase not in _STEADY | _ONCE and beat.longest_s is not None:
            ends_s.append(max(DATA_S, MEASURED * beat.longest_s))
            warns_s.append(MEASURED_WARN * beat.longest_s)
    longest_s = min(max(ends_s), max(LONGEST_S, hang_after_s or 0.0))
    long_warn_s, warn_s = min(max(warns_s), longest_s / 2), min(warn_s, end_s / 2)
    if gone_s >= warn_s:
        long_warn_s, known = warn_s, True
    return Limits(long_warn_s, end_s if gone_s >= end_s else longest_s, known)


def behind(heartbeats: Collection[Heartbeat]) -> tuple[int, ...]:
    """The ranks that the others wait for: those that do not answer; else those in a lower step; else those that have
    begun fewer collectives. Empty where all are alike."""
    silent = tuple(sorted(beat.rank for beat in heartbeats if beat.silent))
    if silent:
        return silent
    for places in (
        {beat.rank: beat.step for beat in heartbeats},
        {beat.rank: beat.collectives for beat in heartbeats if beat.collectives is not None},
    ):
        if len(places) == len(heartbeats) and len(set(places.values())) > 1:
            return tuple(sorted(rank for rank, place in places.items() if place == min(places.values())))
    return tuple(beat.rank for beat in heartbeats) if len(heartbeats) == 1 else ()


Kind: TypeAlias = Literal["nothing", "long", "warning", "continues", "end"]


@dataclass(frozen=True)
class Verdict:
    """What to do about the run now, and what to tell."""

    kind: Kind = "nothing"
    message: str = ""
    culprits: tuple[int, ...] = ()
    """The ranks that the others wait for; empty where that is not known."""


@dataclass(frozen=True)
class Watched:
    """What earlier looks have seen."""

    looked_s: float | None = None
    marks: Mapping[int, int] = field(default_factory=dict)
    counts_from_s: float = float("-inf")
    """A stall counts from here at the earliest: before, nobody looked."""
    warn_s: float | None = None
    """The length of the present stall when it was last reported."""


def judge(
    before: Watched, heartbeats: Sequence[Heartbeat], now_s: float, hang_after_s: float | None, *, ends: bool = True
) -> tuple[Watched, Verdict]:
    """One look at the newest heartbeat of each rank that has begun and not finished.

    `ends` says whether the run is ended when it hangs. Each stall is reported once, and once more when the run
    continues.
    """
    marks = {beat.rank: beat.marks for beat in heartbeats}
    counts_from_s = before.counts_from_s
    if before.looked_s is None or now_s - before.looked_s > UNWATCHED_S:
        counts_from_s = now_s
    seen = replace(before, looked_s=now_s, marks=marks, counts_from_s=counts_from_s)
    if not heartbeats or marks != before.marks:
        if before.warn_s is None:
            return seen, Verdict()
        message = f"the run continues, after {before.warn_s:.0f} s without progress"
        return replace(seen, warn_s=None), Verdict("continues", message)
    idle_s = min(beat.idle_s + beat.age_s for beat in heartbeats)
    stalled_s = min(idle_s, now_s - counts_from_s)
    limit, culprits = limits(heartbeats, hang_after_s), behind(heartbeats)
    step = max(beat.step for beat in heartbeats)
    where = f"in step {step}" if step else "before the first step"
    if ends and stalled_s >= limit.end_s:
        return seen, Verdict("end", f"no progress for {stalled_s:.0f} s {where}", culprits)
    if before.warn_s is not None:
        return replace(seen, warn_s=max(before.warn_s, stalled_s)), Verdict()
    if stalled_s < limit.warn_s:
        return seen, Verdict()
    message = f"no progress for {stalled_s:.0f} s {where}: {_who(heartbeats, culprits)}"
    if limit.known and ends:
        message += f"; workers that hang are ended after {limit.end_s:.0f} s"
    return replace(seen, warn_s=stalled_s), Verdict("warning" if limit.known else "long", message, culprits)


def judge_start(begun: Collection[int], world_size: int, waited_s: float, *, reported: bool) -> Verdict:
    """One look at a group of which the ranks `begun` have begun, `waited_s` after its start.

    `reported`: whether the wait was reported before. Until all have begun they send no heartbeats: they load libraries
    and find each other.
    """
    missing = tuple(rank for rank in range(world_size) if rank not in begun)
    limit_s = LONG_S if not reported else UNKNOWN_S
    if not missing or waited_s < limit_s:
        return Verdict()
    who = "no worker" if len(missing) == world_size else f"{len(begun)} of {world_size} workers"
    message = (
        f"{who} has begun after {waited_s:.0f} s" if not begun else f"only {who} have begun after {waited_s:.0f} s"
    )
    return Verdict("end" if reported else "long", message, missing)


def _who(heartbeats: Sequence[Heartbeat], culprits: tuple[int, ...]) -> str:
    """The first of the ranks that the others wait for, with what it does, and the number of the others like it."""
    if not culprits:
        return f"{heartbeats[0]}, and no rank is behind the others"
    first = next(beat for beat in heartbeats if beat.rank == culprits[0])
    more = f", and {len(culprits) - 1} more like it" if len(culprits) > 1 else ""
    waiting = "; the others wait for it" if len(heartbeats) > len(culprits) and not first.silent else ""
    return f"{first}{more}{waiting}"


@dataclass(frozen=True)
class Timeouts:
    """All other limits of a distributed run, derived from --hang-after, so that a hang is found by its heartbeats
    first. In seconds, in the order in which they would end a run."""

    monitor_s: float
    """How long the driver waits for an answer of the RunMonitor."""
    poll_s: float
    """Ray Train's, for a worker's answer to its health check."""
    keepalive_s: float
    """gRPC's, for a process that answers no ping."""
    process_group_s: float
    """A collective of gloo or NCCL."""

    @classmethod
    def of(cls, hang_after_s: float | None) -> Timeouts:
        longest_s = max(LONGEST_S, hang_after_s or 0.0)
        return cls(max(60.0, (hang_after_s or END_S) / 2), longest_s + 600, longest_s + 1200, longest_s + 1800)
