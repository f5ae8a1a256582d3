"""Which of several failures is reported, and how: pure decisions, no Ray cluster."""

from __future__ import annotations

import pickle
import random

import pytest
import ray.exceptions
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.errors import DataError, DiskError, DivergedError, Fault, HostMemoryError, HrmRayError, ResourceError
from hrm_ray.launch.restarts import Cause
from hrm_ray.orchestration.failures import (
    Failure,
    WorkerCrash,
    actor_lost,
    cause_of,
    death_reason,
    first_cause,
    shortage,
)

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


def test_an_unexpected_error_shows_its_traceback_once() -> None:
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


def test_the_account_of_a_death_is_one_short_line() -> None:
    account = death_reason("The actor died.\n  Worker exit type: NODE_OUT_OF_MEMORY\n Some common causes include: 1")
    assert account == "exit type NODE_OUT_OF_MEMORY"
    assert death_reason("The actor\ndied.") == "The actor died"


MONITOR = "Task was killed due to the node running low on memory. " + "PID 1 ray::IDLE 0.1GB " * 400
SHORTAGES = [
    (ray.exceptions.OutOfMemoryError(MONITOR), "memory"),
    (ray.exceptions.ObjectStoreFullError("Failed to put object: the object store is out of memory"), "object store"),
    (ray.exceptions.OutOfDiskError("Local disk is full"), "disk"),
]


@pytest.mark.parametrize(("error", "names"), SHORTAGES)
@pytest.mark.parametrize("in_a_task", [False, True])
def test_what_ray_ran_out_of_is_named_and_is_not_the_batch(error: Exception, names: str, in_a_task: bool) -> None:
    if in_a_task:
        error = ray.exceptions.RayTaskError("read", "Traceback ...", error).as_instanceof_cause()
    reported = first_cause([Failure.of(0, GLOO), Failure.of(1, error)], {}, "the logs")
    assert isinstance(reported, ResourceError) and reported.exit_code == 4
    assert names in str(reported) and "--resume" in str(reported) and len(str(reported)) < 300
    assert "--max-seq-len" not in str(reported) and "PID" not in str(reported)


def test_other_errors_are_no_shortage() -> None:
    assert shortage(RuntimeError("CUDA out of memory")) is None
    assert shortage(ray.exceptions.RayTaskError("read", "Traceback ...", ValueError("odd"))) is None


@pytest.mark.parametrize(
    "message",
    [
        "The actor died.\n Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: low on memory",
        # From Ray Train's health check, without an exit type.
        "A worker health check failed.\nWorker info: Worker(\n  actor=Actor(RayTrainWorker, 9e17),\n)\n"
        "4 worker(s) were killed due to the node running low on memory. Memory on the node was 11.45GB / 23.54GB",
    ],
)
def test_a_worker_that_the_memory_monitor_has_killed_ran_out_of_memory(message: str) -> None:
    message = death_reason(message)
    error = first_cause([Failure.of(0, GLOO)], {1: message}, "the logs")
    assert isinstance(error, HostMemoryError) and cause_of(error) is Cause.HOST_MEMORY
    assert str(error).startswith("worker 1: was killed because its machine was nearly out of memory")


def test_an_actor_that_does_not_answer_is_told_from_one_that_is_dead() -> None:
    assert "did not answer for 60 s" in str(actor_lost("the actor", "", 60.0))
    assert "was ended from outside" in str(actor_lost("the actor", ""))


def test_a_lost_machine_is_named_as_such() -> None:
    message = death_reason(
        "The actor died because its node has died. Node Id: 1f0c The actor's node was terminated unexpectedly: health "
        "check failed due to missing too many heartbeats"
    )
    error = first_cause([Failure.of(0, GLOO)], {1: message}, "the logs")
    assert isinstance(error, WorkerCrash) and error.cause is Cause.NODE_LOST
    assert str(error).startswith("worker 1: its machine is lost.") and len(str(error.faults[0])) < 300


def test_a_killed_process_is_a_lost_worker_and_a_raised_error_a_crash() -> None:
    killed = first_cause([Failure.of(0, GLOO)], {1: "exit type SYSTEM_ERROR"}, "")
    raised = first_cause([Failure.of(0, ValueError("odd"))], {}, "")
    assert isinstance(killed, WorkerCrash) and isinstance(raised, WorkerCrash)
    assert (killed.cause, raised.cause) == (Cause.WORKER_LOST, Cause.CRASH)
    assert len(str(killed.faults[0])) < 300


def test_a_dead_actor_keeps_its_name_and_cause_on_the_way_to_the_driver() -> None:
    report = pickle.loads(pickle.dumps(Failure.of(1, actor_lost("the actor that makes chunks of text", ""))))
    error = first_cause([Failure.of(0, GLOO), report], {}, "")
    assert isinstance(error, WorkerCrash) and cause_of(error) is Cause.ACTOR_LOST
    assert str(error.faults[0]).startswith("the actor that makes chunks of text: its process was ended from outside")


@pytest.mark.parametrize(
    "error", [DiskError(Fault("a", "b", "")), DataError(Fault("a", "b", "")), actor_lost("an actor", "x")]
)
def test_errors_keep_their_cause_through_pickling(error: HrmRayError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and again.faults == error.faults and cause_of(again) is cause_of(error)
