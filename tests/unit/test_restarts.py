"""What follows on a failed attempt: the pure decisions, and the loop of attempts over a simulated worker group."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.errors import (
    DataError,
    DeviceMemoryError,
    DiskError,
    DivergedError,
    Fault,
    HostMemoryError,
    HrmRayError,
    ResourceError,
    SettingsError,
    UnreadableError,
)
from hrm_ray.launch.restarts import (
    LASTING,
    WAITS_S,
    Cause,
    Ending,
    GiveUp,
    Restart,
    RestartPolicy,
    cause_of,
    counted,
    decide,
)

FIXED = RestartPolicy(max_failures=3, min_workers=2, max_workers=2)
ERROR = HrmRayError(Fault("worker 1", "the process died", "Use --resume"))


def ending(cause: Cause, step: int = 7, batch_size: int = 4, world_size: int = 2) -> Ending:
    return Ending(cause, ERROR, step, 0, world_size, batch_size)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (DiskError, Cause.DISK),
        (DeviceMemoryError, Cause.OUT_OF_MEMORY),
        (HostMemoryError, Cause.HOST_MEMORY),
        (UnreadableError, Cause.UNREADABLE),
        (DataError, Cause.DATA),
        (DivergedError, Cause.DIVERGED),
        (SettingsError, Cause.SETTINGS),
        (ResourceError, Cause.SETTINGS),
        (HrmRayError, Cause.CRASH),
    ],
)
def test_the_kind_of_an_error_says_the_cause(kind: type[HrmRayError], cause: Cause) -> None:
    assert cause_of(kind(Fault("a", "b", ""))) is cause


@pytest.mark.parametrize("cause", [Cause.ACTOR_LOST, Cause.WORKER_LOST])
def test_the_loss_of_another_actor_at_the_same_step_is_another_failure(cause: Cause) -> None:
    """Of workers it does not matter which one was lost first."""
    other = replace(ending(cause), error=HrmRayError(Fault("worker 0", "the process died", "Use --resume")))
    again = decide(other, [ending(cause)], FIXED, 2)
    assert isinstance(again, Restart if cause is Cause.ACTOR_LOST else GiveUp)
    assert isinstance(decide(other, [ending(cause), other], FIXED, 2), GiveUp)


@pytest.mark.parametrize("cause", sorted(LASTING))
def test_what_a_restart_would_meet_again_ends_the_run(cause: Cause) -> None:
    assert decide(ending(cause), [], FIXED, 2) == GiveUp(ERROR)


def test_the_second_failure_of_a_cause_at_one_step_ends_the_run() -> None:
    first = ending(Cause.CRASH)
    assert decide(first, [], FIXED, 2) == Restart(2, 4)
    assert isinstance(decide(first, [first], FIXED, 2), GiveUp)
    assert decide(ending(Cause.CRASH, step=8), [first], FIXED, 2) == Restart(2, 4)
    assert decide(ending(Cause.NODE_LOST), [first], FIXED, 2) == Restart(2, 4)


def test_a_disk_is_waited_for_longer_each_time_and_not_for_ever() -> None:
    policy, before = RestartPolicy(10, 2, 2), list[Ending]()
    for wait_s in WAITS_S:
        assert decide(ending(Cause.DISK), before, policy, 2) == Restart(2, 4, wait_s)
        before.append(ending(Cause.DISK))
    assert isinstance(decide(ending(Cause.DISK), before, policy, 2), GiveUp)
    assert decide(ending(Cause.DISK, step=9), before, policy, 2) == Restart(2, 4, WAITS_S[0])


def test_a_disk_that_was_unmounted_is_waited_for_a_minute() -> None:
    """Reading fails first, then writing: together they wait as long as either alone."""
    before, waited_s = list[Ending](), 0.0
    for cause in (Cause.UNREADABLE, Cause.DISK, Cause.DISK):
        decision = decide(ending(cause), before, FIXED, 2)
        assert isinstance(decision, Restart)
        waited_s += decision.wait_s
        before.append(ending(cause))
    assert waited_s == sum(WAITS_S) >= 60


def test_out_of_memory_halves_the_micro_batch_until_it_has_one_row() -> None:
    policy, before, batch_size = RestartPolicy(10, 2, 2), list[Ending](), 6
    for smaller in (3, 1):
        now = ending(Cause.OUT_OF_MEMORY, batch_size=batch_size)
        assert decide(now, before, policy, 2) == Restart(2, smaller)
        before.append(now)
        batch_size = smaller
    assert isinstance(decide(ending(Cause.OUT_OF_MEMORY, batch_size=1), before, policy, 2), GiveUp)


def test_host_memory_is_waited_for_once_and_then_needs_less() -> None:
    first = ending(Cause.HOST_MEMORY)
    decision = decide(first, [], FIXED, 2)
    assert isinstance(decision, Restart) and decision.batch_size == 4 and decision.wait_s > 0
    again = decide(ending(Cause.HOST_MEMORY, step=9), [first], FIXED, 2)
    assert isinstance(again, Restart) and again.batch_size == 2
    # Also where it is the same step, with the same micro-batches: half of them is another trial.
    assert decide(first, [first], FIXED, 2) == replace(decision, batch_size=2)
    single = ending(Cause.HOST_MEMORY, batch_size=1)
    assert isinstance(decide(single, [single], FIXED, 2), GiveUp)


def test_smaller_micro_batches_do_not_count_as_failures() -> None:
    policy, before = RestartPolicy(1, 2, 2), list[Ending]()
    for step, batch_size in enumerate((16, 8, 4)):
        now = ending(Cause.OUT_OF_MEMORY, step, batch_size)
        assert decide(now, before, policy, 2) == Restart(2, batch_size // 2)
        before.append(now)
    lost = ending(Cause.WORKER_LOST, 5, 2)
    assert decide(lost, before, policy, 2) == Restart(2, 2)
    again = decide(ending(Cause.NODE_LOST, 7, 2), [*before, lost], policy, 2)
    assert isinstance(again, GiveUp) and "--max-failures 1" in again.why
    assert isinstance(decide(before[0], [], replace(policy, max_failures=0), 2), GiveUp), "0: never"


def test_too_little_room_ends_a_run_of_fixed_size() -> None:
    decision = decide(ending(Cause.NODE_LOST), [], FIXED, 1)
    assert isinstance(decision, GiveUp) and decision.error.exit_code == 4 and "--resume" in str(decision.error)


def test_room_is_waited_for_unless_fewer_workers_may_go_on() -> None:
    assert decide(ending(Cause.NO_ROOM), [], FIXED, 2) == Restart(2, 4, WAITS_S[0])
    assert decide(ending(Cause.NO_ROOM), [], RestartPolicy(3, 1, 2), 1) == Restart(1, 4)


CAUSES = st.sampled_from(list(Cause))
ENDINGS = st.builds(ending, CAUSES, st.integers(0, 5), st.sampled_from([1, 2, 3, 4]), st.integers(1, 3))


@given(ENDINGS, st.lists(ENDINGS, max_size=6), st.integers(0, 5), st.integers(0, 4))
def test_a_decision_is_always_within_the_budget(now: Ending, before: list[Ending], most: int, room: int) -> None:
    policy = RestartPolicy(most, 1, 3)
    decision = decide(now, before, policy, room)
    if isinstance(decision, Restart):
        assert most and now.cause not in LASTING
        assert counted(before) < most or decision.batch_size < now.batch_size
        assert 1 <= decision.world_size <= min(room, 3)
        assert now.batch_size % decision.batch_size == 0
        assert decision.wait_s >= 0
    else:
        assert decision.error is now.error or decision.error.exit_code == 4
