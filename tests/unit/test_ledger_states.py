"""The transitions of a range, one by one, and those that are not allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from hrm_ray.ledger import Lease, Range, State, states

PENDING = Range(epoch=1, chunk=7, start=0, end=100, position=3)
LEASED = states.lease(PENDING, "w", 4, 60.0)
TRAINED = states.train(LEASED, 9)
MERGED = states.merge(TRAINED)
ASIDE = replace(PENDING, state=State.QUARANTINED, failures=5, reason="why")
SKIPPED = states.merge(states.train(LEASED, 9, "not finite"))
EVERY = {one.state: one for one in (PENDING, LEASED, TRAINED, MERGED, ASIDE, SKIPPED)}

TRANSITIONS: dict[str, tuple[Callable[[Range], object], set[State]]] = {
    "lease": (lambda one: states.lease(one, "w", 4, None), {State.PENDING}),
    "renew": (lambda one: states.renew(one, 9.0), {State.LEASED}),
    "release": (states.release, {State.LEASED}),
    "lose": (lambda one: states.lose(one, "x"), {State.LEASED, State.TRAINED}),
    "split": (lambda one: states.split(one, 40), {State.LEASED}),
    "train": (lambda one: states.train(one, 1), {State.LEASED}),
    "merge": (states.merge, {State.TRAINED}),
    "reject": (lambda one: states.reject(one, "x"), {State.TRAINED}),
    "undo": (states.undo, {State.LEASED, State.TRAINED, State.MERGED, State.SKIPPED}),
    "requeue": (states.requeue, {State.QUARANTINED}),
}


@pytest.mark.parametrize("name", TRANSITIONS)
@pytest.mark.parametrize("state", State)
def test_only_the_transitions_of_the_table_are_allowed(name: str, state: State) -> None:
    transition, allowed = TRANSITIONS[name]
    if state in allowed:
        transition(EVERY[state])
    else:
        with pytest.raises(ValueError, match=state.name):
            transition(EVERY[state])


def test_a_lease_is_an_attempt_of_a_worker_and_ends_without_a_trace_of_it() -> None:
    assert (LEASED.state, LEASED.worker, LEASED.generation, LEASED.attempt, LEASED.expiry_s) == (
        *(State.LEASED, "w", 4, 1, 60.0),
    )
    assert states.lease(states.release(LEASED), "v", 1, None).attempt == 2
    for ended in (states.release(LEASED), states.lose(LEASED, "x"), states.undo(LEASED), states.undo(MERGED)):
        assert (ended.state, ended.worker, ended.generation, ended.expiry_s, ended.contribution) == (
            *(State.PENDING, None, None, None, None),
        )
        assert ended.attempt == 1
    assert (TRAINED.worker, TRAINED.contribution, MERGED.contribution) == (None, 9, 9)


def test_what_a_skipped_update_read_is_skipped_until_the_head_goes_back() -> None:
    assert (SKIPPED.contribution, SKIPPED.reason) == (9, "not finite")
    assert states.undo(SKIPPED) == states.undo(MERGED) == states.release(LEASED), "no trace of either is left"


def test_the_fence_is_worker_generation_and_attempt() -> None:
    lease = Lease("w", 4, 1, 1, 3, 0, 7, 7, 0, 100, 60.0)
    assert not states.fenced(LEASED, lease)
    for stale in (
        *(
            replace(lease, worker="v"),
            replace(lease, generation=3),
            replace(lease, attempt=2),
            replace(lease, attempt=0),
        ),
    ):
        assert states.fenced(LEASED, stale)
    assert all(states.fenced(one, lease) for one in EVERY.values() if one is not LEASED)


def test_the_sixth_attempt_is_one_too_many() -> None:
    found = PENDING
    for number in range(1, 6):
        found = states.lose(states.lease(found, "w", number, None), "the worker died")
        assert found.failures == number
        assert found.state is (State.PENDING if number < 5 else State.QUARANTINED)
    assert found.reason == "5 attempts failed; the last: the worker died"
    again = states.requeue(found)
    assert (again.state, again.failures, again.reason, again.attempt) == (State.PENDING, 0, None, 5)


def test_the_second_rejection_is_one_too_many_and_a_lost_file_is_none() -> None:
    once = states.reject(TRAINED, "the loss rose")
    assert (once.state, once.rejections) == (State.PENDING, 1)
    lost = states.lose(states.train(states.lease(once, "w", 4, None), 1), "no file")
    assert (lost.state, lost.rejections, lost.failures) == (State.PENDING, 1, 1)
    twice = states.reject(states.train(states.lease(lost, "w", 4, None), 1), "the loss rose")
    assert twice.state is State.QUARANTINED and twice.reason == "rejected 2 times; the last: the loss rose"


def test_what_is_given_back_in_order_is_no_failure() -> None:
    found = PENDING
    for _ in range(20):
        found = states.release(states.lease(found, "w", 1, None))
        found = states.undo(states.lease(found, "w", 1, None))
    assert (found.state, found.failures, found.attempt) == (State.PENDING, 0, 40)


def test_progress_clears_failures() -> None:
    weak = replace(LEASED, failures=4, rejections=1)
    first, rest = states.split(weak, 40)
    assert (first.start, first.end, first.state, first.failures) == (0, 40, State.LEASED, 4)
    assert (rest.start, rest.end, rest.state, rest.failures, rest.rejections) == (40, 100, State.PENDING, 0, 0)
    assert rest.attempt == first.attempt == 1
    merged = states.merge(replace(TRAINED, failures=4, rejections=1))
    assert (merged.failures, merged.rejections) == (0, 0)


@pytest.mark.parametrize("at", [-1, 0, 100, 101])
def test_a_split_leaves_something_on_both_sides(at: int) -> None:
    with pytest.raises(ValueError, match="split"):
        states.split(LEASED, at)


def test_what_was_not_measured_can_be_neither_split_nor_reported() -> None:
    open_ended = replace(LEASED, end=None)
    assert open_ended.sequences == 0
    with pytest.raises(ValueError, match="split"):
        states.split(open_ended, 5)
    with pytest.raises(ValueError, match="measured"):
        states.train(open_ended, 1)


def test_neighbours_join_with_the_larger_counts() -> None:
    first, second = replace(PENDING, end=40, attempt=2, failures=1), replace(PENDING, start=40, attempt=7, rejections=1)
    joined = states.join(first, second)
    assert (joined.start, joined.end, joined.attempt, joined.failures, joined.rejections) == (0, 100, 7, 1, 1)
    for stranger in (replace(second, start=41), replace(second, chunk=8), replace(second, epoch=2)):
        with pytest.raises(ValueError, match="neighbours"):
            states.join(first, stranger)
