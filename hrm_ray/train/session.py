"""What one worker does from start to end, whatever launcher started it.

One job: read the plan, put the parts together, restore a checkpoint if one is named, run, close. The driver has
prepared the bundle's folder and the data beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hrm_ray.data.catalog import Catalog
from hrm_ray.data.chunk_source import ChunkMaker, ChunkSource, EpochRule, HeldChunks
from hrm_ray.data.packing import TextSamples
from hrm_ray.data.prepare import open_puzzle_sets
from hrm_ray.data.stream import Trained
from hrm_ray.data.text_data import TextFolder, TextPlan
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import NO_ROOM, EnvironmentFault, Fault
from hrm_ray.library_messages import leave_out_unused_kernels
from hrm_ray.metrics.fanout import FanOut
from hrm_ray.metrics.jsonl import JsonlSink
from hrm_ray.metrics.tensorboard import TensorBoardSink
from hrm_ray.model.config import ModelConfig
from hrm_ray.rundir import MANIFEST, RunDir, file_sha256
from hrm_ray.settings.adaptive_lr import AdaptiveLrSettings
from hrm_ray.settings.tree import RunSettings, from_plain
from hrm_ray.train.accounts import ChunkAccounts, GoingOn
from hrm_ray.train.assemble import assemble
from hrm_ray.train.attention_choice import flash_notes
from hrm_ray.train.checkpoint import load_checkpoint
from hrm_ray.train.expert_run import ExpertRun
from hrm_ray.train.precision import slow_bfloat16
from hrm_ray.train.runner import Runner
from hrm_ray.train.stream_feed import TextStream
from hrm_ray.train.take_up import go_back, write_description
from hrm_ray.train.weights_file import unwritable
from hrm_ray.train.world import World
from hrm_ray.values import DriverLink, MetricSink, Outcome, SampleSet


class WorkerLink(DriverLink, Protocol):
    """What the launcher gives a worker: the driver, and where chunks of text come from."""

    def chunks(self, maker: Callable[[bool], ChunkMaker], rule: EpochRule) -> ChunkSource:
        """Where this worker's chunks come from, in the order of `rule`.

        `maker` opens what makes them in this process; it is told whether catalog and cache are written here.
        """


def train(plan: dict[str, Any], link: WorkerLink) -> Outcome:
    """Run this worker's share of the plan; the process group, if there is to be one, already exists.

    `plan` is what launch/plan.py wrote: JSON values only.
    """
    try:
        return _train(plan, link)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise unwritable(Path(error.filename or plan["bundle"]), error) from error


def _train(plan: dict[str, Any], link: WorkerLink) -> Outcome:
    leave_out_unused_kernels()
    settings = from_plain(plan["settings"])
    config = ModelConfig.from_plain(plan["model_config"], "the launch plan")
    run_dir = RunDir(Path(plan["bundle"]))
    world = World.here(plan["device"], plan["threads"], keep_freed=plan["keep_freed_memory"])
    if not run_dir.root.is_dir():
        reason = f"rank {world.rank} does not see the bundle that the driver made"
        mend = "Give --bundle-dir a folder that all nodes of the cluster share"
        raise EnvironmentFault(Fault(str(run_dir.root), reason, mend))
    data, held_out = _data(plan["data"], run_dir, world, link)
    stop_poll = link.stop_requested if world.leads else lambda: None
    workplace = assemble(
        settings,
        config,
        data,
        held_out,
        world,
        plan["schedule_steps"],
        stop_poll,
        resumes=plan["resume"] is not None,
        adaptive_lr=None if plan["adaptive_lr"] is None else AdaptiveLrSettings(**plan["adaptive_lr"]),
    )
    resumed_step: int | None = None
    extra: dict[str, Any] = {}
    if plan["resume"] is not None:
        extra = load_checkpoint(workplace.loop, Path(plan["resume"]))
        if settings.data.force_train:
            workplace.loop.parts.feed.one_epoch_more()
        resumed_step = workplace.loop.progress.step
        # Every rank has the checkpoint: only now is the bundle taken back to it.
        world.barrier()
        if world.leads and plan["continues"]:
            write_description(run_dir, plan)
            go_back(run_dir, resumed_step, settings.run.log_file)
    sink = _sinks(settings, run_dir, resumed_step, link) if world.leads else FanOut([])
    try:
        expert = ExpertRun(**extra["expert"]) if extra.get("expert") else ExpertRun.begun(settings)
        accounts = _accounts(plan, run_dir, resumed_step, extra) if world.leads else None
        runner = Runner(settings, workplace, run_dir, sink, expert, accounts)
        # On a running cluster the driver's machine says nothing of the workers'.
        own = flash_notes(settings, config, world.device) if plan["ray_address"] else []
        for note in (*plan["notes"], *own):
            runner.tell("WARNING", note)
        for remark in plan["remarks"]:
            runner.tell("INFO", remark)
        if workplace.loop.parts.strategy.precision.autocast is not None and slow_bfloat16(world.device):
            runner.tell("INFO", "This CPU has no 16-bit units: --amp saves memory and costs time, --no-amp is faster.")
        if plan["resume"] is not None:
            runner.resume(extra)
            runner.tell("INFO", f"going on from {plan['resume']}")
            _tell_of_ranks(runner, plan["schedule_steps"])
        try:
            return runner.run()
        finally:
            if accounts is not None:
                accounts.close()
    finally:
        workplace.loop.parts.feed.close()
        sink.close()


def _data(
    plan: dict[str, Any], run_dir: RunDir, world: World, link: WorkerLink
) -> tuple[SampleSet | TextStream, SampleSet | None]:
    """What is trained on, and what is held out."""
    if plan["task"] == "puzzle":
        return open_puzzle_sets(plan)
    text, folder = TextPlan.from_plain(plan), TextFolder(run_dir.data)
    tokenizer = TextTokenizer.load(run_dir.root)

    def maker(writes: bool) -> ChunkMaker:
        return folder.maker(text.cut, text.source, tokenizer, pairs=text.form.prefix, writes=writes and world.leads)

    source = link.chunks(maker, text.rule) if text.cut.streaming else HeldChunks(maker(False), text.rule)
    held_out = TextSamples(folder.read_evaluation(text.evaluation), text.form) if text.evaluation else None
    return TextStream(source, text.form, tokenizer.pad_id, text.shuffle_rows), held_out


def _accounts(
    plan: dict[str, Any], run_dir: RunDir, resumed_step: int | None, extra: dict[str, Any]
) -> ChunkAccounts | None:
    """The ledger of a run on text, gone back to the checkpoint that the run goes on from."""
    if plan["data"]["task"] == "puzzle":
        return None
    text = TextPlan.from_plain(plan["data"])
    going_on = None
    if resumed_step is not None:
        trained = tuple(Trained(*item) for item in extra["trained"])
        going_on = GoingOn(resumed_step, file_sha256(Path(plan["resume"]) / MANIFEST), trained)
    return ChunkAccounts(run_dir, Catalog(TextFolder(run_dir.data).catalog, writes=False), text.start, going_on)


def _tell_of_ranks(runner: Runner, schedule_steps: int) -> None:
    """AdaLoRA's ranks keep the plan that they began with, whereas the learning rate follows the new --steps."""
    adapters = runner.loop.parts.adapters
    if adapters is None or adapters.ranks is None or adapters.ranks.plan.total_steps == schedule_steps:
        return
    planned = adapters.ranks.plan
    runner.tell(
        "WARNING",
        f"AdaLoRA's ranks keep the schedule of {planned.total_steps} steps that the run began with (the last go at "
        f"step {planned.total_steps - planned.final_steps}), though the run has {schedule_steps} steps now.",
    )


def _sinks(settings: RunSettings, run_dir: RunDir, resumed_step: int | None, link: WorkerLink) -> MetricSink:
    """The leading rank's sinks; the plan has already cut the old records of a resumed run at its step."""
    sinks: list[MetricSink] = [
        JsonlSink(run_dir.metrics),
        TensorBoardSink(run_dir.tensorboard, resumed_step),
        link.sink(),
    ]
    if settings.run.log_file is not None:
        sinks.append(JsonlSink(settings.run.log_file))
    return FanOut(sinks)
