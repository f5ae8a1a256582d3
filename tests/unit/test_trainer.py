"""A worker's parts, each made apart: who writes what, the schedule's clock, and passes that may not be repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from hrm_ray.bundle.progress import Progress, stored_counts
from hrm_ray.errors import ResourceError
from hrm_ray.rundir import RunDir, write_json
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.activity import Phase
from hrm_ray.train.assemble import assemble
from hrm_ray.train.checkpoint import Checkpointer, load_checkpoint, save_checkpoint
from hrm_ray.train.evaluate import EvalSet
from hrm_ray.train.evaluator import Evaluator
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.metric_logger import MetricLogger
from hrm_ray.train.schedules import ScheduleClock
from hrm_ray.train.trainer import Trainer
from hrm_ray.train.world import World
from hrm_ray.types import Record
from tests.support.fail_at import FailAt, script
from tests.support.runs import files_below
from tests.support.splits import Cut, Rows, config_for, settings_for

ALONE = Cut(1, 1, 8)


class Records:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def write(self, record: Record) -> None:
        self.kinds.append(record.kind)

    def close(self) -> None:
        """Nothing is open."""


def settings_of(**run: object) -> RunSettings:
    settings = settings_for("text", "sgd", ALONE)
    return settings.model_copy(update={"run": settings.run.model_copy(update=run)})


def loop_of(settings: RunSettings) -> TrainingLoop:
    config = config_for(settings)
    return assemble(settings, config, Rows(config.task), World.here("cpu", 1), 20)


def trainer_of(settings: RunSettings, folder: Path, sink: Records | None, best: RunDir | None) -> Trainer:
    loop, run_dir = loop_of(settings), RunDir(folder)
    folder.mkdir()
    write_json(run_dir.config, config_for(settings).to_plain())
    held_out = EvalSet(HeldOut("lm", 8), 8, 1)
    evaluator = Evaluator(loop, held_out, ("held out",), best)
    return Trainer(settings, loop, MetricLogger(loop, sink), evaluator, Checkpointer(loop, run_dir, keep=1))


class HeldOut(Rows):
    def rows(self, indices):  # type: ignore[no-untyped-def]
        columns = super().rows(indices)
        return columns | {"label_bytes": (columns["labels"] >= 0).astype("int32")}


def test_trainers_beside_each_other_write_what_they_are_given(tmp_path: Path) -> None:
    """Each is a world of one, and leads it; only the one with a sink writes records, only that with a folder best/."""
    settings, sink = settings_of(steps=3, log_every=1, eval_every=2), Records()
    first = trainer_of(settings, tmp_path / "first", sink, RunDir(tmp_path / "first"))
    second = trainer_of(settings, tmp_path / "second", None, None)
    (tmp_path / "first" / "training_args.json").write_text("{}")
    assert first.loop.world.leads and second.loop.world.leads
    results = [first.run(), second.run()]
    assert sink.kinds == ["train", "train", "eval", "train", "eval"]
    assert [result.bundle for result in results] == [str(tmp_path / "first"), str(tmp_path / "second")]
    assert results[0].figures == results[1].figures, "who writes changes no number"
    names = [{name.split("/")[0] for name in files_below(tmp_path / each)} for each in ("first", "second")]
    own = {"config.json", "metadata.json", "model.safetensors", "checkpoints"}
    assert names == [own | {"best", "training_args.json"}, own]


def test_a_trainer_marks_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker's heartbeat says, and by which a hang is told from a long evaluation."""
    trainer = trainer_of(settings_of(steps=2, log_every=1, eval_every=1, save_every=1), tmp_path / "run", None, None)
    activity, entered = trainer.loop.activity, list[tuple[int, str]]()
    assert (activity.phase, activity.step) == ("starting", 0)
    enter = activity.enter

    def noted(phase: Phase) -> None:
        entered.append((activity.step, phase))
        enter(phase)

    monkeypatch.setattr(activity, "enter", noted)
    trainer.run()
    between = ["records", "evaluation", "records", "checkpoint", "records"]
    first = ["first step", "first step", "first step", *between]
    second = ["step", "data", "step", "records", "evaluation", "records", "ending", "evaluation", "ending"]
    assert entered == [*((1, phase) for phase in first), *((2, phase) for phase in [*second, "checkpoint", "ending"])]
    assert activity.step_s is not None and activity.longest_s.keys() >= {"first step", "evaluation", "checkpoint"}


def test_the_schedule_follows_its_clock(tmp_path: Path) -> None:
    """A clock that counts samples: a worker that starts late stands where the samples of all have come to."""
    settings = settings_for("text", "sgd", ALONE)
    chosen = settings.optimizer.model_copy(update={"lr_schedule": "linear", "warmup_steps": 4})
    loop = loop_of(settings.model_copy(update={"optimizer": chosen}))
    schedule, lr = loop.parts.lr_schedule.schedule, loop.parts.lr_schedule.lr
    loop.clock = ScheduleClock(position=6.0, samples_per_update=32)
    seen = [report.lr for report in (loop.step(), loop.step()) if report is not None]
    assert seen == pytest.approx([lr * schedule.factor(7.0), lr * schedule.factor(7.25)], rel=1e-12)
    assert (loop.clock.position, loop.progress.step) == (6.5, 2)
    checkpoint = save_checkpoint(loop, RunDir(tmp_path), {}, keep=1)
    again = loop_of(settings)
    load_checkpoint(again, checkpoint)
    assert again.clock.position == 6.5
    assert stored_counts(RunDir(tmp_path)) == {2: (16, 0)}


def test_a_checkpoint_without_counts_of_samples() -> None:
    """They stay unknown, since a count from there on would say less than was trained."""
    progress = Progress.from_plain({"step": 3, "batch_idx": 4, "bad_steps": 0, "skipped_steps": 1})
    progress.count_samples(8, skipped=False)
    assert (progress.step, progress.trained_samples, progress.skipped_samples) == (3, None, None)


def test_passes_with_collectives_are_not_repeated() -> None:
    loop = loop_of(settings_for("text", "sgd", ALONE))
    loop.parts.strategy.retries_passes = False
    script(loop, [FailAt(0, 2, fits=4)])
    assert loop.step() is not None
    with pytest.raises(ResourceError, match=r"step 2: out of memory with a micro-batch of 8.*--batch-size"):
        loop.step()
    assert loop.parts.shape.batch_size == 8
