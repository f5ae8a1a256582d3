"""The training loop of parallel-independent training, for trainers and for whoever evaluates or writes an anchor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hrm_ray.data.prepare import PuzzlePlan, open_puzzle_sets
from hrm_ray.data.text_data import TextDataDir
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.independent.bundle_files import BundleFiles, SentFiles, SharedFiles
from hrm_ray.independent.calls import Coordinator
from hrm_ray.independent.synchronous_start import is_synchronous
from hrm_ray.independent.trainer import BlockTrainer
from hrm_ray.independent.weights import load_fixed_tensors
from hrm_ray.log_filters import silence_unused_kernels
from hrm_ray.metrics.jsonl import JsonlSink
from hrm_ray.rundir import RunDir
from hrm_ray.train.assemble import assemble
from hrm_ray.train.claimed_rows import ClaimedPuzzles, ClaimedText
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.memory_limit import limit_memory
from hrm_ray.train.plan import RunPlan, effective_batch
from hrm_ray.train.world import World


def claimed_rows(plan: RunPlan) -> ClaimedText | ClaimedPuzzles:
    """The samples of a run's claimed ranges. Close it."""
    run_dir, seed = RunDir(plan.bundle), plan.settings.run.seed
    if isinstance(plan.data, PuzzlePlan):
        return ClaimedPuzzles(open_puzzle_sets(plan.data)[0], seed=seed, linear=plan.settings.data.linear_dataset)
    text, tokenizer = plan.data.text, TextTokenizer.of_bundle(run_dir.root)
    # Catalog and cache are written by the driver alone.
    pipeline = TextDataDir(run_dir.data).pipeline(
        text.chunking_config, text.source, tokenizer, pairs=text.form.prefix, writes=False
    )
    return ClaimedText(pipeline, text.form, tokenizer.pad_id, seed=seed, shuffle_rows=text.shuffle_rows)


def block_trainer(
    plan: RunPlan,
    name: str,
    number: int,
    coordinator: Coordinator,
    files: BundleFiles | None = None,
    rows: ClaimedText | ClaimedPuzzles | None = None,
) -> BlockTrainer:
    """A trainer on this process's device, with the files and rows of the plan's bundle unless others are given."""
    limit_memory(plan.settings.memory.budget_bytes, plan.device)  # of a process that does nothing else
    files = files or SharedFiles(RunDir(plan.bundle))
    files.fetch_state(name)
    folder = files.run_dir.independent.trainer(name)
    folder.mkdir(parents=True, exist_ok=True)
    loop = assemble_loop(_with_own_batch(plan, number), number, files=files, rows=rows)
    if isinstance(files, SentFiles):
        files.on_piece = loop.activity.progressed
    return BlockTrainer(
        name,
        loop,
        files.run_dir,
        coordinator,
        samples_per_update=samples_per_step(plan),
        log_every=plan.settings.run.log_every,
        sink=JsonlSink(RunDir(folder).metrics),
        files=files,
        begins_from=_synchronous_checkpoint(plan),
    )


def _with_own_batch(plan: RunPlan, number: int) -> RunPlan:
    """The plan with the batch size of one trainer; those beyond the list have the largest."""
    sizes = plan.settings.cluster.batch_size_of_trainers
    if number >= len(sizes):
        return plan
    optimizer = plan.settings.optimizer.model_copy(update={"batch_size": sizes[number]})
    return replace(plan, settings=plan.settings.model_copy(update={"optimizer": optimizer}))


def _synchronous_checkpoint(plan: RunPlan) -> Path | None:
    """The checkpoint of a strategy that the run goes on from, where this machine sees it."""
    checkpoint = plan.checkpoint
    if checkpoint is None or not checkpoint.is_dir():
        return None
    return checkpoint if is_synchronous(checkpoint) else None


def assemble_loop(
    plan: RunPlan,
    number: int = 0,
    *,
    starts: bool = False,
    files: BundleFiles | None = None,
    rows: ClaimedText | ClaimedPuzzles | None = None,
) -> TrainingLoop:
    """A loop on this process's device over claimed ranges; its loader is to be closed. `number` is that of the trainer:
    each draws its dropout from a seed of its own.

    With `starts` its weights are those that a new run begins with, --student-init too; without, whoever calls lays an
    anchor or a checkpoint in place. Tensors that are not trained come from the bundle, once they are there.
    """
    silence_unused_kernels()
    world = World.here(plan.device, plan.threads, keep_freed=plan.keep_freed_memory)
    run_dir = RunDir(plan.bundle)
    fixed = run_dir.independent.fixed
    if files is not None:
        fixed = files.fetch(fixed.relative_to(run_dir.root).as_posix())
    loop = assemble(
        plan.settings,
        plan.config,
        claimed_rows(plan) if rows is None else rows,
        world,
        plan.schedule_steps,
        resumes=not starts,
        adaptive_lr=plan.adaptive_lr,
    )
    loop.parts.seed += number
    if fixed.exists():
        load_fixed_tensors(loop, fixed)
    return loop


def samples_per_step(plan: RunPlan) -> float:
    """Samples after which a run is one step further, and so is the clock of its learning rate: those of one trainer's
    weight update. In carried supervision, where a row stays for several updates, the schedule counts with the most."""
    carried = plan.settings.model.supervision == "segment"
    return effective_batch(plan) / (plan.config.halt_max_steps if carried else 1)
