"""The plan of a run: everything that is decided before workers start, and all that a worker is given.

The launcher makes it once. It crosses to other processes as plain JSON values and is rebuilt there once.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

from hrm_ray.bundle.folder_watch import missing
from hrm_ray.data.prepare import PuzzlePlan
from hrm_ray.data.text_data import TextPlan
from hrm_ray.errors import UnreadableError
from hrm_ray.metrics.jsonl import drop_copies, truncate_after
from hrm_ray.model.config import ModelConfig
from hrm_ray.rundir import RunDir, verify_checkpoint, write_json
from hrm_ray.settings import tree
from hrm_ray.settings.adaptive_lr import AdaptiveLrSettings
from hrm_ray.settings.tree import RunSettings, to_plain


@dataclass(frozen=True)
class TextData:
    """The text of a run: how it is read and cut (`text`), and what preparing it found out.

    `held_out` names the held-out data, None where there is none. `rows` are the sequences of an epoch and `first_rows`
    those of the first epoch, None where nothing had to be counted.
    """

    text: TextPlan
    path: str | None
    split: str
    held_out: str | None
    held_out_rows: int
    max_val_examples: int | None
    vocab_size: int
    pad_id: int
    tokenizer: str
    rows: int | None
    first_rows: int | None
    rows_estimated: bool

    def to_plain(self) -> dict[str, Any]:
        """JSON values, as training_args.json holds them: those of the text plan lie beside the others."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "text"}
        return {"task": "lm", **self.text.plain(), **own}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TextData:
        """What `to_plain` gave."""
        own = {field.name: plain[field.name] for field in fields(cls) if field.name != "text"}
        return cls(text=TextPlan.from_plain(plain), **own)


@dataclass(frozen=True)
class EndedAttempt:
    """Why an attempt of the run ended: the cause in words, the last step that it trained, and the error's message."""

    cause: str
    step: int
    message: str


@dataclass(frozen=True)
class RunPlan:
    """Everything that a worker needs besides the files of the bundle. Workers log `notes` as warnings and `remarks` as
    INFO."""

    settings: RunSettings
    config: ModelConfig
    data: TextData | PuzzlePlan
    bundle: Path
    """The bundle's folder; the driver has made it."""
    checkpoint: Path | None
    """The checkpoint to resume from; None for a new run."""
    continues: bool
    """Whether the checkpoint is the bundle's own. Otherwise the run is new, or branches off into a new bundle."""
    schedule_steps: int
    adaptive_lr: AdaptiveLrSettings | None
    device: str
    world_size: int
    threads: int
    """CPU threads of each worker."""
    ray_address: str | None
    keep_freed_memory: bool
    notes: tuple[str, ...]
    """Sentences to log as warnings."""
    remarks: tuple[str, ...]
    """Sentences to log as information."""
    stop_by_s: float | None = None
    """When the workers must have saved because of --max-time, in seconds since the epoch."""
    attempt: int = 0
    """How many attempts of this run have opened its files before. From 1 on rank 0 looks for the checkpoint to go on
    from; where the run has none yet, it begins as the first attempt did."""
    ended: tuple[EndedAttempt, ...] = ()
    """Why the attempts before ended, oldest first."""
    begun_s: float = 0.0
    """When the first attempt began, in seconds since the epoch."""
    grown_from: int = 0
    """The workers of the attempt before, where it ended because there is room for more; else 0."""

    def to_plain(self) -> dict[str, Any]:
        """JSON values."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return own | {
            "settings": tree.to_plain(self.settings),
            "config": self.config.to_plain(),
            "data": self.data.to_plain(),
            "bundle": str(self.bundle),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "adaptive_lr": None if self.adaptive_lr is None else self.adaptive_lr.model_dump(mode="json"),
            "notes": list(self.notes),
            "remarks": list(self.remarks),
            "ended": [vars(attempt) for attempt in self.ended],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RunPlan:
        """What `to_plain` gave."""
        data, checkpoint, adaptive_lr = plain["data"], plain["checkpoint"], plain["adaptive_lr"]
        rebuilt = {
            "settings": tree.from_plain(plain["settings"]),
            "config": ModelConfig.from_plain(plain["config"], "the plan of the run"),
            "data": PuzzlePlan.from_plain(data) if data["task"] == "puzzle" else TextData.from_plain(data),
            "bundle": Path(plain["bundle"]),
            "checkpoint": None if checkpoint is None else Path(checkpoint),
            "adaptive_lr": None if adaptive_lr is None else AdaptiveLrSettings(**adaptive_lr),
            "notes": tuple(plain["notes"]),
            "remarks": tuple(plain["remarks"]),
            "ended": tuple(EndedAttempt(**attempt) for attempt in plain["ended"]),
        }
        return cls(**{**plain, **rebuilt})


def resized(plan: RunPlan, workers: int, batch_size: int | None = None) -> RunPlan:
    """The plan for as many of `workers` as share its effective batch equally, in micro-batches of at most `batch_size`
    rows (None: as the plan has them).

    Nothing else changes: neither data, nor their order, nor the learning rate. From the plan that a run began with, not
    from one that was resized: its micro-batches may be smaller than those that were asked for.
    """
    if plan.settings.cluster.parallel_independent:
        return replace(plan, world_size=workers)  # each takes whole updates
    chosen, effective = plan.settings.optimizer, effective_batch(plan)
    world_size = largest_divisor(effective, workers)
    rows = effective // world_size
    micro_batch = largest_divisor(rows, batch_size or chosen.batch_size)
    sizes = {"batch_size": micro_batch, "gradient_accumulation_steps": rows // micro_batch}
    settings = plan.settings.model_copy(
        update={
            "optimizer": chosen.model_copy(update=sizes),
            "cluster": plan.settings.cluster.model_copy(update={"world_size": world_size}),
        }
    )
    return replace(plan, settings=settings, world_size=world_size)


def effective_batch(plan: RunPlan) -> int:
    """Rows of a weight update over all workers that take it together."""
    chosen = plan.settings.optimizer
    together = 1 if plan.settings.cluster.parallel_independent else plan.world_size
    return chosen.batch_size * chosen.gradient_accumulation_steps * together


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return next(part for part in range(min(number, most), 0, -1) if number % part == 0)


def halved(batch_size: int) -> int | None:
    """The largest divisor of `batch_size` up to half of it; None for 1."""
    return largest_divisor(batch_size, batch_size // 2) if batch_size > 1 else None


def write_description(run_dir: RunDir, plan: RunPlan) -> None:
    """config.json and training_args.json of the run that the plan describes."""
    write_json(run_dir.config, plan.config.to_plain())
    write_json(run_dir.training_args, {"settings": to_plain(plan.settings), "data": plan.data.to_plain()})
    # Held-out documents from before the run was resumed with others.
    kept = plan.data.text.evaluation if isinstance(plan.data, TextData) else None
    for other in run_dir.data.glob("eval-*.safetensors"):
        if other.name != kept:
            other.unlink()


def as_restarted(plan: RunPlan, run_dir: RunDir) -> RunPlan:
    """The plan of an attempt after the first: it continues from the bundle's newest whole checkpoint.

    Where the run has none yet, its files are as at the first attempt. Only on rank 0, when no other process writes into
    the bundle. Raises DataError where all checkpoints are damaged: the run does not begin again beside them.
    """
    if not run_dir.config.is_file():
        raise UnreadableError(missing(run_dir.root))
    run_dir.recover()
    newest = run_dir.newest_whole_checkpoint()
    if newest is not None:
        return replace(plan, checkpoint=newest, continues=True)
    damaged = run_dir.newest_checkpoint()
    if damaged is not None:
        verify_checkpoint(damaged)
    if plan.settings.run.log_file is not None:
        drop_copies(plan.settings.run.log_file, run_dir.metrics, -1)
    run_dir.metrics.unlink(missing_ok=True)
    for folder in (run_dir.tensorboard, run_dir.best.root):
        if folder.exists():
            shutil.rmtree(folder)
    return plan


def rewind_to(run_dir: RunDir, plan: RunPlan, step: int) -> None:
    """Describe the run that resumes at `step`, delete later records, and rename later checkpoints (`.superseded-N`)."""
    if not plan.attempt:
        # A later attempt may have fewer workers and other micro-batches than were asked for.
        write_description(run_dir, plan)
    if plan.settings.run.log_file is not None:
        drop_copies(plan.settings.run.log_file, run_dir.metrics, step)
    truncate_after(run_dir.metrics, step)
    for later in run_dir.checkpoint_steps():
        if later > step:
            folder = run_dir.checkpoint(later)
            aside = (run_dir.checkpoints / f"{folder.name}.superseded-{number}" for number in count(1))
            folder.rename(next(place for place in aside if not place.exists()))
