"""Going on with a strategy after independent trainers: what they reported is merged, and a checkpoint is written that a
strategy resumes from as from one of its own."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

from hrm_ray.bundle.folder_watch import FolderWatch
from hrm_ray.bundle.progress import STATE
from hrm_ray.data.prepare import PuzzlePlan
from hrm_ray.data.stream import StreamState
from hrm_ray.errors import DataError, Fault
from hrm_ray.independent.anchor_keeper import LoaderPlace
from hrm_ray.independent.claims import whole_catalog
from hrm_ray.independent.processes import Children
from hrm_ray.independent.synchronous_start import is_synchronous
from hrm_ray.launch.independent_run import IndependentRun
from hrm_ray.ledger import EpochRest, Ledger, TrainedRange, is_anchor, open_ledger, read_ledger, rest_of_epoch
from hrm_ray.rundir import MANIFEST, RunDir, read_json
from hrm_ray.train.claimed_rows import PUZZLES_PER_CHUNK
from hrm_ray.train.plan import RunPlan, effective_batch
from hrm_ray.types import MetricSink, StopPoll


def after_trainers(plan: RunPlan, launcher: str, *, sink: MetricSink, stop: StopPoll) -> RunPlan:
    """The plan of a run with a strategy, from a checkpoint that it can go on from.

    Where independent trainers trained before, their staged reports are merged and the checkpoint is written, in the
    plan's bundle. Raises HrmRayError, and StopRequested for a stop meanwhile.
    """
    checkpoint, run_dir = plan.checkpoint, RunDir(plan.bundle)
    if checkpoint is None or plan.settings.cluster.parallel_independent:
        return plan
    if not run_dir.has_ledger:
        if is_synchronous(checkpoint):
            return plan
        reason = "the ledger is missing, which alone says what independent trainers have trained"
        hint = "Restore it from a copy, or start a new run from the weights with --student-init"
        raise DataError(Fault(str(run_dir.ledger), reason, hint))
    step: int = read_json(checkpoint / STATE)["progress"]["step"]
    if is_synchronous(checkpoint) and not _has_newer_anchors(plan, step):
        dropped = _go_back(run_dir.ledger, step, isinstance(plan.data, PuzzlePlan))
        return replace(plan, remarks=(*plan.remarks, _told(dropped))) if dropped else plan
    merging = _merging_plan(plan, on_this_machine=launcher == "local")
    with ExitStack() as opened:
        watch = opened.enter_context(closing(FolderWatch(plan.bundle)))
        watch.take_generation()
        ledger = opened.enter_context(closing(open_ledger(run_dir.ledger)))
        workers = opened.enter_context(closing(Children(merging)))
        run = IndependentRun(merging, sink, stop, watch, ledger, workers, opened)
        goes_back = plan.settings.run.resume_from is not None
        staged = len(ledger.staged())
        anchor = run.merge_staged()
        place = _place(plan, ledger)
        source = RunDir(checkpoint.parent.parent)
        states = _states(source)
        if goes_back:
            # Those that were saved later know of samples that are not trained any more.
            states = [one for one in states if read_json(one / STATE)["progress"]["step"] <= anchor.round]
        taken_from = run.hand_over(anchor, place, states)
    moments = "there is no state of the optimizer that fits: it begins from zeros, at the scheduled learning rate"
    if taken_from is not None:
        from_trainer = taken_from.is_relative_to(source.independent.trainers)
        owner = taken_from.parent.parent.name if from_trainer else f"{taken_from}, before the trainers"
        moments = f"the state of the optimizer is that of {owner}"
    merged = f", {staged} staged report(s) merged," if staged and not goes_back else ""
    remarks = [f"after independent trainers{merged} from the anchor of step {anchor.round}; {moments}"]
    if staged and goes_back:
        remarks.append(_told(staged))
    return replace(plan, checkpoint=run_dir.checkpoint(anchor.round), continues=True, remarks=(*plan.remarks, *remarks))


def _told(dropped: int) -> str:
    return f"{dropped} staged report(s) of independent trainers are dropped, and what they had is trained again"


def _has_newer_anchors(plan: RunPlan, step: int) -> bool:
    """Whether trainers that went on from this checkpoint were killed before they wrote one, after an anchor or a
    report."""
    if plan.settings.run.resume_from is not None:
        return False
    with read_ledger(RunDir(plan.bundle).ledger) as ledger:
        head = ledger.head
        return bool(ledger.staged()) or (head is not None and is_anchor(head) and head.round > step)


def _go_back(path: Path, step: int, on_puzzles: bool) -> int:
    """Before a strategy goes on from a checkpoint of its own: drop what trainers have staged since, and of puzzles, of
    which a strategy keeps no ledger, the later rounds. Returns the number of staged reports."""
    with read_ledger(path) as reader:
        kept = next((one.round for one in reader.lineage() if one.round <= step), None)
        head = None if reader.head is None else reader.head.round
        if not reader.staged() and (not on_puzzles or kept == head):
            return 0  # nothing is written, for a run that is refused later
    with closing(open_ledger(path)) as ledger:
        dropped = ledger.drop_staged()
        if on_puzzles:
            ledger.rollback(kept)
        return dropped


def _merging_plan(plan: RunPlan, *, on_this_machine: bool) -> RunPlan:
    """The plan of a run without trainers, whose keeper has the run's effective batch."""
    chosen = plan.settings.optimizer
    accumulation = effective_batch(plan) // chosen.batch_size
    none = dict.fromkeys(("strategy", "world_size", "launcher", "min_workers", "max_workers"))
    update = {**none, "parallel_independent": True}
    settings = plan.settings.model_copy(
        update={
            "optimizer": chosen.model_copy(update={"gradient_accumulation_steps": accumulation}),
            "cluster": plan.settings.cluster.model_copy(update=update),
        }
    )
    # Behind Ray the workers' devices may be on other machines.
    device = plan.device if on_this_machine else "cpu"
    return replace(plan, settings=settings, world_size=0, device=device)


def _place(plan: RunPlan, ledger: Ledger) -> LoaderPlace:
    rest = rest_of_epoch(ledger)
    if isinstance(plan.data, PuzzlePlan):
        places = tuple((0, *_of_epoch_order(one)) for one in rest.trained)
        slots = effective_batch(plan) if plan.settings.model.supervision == "segment" else 1
        return LoaderPlace(rest.epoch, {"taken": [0] * slots}, places)
    text = plan.data.text
    start = text.start if rest.epoch == 0 else 0
    if start and text.epoch_order.shuffled and not ledger.complete(0):
        # The stream counts the chunks before the start in its positions, and the ledger does not.
        reason = "begins in the middle of the data, where positions of trainers are not those of a strategy"
        hint = "Go on with --parallel-independent to the end of the epoch, and change then"
        raise DataError(Fault(f"the shuffled epoch {rest.epoch}", reason, hint))
    state = asdict(StreamState(rest.position + start, 0, rest.sequences, *_left_out(plan, rest)))
    behind = tuple((one.chunk, one.start, one.end) for one in rest.trained if one.position >= rest.position)
    return LoaderPlace(rest.epoch, {name: [value] for name, value in state.items()}, behind)


def _of_epoch_order(one: TrainedRange) -> tuple[int, int]:
    first = one.chunk * PUZZLES_PER_CHUNK
    return first + one.start, first + one.end


def _left_out(plan: RunPlan, rest: EpochRest) -> tuple[int, int]:
    """Rows that were bad or left out in the chunks before the position."""
    entries = whole_catalog(plan, lambda message: None).entries
    before = {one.chunk for one in rest.trained if one.position < rest.position}
    return sum(entries[chunk].bad for chunk in before), sum(entries[chunk].left_out for chunk in before)


def _states(source: RunDir) -> list[Path]:
    """The checkpoints in which trainers have left the state of their optimizer, newest first."""
    folder = source.independent.trainers
    trainers = sorted(folder.iterdir()) if folder.is_dir() else []
    newest = [RunDir(trainer).newest_whole_checkpoint() for trainer in trainers]
    return sorted(
        (one for one in newest if one is not None), key=lambda one: (one / MANIFEST).stat().st_mtime, reverse=True
    )
