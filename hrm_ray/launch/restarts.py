"""What follows when an attempt of a run has failed: a restart, or the end of the run. Pure decisions.

An attempt is one start of the run's workers. The next one continues from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from hrm_ray.errors import (
    DataError,
    DeviceMemoryError,
    DiskError,
    DivergedError,
    Fault,
    HostMemoryError,
    HrmRayError,
    NoRoomError,
    ResourceError,
    SettingsError,
    UnavailableError,
    UnreadableError,
)
from hrm_ray.train.plan import halved


class Cause(str, Enum):
    """Why an attempt ended."""

    WORKER_LOST = "worker lost"
    NODE_LOST = "node lost"
    HANG = "hang"
    OUT_OF_MEMORY = "out of memory"
    HOST_MEMORY = "host memory"
    DISK = "disk"
    UNREADABLE = "data unreadable"
    DATA = "data"
    SETTINGS = "settings"
    DIVERGED = "diverged"
    ACTOR_LOST = "actor lost"
    CLUSTER_LOST = "cluster lost"
    NO_ROOM = "no room"
    CRASH = "crash"


class NodeLostError(HrmRayError):
    """The machine of a process is lost."""


_CAUSES: tuple[tuple[type[HrmRayError], Cause], ...] = (
    (DiskError, Cause.DISK),
    (DeviceMemoryError, Cause.OUT_OF_MEMORY),
    (HostMemoryError, Cause.HOST_MEMORY),
    (UnreadableError, Cause.UNREADABLE),
    (NoRoomError, Cause.NO_ROOM),
    (NodeLostError, Cause.NODE_LOST),
    (DataError, Cause.DATA),
    (DivergedError, Cause.DIVERGED),
    (SettingsError, Cause.SETTINGS),
    # What was asked for is not there, as with wrong settings.
    (UnavailableError, Cause.SETTINGS),
    (ResourceError, Cause.SETTINGS),
)
LASTING = frozenset({Cause.DATA, Cause.SETTINGS, Cause.DIVERGED})
"""Causes that a restart meets again."""
WAITS_S = (10.0, 20.0, 40.0)
"""Seconds before the first, second and third restart at one step after a failure of a disk."""
WAITING = frozenset({Cause.DISK, Cause.UNREADABLE, Cause.NO_ROOM})
"""Causes that may pass by themselves."""
MEMORY_WAIT_S = 5.0
"""After a process was ended for memory: others of the machine give theirs back meanwhile."""


def cause_of(error: HrmRayError) -> Cause:
    """The cause that the kind of an error says."""
    return next((cause for kind, cause in _CAUSES if isinstance(error, kind)), Cause.CRASH)


@dataclass(frozen=True)
class Ending:
    """How an attempt failed: the cause, the error to report if the run ends with it, the last step that was trained,
    and what had trained: the number of the attempt, its workers, and the rows of a micro-batch."""

    cause: Cause
    error: HrmRayError
    step: int
    attempt: int
    world_size: int
    batch_size: int


@dataclass(frozen=True)
class RestartPolicy:
    """How often a run is restarted (restarts with smaller micro-batches are not counted; 0: never), and with how many
    workers."""

    max_failures: int
    min_workers: int
    max_workers: int


@dataclass(frozen=True)
class Restart:
    """Start again: with so many workers and rows of a micro-batch, after waiting."""

    world_size: int
    batch_size: int
    wait_s: float = 0.0


@dataclass(frozen=True)
class GiveUp:
    """End the run with this error; `why` says why there is no restart (empty: the cause says it)."""

    error: HrmRayError
    why: str = ""


def decide(ending: Ending, before: Sequence[Ending], policy: RestartPolicy, room: int) -> Restart | GiveUp:
    """What follows on `ending`; `before` are the earlier endings of the run, oldest first, and `room` is the number of
    workers that there is room for now."""
    if ending.cause in LASTING:
        return GiveUp(ending.error)
    smaller = halved(ending.batch_size) if _needs_less(ending, before) else None
    if not policy.max_failures or (smaller is None and counted(before) >= policy.max_failures):
        return GiveUp(ending.error, f"--max-failures {policy.max_failures} is reached")
    # A disk that was unmounted fails in reading first, then in writing.
    kinds = WAITING - {Cause.NO_ROOM} if ending.cause in (Cause.DISK, Cause.UNREADABLE) else {ending.cause}
    here = [earlier for earlier in before if earlier.cause in kinds and _alike(earlier, ending)]
    batch_size, wait_s = smaller or ending.batch_size, 0.0
    if ending.cause in WAITING:
        if len(here) >= len(WAITS_S):
            return GiveUp(ending.error, f"waiting did not help ({ending.cause.value} at step {ending.step})")
        wait_s = WAITS_S[len(here)]
    elif ending.cause is Cause.OUT_OF_MEMORY and smaller is None:
        return GiveUp(ending.error, "the micro-batch has one row already")
    elif here and smaller is None:
        return GiveUp(ending.error, f"this was the second failure of its kind at step {ending.step}")
    if ending.cause is Cause.HOST_MEMORY:
        wait_s = MEMORY_WAIT_S
    workers = min(room, policy.max_workers)
    if ending.cause is Cause.NO_ROOM and workers < ending.world_size:
        wait_s = 0.0  # It continues with fewer.
    if workers < policy.min_workers:
        if ending.cause is Cause.NO_ROOM:
            return GiveUp(ending.error)
        reason = f"there is room for {room} after a failure ({ending.cause.value})"
        hint = "Continue with --resume when the machines are there again"
        return GiveUp(ResourceError(Fault(f"{policy.min_workers} worker(s)", reason, hint)))
    return Restart(workers, batch_size, wait_s)


def counted(endings: Sequence[Ending]) -> int:
    """How many of a run's failures count towards `max_failures`: all but those after which its micro-batches were made
    smaller. These are few, and each brings the run nearer to a size that fits."""
    shrank = (_needs_less(each, endings[:n]) and halved(each.batch_size) is not None for n, each in enumerate(endings))
    return len(endings) - sum(shrank)


def _needs_less(ending: Ending, before: Sequence[Ending]) -> bool:
    """Whether the next attempt should have smaller micro-batches. Other programs may have used up the memory of a
    machine: the first time the run only waits."""
    if ending.cause is Cause.HOST_MEMORY:
        return any(earlier.cause is Cause.HOST_MEMORY for earlier in before)
    return ending.cause is Cause.OUT_OF_MEMORY


def _alike(earlier: Ending, ending: Ending) -> bool:
    """Whether two failures of one cause come from the same step of the same training: with other workers or
    micro-batches the step is another trial, and the loss of another actor is another failure."""
    if earlier.cause is Cause.ACTOR_LOST and earlier.error.faults[0].value != ending.error.faults[0].value:
        return False
    was, now = ((e.step, e.world_size, e.batch_size) for e in (earlier, ending))
    return was == now
