"""One worker of a run from start to end, for any launcher.

The driver has prepared the bundle's folder and the data beforehand; a worker assembles its loop, restores the
checkpoint if the plan names one, trains, and closes everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from hrm_ray.atomic_files import unwritable
from hrm_ray.bundle.folder_watch import FolderWatch, missing
from hrm_ray.data.batches import BatchSource, LocalBatches
from hrm_ray.data.catalog import Catalog
from hrm_ray.data.chunk_source import ChunkPipeline, EpochOrder, InMemoryChunks, LocalChunks
from hrm_ray.data.packing import TextSamples
from hrm_ray.data.prepare import PuzzlePlan, open_puzzle_sets
from hrm_ray.data.stream import ConsumedRange, append_ranges
from hrm_ray.data.text_data import TextDataDir, TextPlan
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import (
    AWAY_ERRNOS,
    DISK_FULL_ERRNOS,
    DataError,
    HrmRayError,
    UnreadableError,
    unreadable_if_away,
)
from hrm_ray.ledger import delete_ledger
from hrm_ray.log_filters import silence_unused_kernels
from hrm_ray.metrics.fanout import FanOut
from hrm_ray.metrics.jsonl import JsonlSink
from hrm_ray.metrics.reporters import report_sinks
from hrm_ray.metrics.tensorboard import TensorBoardSink
from hrm_ray.rundir import MANIFEST, RunDir, file_sha256
from hrm_ray.settings.schedule_length import schedule_length
from hrm_ray.settings.tree import to_dotted
from hrm_ray.train.activity import Activity
from hrm_ray.train.assemble import assemble
from hrm_ray.train.checkpoint import Checkpointer, load_checkpoint
from hrm_ray.train.evaluate import EvalSet
from hrm_ray.train.evaluator import Evaluator, Sampler
from hrm_ray.train.expert_run import ExpertRun
from hrm_ray.train.ledger_writer import LedgerWriter, ResumePoint
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.memory_limit import limit_memory
from hrm_ray.train.metric_logger import MetricLogger
from hrm_ray.train.plan import RunPlan, TextData, as_restarted, rewind_to
from hrm_ray.train.start_events import log_attempt, log_rank_schedule, log_start
from hrm_ray.train.stream_loader import StreamLoader, TextStream
from hrm_ray.train.time_limit import TimeLimit
from hrm_ray.train.trainer import Trainer
from hrm_ray.train.world import World
from hrm_ray.types import DriverLink, MetricSink, RunResult, SampleSet, StopPoll, StopReason

FILL_REPORT_EVERY_S = 5.0
"""Seconds between two reports of how full the shuffle buffer is; shorter filling is not reported."""
ANSWER_EVERY_S = 10.0
"""Seconds after which the other ranks hear that rank 0 still reads what a lost ledger said."""


class WorkerLink(DriverLink, Protocol):
    """A worker's access to the driver, and to batches of text; each launcher has its own."""

    @property
    def activity(self) -> Activity:
        """Where this worker marks what it does."""

    def batches(self, pipeline: Callable[[bool], ChunkPipeline], order: EpochOrder) -> BatchSource:
        """Where this worker's batches come from, of chunks in `order`.

        `pipeline` makes chunks in this process; its argument says whether catalog and cache are written here.
        """


def train(plan: RunPlan, link: WorkerLink) -> RunResult:
    """Run this worker's share of the plan; the process group, if there is to be one, already exists."""
    with ExitStack() as opened:
        watch: FolderWatch | None = None
        try:
            watch = opened.enter_context(closing(FolderWatch(plan.bundle)))
            opened.callback(limit_memory(plan.settings.memory.budget_bytes, plan.device))
            return _train(plan, link, watch)
        except (OSError, HrmRayError) as error:
            if watch is not None:
                watch.check()  # Without the folder any file may be missing; the error to report is that.
            elif plan.attempt and isinstance(error, DataError):
                raise UnreadableError(missing(plan.bundle)) from error
            if isinstance(error, HrmRayError):
                known = unreadable_if_away(error)
                if known is error:
                    raise
                raise known from error
            if error.errno in DISK_FULL_ERRNOS | AWAY_ERRNOS:
                raise unwritable(Path(error.filename or plan.bundle), error) from error
            raise


def _train(plan: RunPlan, link: WorkerLink, watch: FolderWatch) -> RunResult:
    silence_unused_kernels()
    settings, config, run_dir = plan.settings, plan.config, RunDir(plan.bundle)
    world = World.here(plan.device, plan.threads, keep_freed=plan.keep_freed_memory)
    first = plan
    if plan.attempt:
        plan = world.from_leader(lambda: as_restarted(first, run_dir))
    data, held_out = _data(plan.data, run_dir, world, link)
    time_limit = TimeLimit(plan.stop_by_s)
    loop = assemble(
        settings,
        config,
        data,
        world,
        plan.schedule_steps,
        _stop_poll(world, link, time_limit),
        resumes=plan.checkpoint is not None,
        adaptive_lr=plan.adaptive_lr,
    )
    loop.activity = link.activity
    resumed_step: int | None = None
    extra: dict[str, Any] = {}
    if plan.checkpoint is not None:
        extra = load_checkpoint(loop, plan.checkpoint)
        if settings.data.force_train and first.checkpoint is not None:
            loop.parts.loader.one_epoch_more()
        resumed_step = loop.progress.step
        world.barrier()  # until every rank has read the checkpoint nothing in the bundle may move
    with ExitStack() as opened:
        opened.callback(loop.parts.loader.close)
        sink: MetricSink | None = None
        ledger_writer: LedgerWriter | None = None

        trained_before = _trained_before(plan, run_dir, loop)

        def open_files() -> None:
            nonlocal sink, ledger_writer
            watch.take_generation()
            # First the ledger, which may refuse the checkpoint: the rest of the bundle then stays as it was.
            ledger_writer = _ledger_writer(plan, run_dir, resumed_step, extra, loop, trained_before)
            if ledger_writer is not None:
                opened.callback(_close_ledger, ledger_writer, watch)
            if resumed_step is not None and plan.continues:
                rewind_to(run_dir, plan, resumed_step)
            sink = sinks = run_sinks(plan, run_dir, resumed_step, link.sink())
            opened.push(lambda kind, error, trace: sinks.close(run_failed=error is not None))
            link.begin()

        world.from_leader(open_files)
        expert = ExpertRun(**extra["expert"]) if extra.get("expert") else ExpertRun.of_new_run(settings)
        logger = MetricLogger(loop, sink, link.sink() if world.leads else None)
        source = (str(settings.data.eval_file), settings.data.val_split)
        evaluator = Evaluator(loop, EvalSet.of_run(held_out, settings, world), source, run_dir, watch)
        checkpointer = Checkpointer(loop, run_dir, settings.run.keep, ledger_writer, watch)
        opened.callback(checkpointer.close)
        prompt, sampler = settings.run.sample_prompt, None
        if prompt is not None and isinstance(plan.data, TextData):
            sampler = Sampler(loop, TextTokenizer.of_bundle(run_dir.root), prompt)
        trainer = Trainer(settings, loop, logger, evaluator, checkpointer, expert, watch, sampler, time_limit)
        if isinstance(loop.parts.loader, StreamLoader):
            loop.parts.loader.on_fill = _while_filling(loop, logger)
        if isinstance(plan.data, TextData) and plan.data.rows_estimated:
            _refine_schedule(plan, plan.data, loop, logger)
        log_start(plan, logger)
        if plan.checkpoint is not None:
            trainer.resume(extra, restarted=plan.attempt > 0)
            logger.event("INFO", f"resumed from {plan.checkpoint}")
            log_rank_schedule(logger)
        log_attempt(plan, logger)
        return trainer.run()


def _stop_poll(world: World, link: WorkerLink, time_limit: TimeLimit) -> StopPoll:
    """Asks rank 0's driver and time limit whether the run is to end; a stop comes before a restart with more
    workers."""

    def stop_poll() -> StopReason | None:
        if not world.leads:
            return None
        requested = link.stop_requested()
        return time_limit.poll() or requested if requested in (None, StopReason.RESIZE) else requested

    return stop_poll


def _while_filling(loop: TrainingLoop, logger: MetricLogger) -> Callable[[int, int], None]:
    """What is done after each chunk of a shuffle buffer: a stop ends the filling, and every few seconds the rows are
    reported."""
    report_s, filled = 0.0, (-1, 0)

    def filling(rows: int, wanted: int) -> None:
        nonlocal report_s, filled
        loop.activity.progressed()
        loop.leave_if_stopped()
        step, rows_before = filled
        if loop.progress.step != step or rows <= rows_before:
            # Another filling begins.
            report_s = time.monotonic() + FILL_REPORT_EVERY_S
        filled = loop.progress.step, rows
        if time.monotonic() >= report_s:
            report_s = time.monotonic() + FILL_REPORT_EVERY_S
            logger.event("INFO", f"filling the shuffle buffer: {rows:,} of {wanted:,} rows")

    return filling


def _refine_schedule(plan: RunPlan, data: TextData, loop: TrainingLoop, logger: MetricLogger) -> None:
    """Recompute a schedule whose rows were estimated at the end of each epoch, when they are known.

    The rows are in the checkpoint, so that a resumed run has the learning rate of the run that was not stopped.
    """
    parts, loader = loop.parts, loop.parts.loader
    if not isinstance(loader, StreamLoader):
        return

    def lay_out(first_rows: int, rows: int) -> int:
        effective, current = parts.shape.effective, parts.lr_schedule
        steps = schedule_length(plan.settings, rows, effective, plan.config.halt_max_steps, first_samples=first_rows)
        parts.lr_schedule = replace(current, schedule=replace(current.schedule, total_steps=steps))
        return steps

    def at_epoch_end(epoch: int, sequences: int) -> None:
        first_rows, rows = loop.epoch_rows or (data.first_rows or 0, data.rows or 0)
        first_rows = sequences if epoch == 0 else first_rows
        # An epoch that begins with a later chunk does not tell how long the others are.
        rows = sequences if epoch or not data.text.start else rows
        if (first_rows, rows) == loop.epoch_rows:
            return
        loop.epoch_rows = first_rows, rows
        before, steps = parts.lr_schedule.schedule.total_steps, lay_out(first_rows, rows)
        if steps != before:
            text = f"Epoch {epoch} had {sequences} sequences: the learning-rate schedule now has {steps} steps"
            logger.event("INFO", f"{text} instead of {before}.")
            log_rank_schedule(logger)

    if loop.epoch_rows is not None:
        lay_out(*loop.epoch_rows)
    loader.on_epoch_end = at_epoch_end


def _data(
    data: TextData | PuzzlePlan, run_dir: RunDir, world: World, link: WorkerLink
) -> tuple[SampleSet | TextStream, SampleSet | None]:
    """The training data and the held-out data."""
    if isinstance(data, PuzzlePlan):
        return open_puzzle_sets(data)
    text, folder = data.text, TextDataDir(run_dir.data)
    source = (
        link.batches(lambda writes: _pipeline(text, run_dir, writes=writes and world.leads), text.epoch_order)
        if text.chunking_config.streaming
        else LocalBatches(InMemoryChunks(_pipeline(text, run_dir, writes=False), text.epoch_order))
    )
    held_out = TextSamples(folder.read_evaluation(text.evaluation), text.form) if text.evaluation else None
    return TextStream(source, text.form, TextTokenizer.of_bundle(run_dir.root).pad_id, text.shuffle_rows), held_out


def _pipeline(text: TextPlan, run_dir: RunDir, *, writes: bool) -> ChunkPipeline:
    return TextDataDir(run_dir.data).pipeline(
        text.chunking_config,
        text.source,
        TextTokenizer.of_bundle(run_dir.root),
        pairs=text.form.prefix,
        writes=writes,
    )


def _trained_before(plan: RunPlan, run_dir: RunDir, loop: TrainingLoop) -> list[ConsumedRange] | None:
    """All that a run on text was trained on up to the checkpoint that it resumes from, where its ledger is lost
    (--new-ledger); None where it is not. A collective: rank 0 reads the data again.

    The other ranks hear of it every few seconds, because a process group limits how long a rank waits.
    """
    world, loader = loop.world, loop.parts.loader
    if plan.checkpoint is None or isinstance(plan.data, PuzzlePlan) or not isinstance(loader, StreamLoader):
        return None
    if world.from_leader(lambda: run_dir.has_ledger):
        return None
    text = plan.data.text
    reading = loader.ranges_before(LocalChunks(_pipeline(text, run_dir, writes=False), text.epoch_order))
    ranges: list[ConsumedRange] = []

    def read_on() -> bool:
        answer_s = time.monotonic() + ANSWER_EVERY_S
        for taken in reading:
            append_ranges(ranges, taken)
            loop.activity.progressed()
            if time.monotonic() >= answer_s:
                return True
        return False

    with closing(reading):
        while world.from_leader(read_on):
            pass
    return ranges


def _ledger_writer(
    plan: RunPlan,
    run_dir: RunDir,
    resumed_step: int | None,
    extra: dict[str, Any],
    loop: TrainingLoop,
    trained_before: list[ConsumedRange] | None,
) -> LedgerWriter | None:
    """The ledger of a run on text, rolled back to the checkpoint that the run resumes from. Where it is lost, a new one
    (--new-ledger), whose first round is all that was trained up to that checkpoint (`trained_before`)."""
    if isinstance(plan.data, PuzzlePlan):
        return None
    resume_point = None
    if resumed_step is not None and plan.checkpoint is not None:
        trained = tuple(ConsumedRange(*item) for item in extra["trained"])
        resume_point = ResumePoint(resumed_step, file_sha256(plan.checkpoint / MANIFEST), trained)
    text, catalog = plan.data.text, Catalog(TextDataDir(run_dir.data).catalog, writes=False)
    shuffled = text.shuffle_rows > 0
    if resume_point is None or trained_before is None:
        return LedgerWriter(run_dir, catalog, text.start, resume_point, shuffled=shuffled)
    delete_ledger(run_dir.ledger)  # an empty one, or what is left beside it
    writer = LedgerWriter(run_dir, catalog, text.start, None, shuffled=shuffled)
    data_ended = isinstance(loop.parts.loader, StreamLoader) and loop.parts.loader.data_ended
    writer.commit(resume_point.step, trained_before, resume_point.checksum, data_ended=data_ended)
    return writer


def _close_ledger(ledger_writer: LedgerWriter, watch: FolderWatch) -> None:
    ledger_writer.close(exports=watch.fault() is None)


def run_sinks(plan: RunPlan, run_dir: RunDir, resumed_step: int | None, display: MetricSink) -> FanOut:
    """Where the records of a run are written, and shown on `display`.

    Those of a resumed run were cut at its step by `rewind_to`.
    """
    settings = plan.settings
    sinks: list[MetricSink] = [
        JsonlSink(run_dir.metrics),
        TensorBoardSink(run_dir.tensorboard, resumed_step),
        display,
    ]
    if settings.run.log_file is not None:
        sinks.append(JsonlSink(settings.run.log_file, shared=True))
    resumes, others = resumed_step is not None or plan.attempt > 0, FanOut(sinks)
    reports = report_sinks(
        settings.run.services,
        run_dir,
        to_dotted(settings),
        resumes=resumes,
        others=others,
        stop_by_s=plan.stop_by_s,
    )
    return FanOut([*sinks, *reports])
