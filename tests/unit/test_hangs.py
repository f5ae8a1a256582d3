"""What is decided about a run that makes no progress: heartbeats and clocks are scripted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as some

from hrm_ray.launch.hangs import (
    BEAT_INTERVAL_S,
    DATA_S,
    LONG_S,
    SILENT_S,
    UNKNOWN_S,
    Heartbeat,
    Timeouts,
    Verdict,
    Watched,
    behind,
    judge,
    limits,
)
from hrm_ray.train.activity import Activity, Phase
from hrm_ray.train.world import collectives_begun


class Worker:
    """A worker with an Activity on a scripted clock; it sends a heartbeat every second unless it is stopped."""

    def __init__(self, group: Group, rank: int) -> None:
        self.group, self.rank = group, rank
        self.activity = Activity(lambda: group.now_s)
        self.collectives = 0
        self.stopped = False
        self.sent: tuple[float, Heartbeat] | None = None

    def beat(self) -> Heartbeat:
        now_s = self.group.now_s
        if not self.stopped and (self.sent is None or now_s - self.sent[0] >= BEAT_INTERVAL_S):
            self.sent = now_s, Heartbeat.of(self.activity, self.rank, "n", self.rank, self.collectives)
        assert self.sent is not None
        return replace(self.sent[1], age_s=now_s - self.sent[0])


class Group:
    """Workers that train in step, and the driver that looks at them twice a second."""

    def __init__(self, size: int, hang_after_s: float | None = None) -> None:
        self.now_s = 0.0
        self.hang_after_s = hang_after_s
        self.workers = [Worker(self, rank) for rank in range(size)]
        self.watched = Watched()
        self.told: list[tuple[float, Verdict]] = []

    def wait(self, duration_s: float, every_s: float = 0.5) -> None:
        end_s = self.now_s + duration_s
        while self.now_s < end_s:
            self.now_s = min(end_s, self.now_s + every_s)
            beats = [worker.beat() for worker in self.workers]
            self.watched, verdict = judge(self.watched, beats, self.now_s, self.hang_after_s)
            if verdict.kind != "nothing":
                self.told.append((self.now_s, verdict))

    def together(self, phase: Phase, duration_s: float) -> None:
        """All ranks spend this time in one phase."""
        contexts = [worker.activity.doing(phase, then="records") for worker in self.workers]
        for worker, context in zip(self.workers, contexts, strict=True):
            worker.activity.step += phase in ("step", "first step")
            context.__enter__()
        self.wait(duration_s)
        for context in contexts:
            context.__exit__(None, None, None)

    def kinds(self) -> list[str]:
        return [verdict.kind for _, verdict in self.told]


def trained(size: int = 2, steps: int = 3, step_s: float = 1.0, hang_after_s: float | None = None) -> Group:
    group = Group(size, hang_after_s)
    group.together("first step", 5.0)
    for _ in range(steps):
        group.together("step", step_s)
    return group


def test_a_stopped_rank_is_told_after_30_s_and_ends_the_run_after_120_s() -> None:
    group = trained()
    stopped_s = group.now_s
    group.workers[1].stopped = True
    group.wait(121.5)
    assert group.kinds()[:2] == ["warning", "end"]
    (warned_s, warning), (ended_s, end) = group.told[:2]
    assert 30 <= warned_s - stopped_s < 32 and 120 <= ended_s - stopped_s < 122
    assert warning.culprits == end.culprits == (1,)
    assert "step 4" in warning.message and "rank 1 (pid 1 on n) does not answer" in warning.message
    assert "ended after 120 s" in warning.message and len(warning.message) < 200


def test_a_stall_is_told_once_and_that_the_run_goes_on_once() -> None:
    group = trained()
    group.wait(2)
    group.workers[0].stopped = True
    group.wait(60)
    group.workers[0].stopped = False
    group.wait(5)
    assert group.kinds() == ["warning"]  # it answers again, but makes no progress yet
    group.together("step", 1.0)
    group.together("step", 1.0)
    assert group.kinds() == ["warning", "continues"]
    assert "after 6" in group.told[-1][1].message


def test_the_rank_that_has_not_entered_the_collective_is_named_not_those_that_wait_in_it() -> None:
    group = trained(4)
    for worker in group.workers:
        worker.activity.enter("step")
        worker.collectives = 7 + (worker.rank != 2)
    group.wait(40)
    assert [verdict.culprits for _, verdict in group.told] == [(2,)]
    assert "rank 2 (pid 2 on n) is in the step; the others wait for it" in group.told[0][1].message


def test_a_rank_in_a_lower_step_is_behind_whatever_collectives_say() -> None:
    beats = [Heartbeat(rank, "n", 1, "step", 7 - (rank == 1), 0, 50.0, collectives=9 - rank) for rank in range(3)]
    assert behind(beats) == (1,)
    assert behind([replace(beat, step=7, collectives=9) for beat in beats]) == ()
    assert behind([replace(beat, step=7, collectives=None) for beat in beats]) == ()
    assert behind([replace(beats[0], age_s=SILENT_S + 1), *beats[1:]]) == (0,)
    assert behind(beats[:1]) == (0,)


@pytest.mark.parametrize("phase", ["starting", "first step", "evaluation", "checkpoint"])
def test_what_was_never_measured_is_told_after_a_minute_and_never_as_a_warning(phase: Phase) -> None:
    group = Group(2)
    group.together(phase, 900.0)
    assert group.kinds() == ["long"]
    assert LONG_S <= group.told[0][0] < LONG_S + 2
    group.together(phase, 1.0)
    group.wait(UNKNOWN_S + 5)
    assert "end" in group.kinds()


def test_an_evaluation_and_a_checkpoint_may_take_ten_times_what_they_took_before() -> None:
    group = trained()
    phases: tuple[Phase, ...] = ("evaluation", "checkpoint")
    for phase in phases:
        group.together(phase, 50.0)
        group.together(phase, 140.0)
    assert group.kinds() == []
    group.together("evaluation", 10 * 140.0 - 5)
    assert group.kinds() == ["warning"]
    group.together("checkpoint", 10 * 140.0 + 5)
    assert group.kinds()[:4] == ["warning", "continues", "warning", "end"]


def test_a_first_step_that_compiles_lets_a_later_one_compile_again() -> None:
    group = Group(1)
    group.together("first step", 300.0)
    group.together("step", 1.0)
    group.together("step", 500.0)
    assert "end" not in group.kinds()


def test_data_may_come_late() -> None:
    group = trained(hang_after_s=20.0)
    group.together("data", DATA_S - 5)
    assert group.kinds() == ["warning", "continues"] or group.kinds() == ["warning"]


@pytest.mark.parametrize("phase", ["first step", "evaluation", "checkpoint", "data"])
def test_a_stopped_rank_is_told_and_ended_as_in_a_step_whatever_the_others_do(phase: Phase) -> None:
    group = trained()
    for worker in group.workers:
        worker.activity.enter(phase)
    group.wait(2)
    stopped_s = group.now_s
    group.workers[1].stopped = True
    group.wait(123)
    (warned_s, warning), (ended_s, end) = group.told[:2]
    assert (warning.kind, end.kind, end.culprits) == ("warning", "end", (1,))
    assert warned_s - stopped_s < 32 and 119 <= ended_s - stopped_s < 122


def test_hang_after_is_what_the_user_says_and_the_warning_comes_before() -> None:
    group = trained(hang_after_s=10.0)
    stopped_s = group.now_s
    group.workers[1].stopped = True
    group.wait(11.5)
    assert [(round(at_s - stopped_s), verdict.kind) for at_s, verdict in group.told[:2]] == [
        (5, "warning"),
        (10, "end"),
    ]


def test_where_the_driver_itself_did_not_look_a_stall_counts_from_then() -> None:
    """A closed laptop, or Ctrl-Z: the first heartbeats that it sees are old."""
    group = trained()
    group.now_s += 3600
    group.wait(25)
    assert group.kinds() == []
    for worker in group.workers:
        worker.stopped = True
    group.wait(125)
    assert group.kinds()[:2] == ["warning", "end"]


def test_a_local_run_is_told_of_and_never_ended() -> None:
    beat = Heartbeat(0, "here", 1, "step", 3, 9, 0.0, step_s=1.0)
    watched, kinds = Watched(), []
    for second in range(5000):
        watched, verdict = judge(watched, [replace(beat, idle_s=float(second))], float(second), None, ends=False)
        kinds += [verdict.kind] * (verdict.kind != "nothing")
    assert kinds == ["warning"]


@settings(max_examples=40)
@given(
    some.integers(1, 4),
    some.lists(
        some.tuples(
            some.sampled_from(["step", "evaluation", "checkpoint", "data"]), some.floats(0.2, 29.0), some.integers(0, 3)
        ),
        max_size=12,
    ),
)
def test_no_rank_that_is_slow_for_less_than_half_a_minute_is_told_or_ended(
    size: int, phases: list[tuple[Phase, float, int]]
) -> None:
    group = trained(size, steps=1)
    for phase, duration_s, stopped in phases:
        group.workers[stopped % size].stopped = True
        group.together(phase, duration_s / 2)
        group.workers[stopped % size].stopped = False
        group.together(phase, duration_s / 2)
    assert group.kinds() == []


@settings(max_examples=20)
@given(some.floats(0.01, 500.0), some.floats(1.0, 3.0))
def test_steps_of_any_length_and_steps_three_times_slower_are_no_stall(step_s: float, slower: float) -> None:
    group = Group(2)
    group.together("first step", step_s)
    group.together("step", step_s)
    group.together("step", step_s)
    group.together("step", step_s * slower)
    assert set(group.kinds()) <= {"long", "continues"}


@given(
    some.lists(
        some.builds(
            Heartbeat,
            rank=some.integers(0, 5),
            node=some.just("n"),
            pid=some.just(1),
            phase=some.sampled_from(["starting", "first step", "data", "step", "records", "evaluation", "ending"]),
            step=some.integers(0, 9),
            marks=some.integers(0, 9),
            idle_s=some.floats(0, 1e5),
            step_s=some.none() | some.floats(0, 1e4),
            longest_s=some.none() | some.floats(0, 1e4),
            collectives=some.none() | some.integers(0, 9),
            age_s=some.floats(0, 1e5),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda beat: beat.rank,
    ),
    some.none() | some.floats(1, 1e6),
)
def test_limits_are_in_order_and_all_other_timeouts_are_longer(
    beats: list[Heartbeat], hang_after_s: float | None
) -> None:
    limit, others = limits(beats, hang_after_s), Timeouts.of(hang_after_s)
    assert 0 < limit.warn_s < limit.end_s
    assert limit.end_s >= (hang_after_s or 120.0)
    assert limit.end_s < others.poll_s < others.keepalive_s < others.process_group_s
    assert set(behind(beats)) <= {beat.rank for beat in beats}


def test_an_activity_measures_steps_and_the_longest_time_without_progress() -> None:
    now_s = 0.0
    activity = Activity(lambda: now_s)
    assert activity.step_s is None
    with activity.doing("step", then="records"):
        now_s = 2.0
    with activity.doing("step", then="records"):
        with activity.doing("data"):
            now_s = 5.0
        now_s = 6.0
    assert activity.step_s == 3.0 and activity.phase == "records" and activity.longest_s["data"] == 3.0
    with activity.doing("evaluation"):
        for at_s in (7.0, 10.0, 11.0):
            now_s = at_s
            activity.progressed()
        assert "evaluation" not in activity.longest_s  # not before it was left
    assert activity.longest_s["evaluation"] == 3.0
    now_s = 15.0
    assert activity.idle_s == 4.0


def test_a_rank_counts_the_collectives_that_it_has_begun(tmp_path: Path) -> None:
    """By this count the rank that has not entered a collective is told from those that wait in it."""
    assert collectives_begun() is None
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        before = collectives_begun()
        assert before is not None
        dist.all_reduce(torch.ones(1))
        dist.barrier()
        after = collectives_begun()
    finally:
        dist.destroy_process_group()
    assert after is not None and after >= before + 2
