"""Which of several failures is told, and how: pure decisions, no Ray."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.errors import DataError, DivergedError, Fault
from hrm_ray.orchestration.failures import Failure, StoppedBeforeStart, WorkerCrash, death_in_words, first_cause
from hrm_ray.types import StopReason

GLOO = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2"
)


def test_an_expected_error_comes_back_as_the_same_kind_with_the_same_faults() -> None:
    faults = (Fault("a", "b", "c"), Fault("d", "e", "f"))
    error = first_cause([Failure.of(1, DivergedError(faults))], {}, "")
    assert type(error) is DivergedError
    assert error.faults == faults
    assert error.exit_code == 6


def test_a_death_without_a_word_goes_before_the_broken_collectives_it_caused() -> None:
    error = first_cause([Failure.of(0, GLOO)], {1: "exit type SYSTEM_ERROR"}, "the logs")
    assert isinstance(error, WorkerCrash)
    assert error.faults[0].value == "worker 1"
    for part in ("exit type SYSTEM_ERROR", "--resume", "checkpoint", "the logs"):
        assert part in str(error)
    assert "gloo" not in str(error)


def test_a_rank_that_reported_is_not_counted_as_lost() -> None:
    error = first_cause([Failure.of(0, GLOO)], {0: "killed by Ray"}, "")
    assert isinstance(error, WorkerCrash)
    assert "Connection closed by peer" in str(error)


def test_an_unforeseen_error_shows_its_traceback_once() -> None:
    try:
        raise ValueError("odd\nsecond line")
    except ValueError as caught:
        error = first_cause([Failure.of(3, caught)], {}, "the logs")
    text = str(error)
    assert text.count("Traceback") == 1
    assert "worker 3: ended with ValueError: odd." in text


@given(st.randoms(use_true_random=False))
def test_a_reason_of_ones_own_wins_whatever_the_order(order: random.Random) -> None:
    data = Failure.of(2, DataError(Fault("words.txt", "is cut short", "Copy it again")))
    reports = [data, *(Failure.of(rank, GLOO) for rank in (0, 1, 3))]
    order.shuffle(reports)
    assert isinstance(first_cause(reports, {1: "killed", 4: "died"}, ""), DataError)


def test_nothing_failed() -> None:
    assert first_cause([], {}, "") is None


def test_the_stop_before_the_start_ends_as_its_reason_does() -> None:
    assert StoppedBeforeStart(StopReason.SIGTERM).exit_code == 75


def test_the_account_of_a_death_is_one_short_line() -> None:
    account = death_in_words("The actor died.\n  Worker exit type: NODE_OUT_OF_MEMORY\n Some common causes include: 1")
    assert account == "exit type NODE_OUT_OF_MEMORY"
    assert death_in_words("The actor\ndied.") == "The actor died"
