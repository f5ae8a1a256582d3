"""A run on more or fewer workers than it began with: what changes in its plan, and what its options allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.errors import Fault, ResourceError, SettingsError, UnavailableError
from hrm_ray.launch.restarts import Cause, Ending
from hrm_ray.launch.run import run
from hrm_ray.launch.run_directory import load_run
from hrm_ray.launch.supervisor import Failed, WatchedSink, supervise
from hrm_ray.metrics.fanout import FanOut
from hrm_ray.train.plan import RunPlan, resized
from hrm_ray.types import RunResult, StopReason
from tests.support.ray_bodies import plan_of
from tests.support.runs import computed, hrm, records, text_file


def plan_with(batch_size: int, accumulation: int, world_size: int) -> RunPlan:
    plan = plan_of(Path("bundle"), world_size=world_size)
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    optimizer = plan.settings.optimizer.model_copy(update=sizes)
    cluster = plan.settings.cluster.model_copy(update={"max_failures": 3})
    return replace(plan, settings=plan.settings.model_copy(update={"optimizer": optimizer, "cluster": cluster}))


def sizes_of(plan: RunPlan) -> tuple[int, int, int]:
    chosen = plan.settings.optimizer
    return plan.world_size, chosen.batch_size, chosen.gradient_accumulation_steps


@given(
    batch_size=st.integers(1, 12),
    accumulation=st.integers(1, 6),
    world_size=st.integers(1, 12),
    workers=st.integers(1, 40),
    smaller=st.none() | st.integers(1, 12),
)
def test_the_effective_batch_is_shared_by_as_many_as_divide_it(
    batch_size: int, accumulation: int, world_size: int, workers: int, smaller: int | None
) -> None:
    plan = plan_with(batch_size, accumulation, world_size)
    effective = batch_size * accumulation * world_size
    ranks, rows, passes = sizes_of(resized(plan, workers, smaller))
    assert ranks * rows * passes == effective
    assert ranks == max(part for part in range(1, workers + 1) if effective % part == 0)
    share = effective // ranks
    assert rows == max(part for part in range(1, (smaller or batch_size) + 1) if share % part == 0)


@given(world_size=st.integers(1, 8), path=st.lists(st.integers(1, 8), max_size=4))
def test_back_at_the_first_size_the_plan_is_the_first(world_size: int, path: list[int]) -> None:
    plan = plan_with(3, 2, world_size)
    for workers in (*path, world_size):
        again = resized(plan, workers)
    assert sizes_of(again) == sizes_of(plan)


def test_nothing_but_the_split_changes() -> None:
    plan = plan_with(2, 1, 4)
    fewer = resized(plan, 3)
    assert sizes_of(fewer) == (2, 2, 2)
    assert fewer.settings.cluster.world_size == 2
    assert replace(fewer, settings=plan.settings, world_size=4) == plan
    cluster = fewer.settings.cluster.model_copy(update={"world_size": plan.settings.cluster.world_size})
    optimizer = plan.settings.optimizer
    assert fewer.settings.model_copy(update={"optimizer": optimizer, "cluster": cluster}) == plan.settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--min-workers", "3", "--max-workers", "2", "--world-size", "3"), "--min-workers 3 with --max-workers 2"),
        (("--min-workers", "3", "--world-size", "2"), "--min-workers 3 with --world-size 2"),
        (("--min-workers", "2"), "--min-workers 2 with --world-size 1 (default)"),
        (("--max-workers", "2", "--world-size", "3"), "--max-workers 2 with --world-size 3"),
        (("--max-workers", "2", "--launcher", "local"), "--launcher local with --max-workers 2"),
        (("--min-workers", "2", "--launcher", "local"), "--launcher local with --min-workers 2"),
        (("--max-workers", "2", "--strategy", "single"), "--strategy single with --max-workers 2"),
        (("--max-workers", "2", "--world-size", "1"), "--max-workers 2: nothing joins a cluster that is started"),
        (("--max-workers", "2", "--dry-run"), "--max-workers 2: nothing joins a cluster that is started"),
        (("--max-workers", "0"), "--max-workers 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    words = words if "--launcher" in words or "--dry-run" in words else (*words, "--launcher", "ray")
    ran = hrm("train", "--dataset-file", text_file(tmp_path), *words, "--bundle-dir", tmp_path / "b")
    assert ran.code == SettingsError.exit_code, ran.err
    assert said in ran.err
    assert not (tmp_path / "b").exists()


def failed(plan: RunPlan, cause: Cause, step: int = 5) -> Failed:
    error = UnavailableError(Fault("worker 1", "is gone", "Wait"))
    rows = plan.settings.optimizer.batch_size
    return Failed(Ending(cause, error, step, plan.attempt, plan.world_size, rows))


def resize(plan: RunPlan) -> RunResult:
    return RunResult(StopReason.RESIZE, 5, 0, "bundle")


def finish(plan: RunPlan) -> RunResult:
    return RunResult(StopReason.FINISHED, 9, 0, "bundle")


def lost(plan: RunPlan) -> Failed:
    # Each attempt gets further than the one before.
    return failed(plan, Cause.NODE_LOST, plan.attempt)


def plans_of(
    first: RunPlan, script: Sequence[Callable[[RunPlan], RunResult | Failed]], rooms: Sequence[int]
) -> list[RunPlan]:
    """The plans of the attempts that end as scripted, where there is as much room as `rooms` says between them."""
    seen: list[RunPlan] = []
    found = iter(rooms)

    def attempt(plan: RunPlan, records: WatchedSink) -> RunResult | Failed:
        seen.append(plan)
        return script[len(seen) - 1](plan)

    result = supervise(
        first, attempt, sink=FanOut([]), stop=lambda: None, room=lambda _: next(found), wait=lambda *_: None
    )
    assert result.reason is StopReason.FINISHED and not list(found)
    return seen


def elastic(world_size: int, least: int, most: int, **more: int) -> RunPlan:
    plan = plan_with(12 // world_size, 1, world_size)
    cluster = plan.settings.cluster.model_copy(update={"min_workers": least, "max_workers": most, **more})
    return replace(plan, settings=plan.settings.model_copy(update={"cluster": cluster}))


def test_a_run_goes_on_with_the_workers_that_there_are() -> None:
    """4 -> 2 -> 3 -> 1 -> 4: fewer after a loss, more after an attempt that has made way."""
    plans = plans_of(elastic(4, 1, 4), [lost, resize, lost, resize, finish], [2, 3, 1, 4])
    assert [sizes_of(plan) for plan in plans] == [(4, 3, 1), (2, 3, 2), (3, 2, 2), (1, 3, 4), (4, 3, 1)]
    assert [plan.attempt for plan in plans] == [0, 1, 2, 3, 4]
    assert [plan.grown_from for plan in plans] == [0, 0, 2, 0, 1]
    assert [len(plan.ended) for plan in plans] == [0, 1, 1, 2, 2]


def test_workers_that_do_not_divide_the_batch_are_left_out() -> None:
    plans = plans_of(elastic(4, 1, 12), [lost, resize, finish], [5, 11])
    assert [plan.world_size for plan in plans] == [4, 4, 6]


def test_room_for_more_than_the_most_is_not_used() -> None:
    plans = plans_of(elastic(2, 1, 3), [resize, finish], [12])
    assert [plan.world_size for plan in plans] == [2, 3]


def test_room_that_is_gone_when_an_attempt_has_made_way_changes_nothing() -> None:
    plans = plans_of(elastic(2, 1, 4), [resize, finish], [1])
    assert [plan.world_size for plan in plans] == [2, 2]


def test_growing_is_no_failure() -> None:
    plans = plans_of(elastic(1, 1, 2, max_failures=1), [resize, lost, resize, finish], [2, 1, 2])
    assert [plan.world_size for plan in plans] == [1, 2, 1, 2]


@pytest.mark.parametrize("room", [0, 2])
def test_too_few_workers_end_the_run(room: int) -> None:
    with pytest.raises(ResourceError, match=f"room for {room}"):
        plans_of(elastic(4, 3, 4), [lost], [room])


def test_without_the_options_room_is_not_asked_for() -> None:
    plan = plan_with(3, 1, 4)
    assert [each.world_size for each in plans_of(plan, [lost, finish], [])] == [4, 4]


def test_micro_batches_that_were_halved_for_memory_stay_so() -> None:
    """And those that were smaller only because of the number of workers do not."""

    def out_of_memory(plan: RunPlan) -> Failed:
        return failed(plan, Cause.OUT_OF_MEMORY)

    plans = plans_of(elastic(3, 1, 4), [lost, resize, out_of_memory, resize, finish], [2, 3, 3, 2])
    assert [sizes_of(plan) for plan in plans] == [(3, 4, 1), (2, 3, 2), (3, 4, 1), (3, 2, 2), (3, 2, 2)]


def test_a_run_that_makes_way_at_a_checkpoint_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    """It ends with the checkpoint after the request, without the final bundle, and loses no step."""
    data = text_file(tmp_path)

    def trained(name: str, stop: Callable[[], StopReason | None]) -> RunResult:
        words = {"--dataset-file": data, "--bundle-dir": tmp_path / name, "--steps": "9", "--save-every": "4"}
        words |= {"--log-every": "1", "--hidden-size": "16", "--num-heads": "2", "--batch-size": "2", "--no-amp": True}
        words |= {"--vocab-size": "300", "--max-seq-len": "16", "--dropout-rate": "0.1", "--launcher": "local"}
        return run(
            load_run({key: str(value) if value is not True else True for key, value in words.items()}), stop=stop
        )

    trained("plain", lambda: None)
    bundle = tmp_path / "resized"

    def resize_once() -> StopReason | None:
        begun, saved = (bundle / "metrics.jsonl").exists(), (bundle / "checkpoints" / "step_4").exists()
        return StopReason.RESIZE if begun and not saved else None

    result = trained("resized", resize_once)
    assert (result.reason, result.step, result.restarts) == (StopReason.FINISHED, 9, ())
    assert computed(tmp_path / "plain", "train") == computed(tmp_path / "resized", "train")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "resized")]
    assert weights[0] == weights[1]
    messages = [str(record["message"]) for record in records(tmp_path / "resized", "event")]
    assert any("resumed from" in message and "step_4" in message for message in messages)
