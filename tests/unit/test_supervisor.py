"""The loop of attempts over a simulated worker group: 1000 fault tapes, and how a run is stopped between attempts."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from hrm_ray.bundle.store import read_description
from hrm_ray.errors import Fault, HrmRayError
from hrm_ray.launch import supervisor
from hrm_ray.launch.restarts import LASTING, WAITING, WAITS_S, Cause, Ending
from hrm_ray.launch.supervisor import Failed, WatchedSink, supervise
from hrm_ray.model.build import build_model
from hrm_ray.rundir import MANIFEST, RunDir, read_json, write_json
from hrm_ray.train.plan import RunPlan, effective_batch
from hrm_ray.types import Record, RestartRecord, RunResult, StopPoll, StopReason, StopRequested
from tests.support.ray_bodies import plan_of
from tests.support.runs import PUZZLE, TEXT, puzzle_file, stopping_at, text_file, train

STEPS, SAVE_EVERY = 30, 4


class Shown:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        raise AssertionError("it belongs to the caller")


class Clock:
    """Waits that take no time."""

    def __init__(self) -> None:
        self.waits_s: list[float] = []

    def wait(self, wait_s: float, stop: StopPoll) -> None:
        self.waits_s.append(wait_s)


@dataclass
class Group:
    """A simulated worker group. Its weights are the numbers of the rows that they were trained on, and `tape` says how
    each attempt ends: a cause and the steps until then; the attempt after the tape's end has no fault."""

    tape: list[tuple[Cause, int]]
    chance: random.Random
    checkpoints: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """What a bundle holds: step -> weights."""
    weights: tuple[int, ...] = ()
    endings: list[Ending] = field(default_factory=list)
    plans: list[RunPlan] = field(default_factory=list)
    alive: bool = False
    room: int = 4

    def room_for(self, plan: RunPlan) -> int:
        return self.room

    def attempt(self, plan: RunPlan, records: WatchedSink) -> RunResult | Failed:
        assert not self.alive, "an attempt begins when the one before has ended"
        self.alive = True
        self.plans.append(plan)
        step = max(self.checkpoints, default=0) if plan.attempt else 0
        self.weights = self.checkpoints.get(step, ())
        if plan.ended:
            record = RestartRecord(len(plan.ended), plan.ended[-1].cause, plan.ended[-1].step, step, 1.0)
            records.write(Record("event", step, 0.0, {"message": "restart", **record.values()}))
        cause, left = self.tape.pop(0) if self.tape else (None, STEPS)
        rows = effective_batch(plan)
        while step < STEPS and left:
            left -= 1
            self.weights += tuple(range(step * rows, (step + 1) * rows))
            step += 1
            if self.chance.random() < 0.5:  # progress is sent now and then
                records.write(Record("progress", step, 0.0, {"epoch": 0}))
            if step % SAVE_EVERY == 0:
                self.checkpoints[step] = self.weights
        self.alive = False
        if cause is None or step == STEPS:
            return RunResult(StopReason.FINISHED, step, 1, str(plan.bundle))
        error = HrmRayError(Fault(f"attempt {len(self.plans)}", cause.value, ""))
        known = max([records.step, *self.checkpoints])
        batch_size = plan.settings.optimizer.batch_size
        self.endings.append(Ending(cause, error, known, plan.attempt, plan.world_size, batch_size))
        self.room = self.chance.randint(0, 4) if cause is Cause.NODE_LOST else 4
        return Failed(self.endings[-1], begun=self.chance.random() < 0.9)


def elastic(plan: RunPlan) -> RunPlan:
    cluster = plan.settings.cluster.model_copy(update={"min_workers": 1, "max_workers": 4})
    return replace(plan, settings=plan.settings.model_copy(update={"cluster": cluster}))


@pytest.mark.parametrize("part", range(10))
def test_a_hundred_tapes_end_within_the_budget_and_lose_no_row(part: int, tmp_path: Path) -> None:
    finished = 0
    for seed in range(part * 100, part * 100 + 100):
        chance = random.Random(seed)
        most = chance.choice([0, 1, 3, 10, 50])
        plan = plan_of(tmp_path, world_size=chance.choice([1, 2, 4]), max_failures=most)
        if chance.random() < 0.5:
            plan = elastic(plan)
        causes = [cause for cause in Cause if cause not in LASTING or chance.random() < 0.2]
        tape = [(chance.choice(causes), chance.randint(0, 12)) for _ in range(chance.randint(0, 14))]
        group, clock, shown = Group(tape, chance), Clock(), Shown()
        try:
            result = supervise(plan, group.attempt, sink=shown, stop=lambda: None, room=group.room_for, wait=clock.wait)
        except HrmRayError as error:
            check_the_end(error, group, most)
        else:
            finished += 1
            rows = effective_batch(plan) * STEPS
            assert group.weights == tuple(range(rows)), f"tape {seed}: a row is missing or was trained twice"
            assert [row.number for row in result.restarts] == list(range(1, len(group.plans)))
        budget = most + halvings(group.endings) if most else 0
        assert len(group.plans) <= budget + 1 and len(group.endings) <= budget + 1
        assert [each.attempt for each in group.plans] == list(range(len(group.plans))), "it looks for checkpoints"
        assert all(effective_batch(each) == effective_batch(plan) for each in group.plans)
        assert len([each for each in clock.waits_s if each in WAITS_S]) <= len(group.plans)
        assert not group.alive
    assert finished > 20, "the tapes are not all hopeless"


def halvings(endings: list[Ending]) -> int:
    """How many of the failures were followed by smaller micro-batches."""
    found, of_host = 0, 0
    for each in endings:
        of_host += each.cause is Cause.HOST_MEMORY
        needs_less = each.cause is Cause.OUT_OF_MEMORY or (each.cause is Cause.HOST_MEMORY and of_host > 1)
        found += needs_less and each.batch_size > 1
    return found


def check_the_end(error: HrmRayError, group: Group, most: int) -> None:
    """That a run which ended with an error had to."""
    last, before = group.endings[-1], group.endings[:-1]
    if error is not last.error:
        assert error.exit_code == 4 and last.cause is Cause.NODE_LOST, "too little room"
        return
    alike = [each for each in before if (each.cause, each.step) == (last.cause, last.step)]
    assert (
        last.cause in LASTING
        or not most
        or len(before) - halvings(before) >= most
        or (last.cause not in WAITING and alike)
        or len(alike) >= len(WAITS_S)
        or (last.cause is Cause.OUT_OF_MEMORY and last.batch_size == 1)
    )


def test_a_deterministic_crash_ends_after_its_second_failure(tmp_path: Path) -> None:
    group = Group([(Cause.CRASH, 4), *[(Cause.CRASH, 0)] * 9], random.Random(0))
    with pytest.raises(HrmRayError) as caught:
        supervise(plan_of(tmp_path, max_failures=3), group.attempt, sink=Shown(), stop=lambda: None)
    assert caught.value is group.endings[1].error and len(group.endings) == 2


def test_a_bundle_that_is_continued_is_searched_only_once_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    failed = Failed(Ending(Cause.WORKER_LOST, HrmRayError(Fault("a", "b", "")), 0, 0, 1, 4), begun=False)
    plan = plan_of(tmp_path)
    for continues, begun, attempt in [(True, False, 0), (True, True, 1), (False, False, 1)]:
        before = replace(plan, continues=continues)
        assert supervisor.next_plan(before, replace(failed, begun=begun), before).attempt == attempt


def test_every_failure_is_told_before_the_next_attempt(tmp_path: Path) -> None:
    group, shown = Group([(Cause.WORKER_LOST, 6)], random.Random(0)), Shown()
    supervise(plan_of(tmp_path, max_failures=3), group.attempt, sink=shown, stop=lambda: None)
    messages = [str(record.values["message"]) for record in shown.records if record.kind == "event"]
    assert messages[0].startswith("worker lost at step ") and messages[0].endswith("restart 1 of at most 3")
    assert len(messages) == 2 and len(messages[0]) < 300


def saved(bundle: Path, step: int) -> None:
    """A checkpoint as far as a stop reads it."""
    folder = RunDir(bundle).checkpoint(step)
    folder.mkdir(parents=True)
    write_json(folder / "state.json", {"progress": {"step": step}, "epoch": 3})
    write_json(folder / MANIFEST, {})


def test_a_stop_between_attempts_ends_the_run_at_its_checkpoint(tmp_path: Path) -> None:
    group, asked = Group([(Cause.DISK, 6)], random.Random(0)), list[StopReason]()

    def wait(wait_s: float, stop: StopPoll) -> None:
        asked.append(StopReason.SIGTERM)

    saved(tmp_path, 4)
    stop = lambda: asked[0] if asked else None  # noqa: E731
    result = supervise(plan_of(tmp_path, max_failures=3), group.attempt, sink=Shown(), stop=stop, wait=wait)
    assert (result.reason, result.step, result.epoch, len(group.plans)) == (StopReason.SIGTERM, 4, 3, 1)


def test_a_stop_with_nothing_saved_ends_with_the_failure(tmp_path: Path) -> None:
    group = Group([(Cause.WORKER_LOST, 2)], random.Random(0))
    with pytest.raises(HrmRayError) as caught:
        supervise(plan_of(tmp_path, max_failures=3), group.attempt, sink=Shown(), stop=lambda: StopReason.SIGTERM)
    assert caught.value is group.endings[0].error


def test_a_stop_before_the_first_step_is_passed_on(tmp_path: Path) -> None:
    def attempt(plan: RunPlan, records: WatchedSink) -> RunResult | Failed:
        raise StopRequested(StopReason.INTERRUPT)

    with pytest.raises(StopRequested):
        supervise(plan_of(tmp_path), attempt, sink=Shown(), stop=lambda: None)


def test_a_wait_ends_with_a_stop() -> None:
    supervisor.wait_for(3600.0, lambda: StopReason.SIGTERM)


def test_a_restart_of_which_no_record_came_is_listed_too(tmp_path: Path) -> None:
    """The actor that collects records was killed, or the attempt ended before it had the bundle's files."""
    crash = HrmRayError(Fault("worker 0", "died", ""))

    def attempt(plan: RunPlan, records: WatchedSink) -> RunResult | Failed:
        number = len(plan.ended)
        if number == 2:
            records.write(Record("event", 4, 0.0, {**RestartRecord(2, "crash", 9, 4, 1.5).values(), "message": ""}))
            return RunResult(StopReason.FINISHED, 9, 0, str(tmp_path))
        return Failed(Ending(Cause.CRASH, crash, 5 + 4 * number, number, 1, 1), begun=number > 0)

    result = supervise(plan_of(tmp_path, max_failures=3), attempt, sink=Shown(), stop=lambda: None, wait=Clock().wait)
    assert result.restarts == (RestartRecord(1, "crash", 5), RestartRecord(2, "crash", 9, 4, 1.5))


@pytest.mark.parametrize("data", ["text", "puzzle"])
def test_a_stop_between_attempts_leaves_the_bundle_of_a_stopped_run(data: str, tmp_path: Path) -> None:
    """With the moving average as its weights, and the figures of the last evaluation."""
    words = (*(PUZZLE if data == "puzzle" else TEXT), "--ema", "0.9", "--steps", "9", "--eval-every", "2")
    file = puzzle_file(tmp_path) if data == "puzzle" else text_file(tmp_path)
    with stopping_at(3):
        train(file, tmp_path / "bundle", *words, "--eval-file", file)
    run_dir = RunDir(tmp_path / "bundle")
    weights, about = run_dir.weights.read_bytes(), read_json(run_dir.metadata)
    run_dir.weights.unlink()
    run_dir.metadata.unlink()
    plan, shown = replace(plan_of(tmp_path / "bundle"), attempt=1), Shown()
    result = supervisor._stopped(plan, StopReason.STOP_FILE, WatchedSink(shown))
    assert result.step == 3 and not shown.records
    assert run_dir.weights.read_bytes() == weights and about["figures"]
    assert {**read_json(run_dir.metadata), "written": about["written"]} == about and about["best"]
    # ZeRO's checkpoints have float32 weights also where those of the bundle are narrower; best/ may be gone.
    shutil.rmtree(run_dir.best.root)
    memory = plan.settings.memory.model_copy(update={"model_dtype": "bf16"})
    settings = plan.settings.model_copy(update={"memory": memory})
    config, _ = read_description(run_dir.root)
    supervisor._stopped(replace(plan, config=config, settings=settings), StopReason.STOP_FILE, WatchedSink(shown))
    whole, narrow = load(weights), load(run_dir.weights.read_bytes())
    assert whole.keys() == narrow.keys() and all(
        whole[name].to(narrow[name].dtype).equal(narrow[name]) for name in whole
    )
    for name, parameter in build_model(config).state_dict(keep_vars=True).items():
        assert (narrow[name].dtype == torch.bfloat16) == isinstance(parameter, torch.nn.Parameter)
    assert read_json(run_dir.metadata)["best"] is None


@pytest.mark.parametrize("adapters", [False, True])
def test_a_stopped_run_without_final_weights_says_so(adapters: bool, tmp_path: Path) -> None:
    saved(tmp_path, 4)
    plan, shown = replace(plan_of(tmp_path), attempt=1), Shown()
    adapt = plan.settings.adapt.model_copy(update={"use_peft": adapters})
    plan = replace(plan, settings=plan.settings.model_copy(update={"adapt": adapt}))
    assert supervisor._stopped(plan, StopReason.SIGTERM, WatchedSink(shown)).step == 4
    (message,) = [str(record.values["message"]) for record in shown.records]
    assert message.startswith("no final weights are written (") and "--resume" in message
    assert "adapters" in message if adapters else "manifest.json" in message
