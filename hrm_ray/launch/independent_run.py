"""A run of independent trainers, whatever starts them: from its start or resume to its end.

This process owns the ledger and the files of the run. Between two looks at the trainers it has the rounds merged that
are due. `run` is the launcher whose trainers, and the keeper of anchors, are processes on this machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from hrm_ray.bundle.folder_watch import FolderWatch
from hrm_ray.bundle.progress import STATE
from hrm_ray.data.prepare import PuzzlePlan
from hrm_ray.errors import DataError, DivergedError, Fault, HrmRayError
from hrm_ray.independent.anchor_files import (
    remove_old_anchors,
    remove_reports,
    remove_states,
    remove_unreported,
    whole_anchor,
)
from hrm_ray.independent.anchor_keeper import Evaluated, LoaderPlace, Written
from hrm_ray.independent.assembly import samples_per_step
from hrm_ray.independent.calls import AnchorRef
from hrm_ray.independent.claims import DataOrder, prepare_claims
from hrm_ray.independent.coordinator import LedgerCoordinator, Merged, MergeRequest, Rules
from hrm_ray.independent.decisions import MergeEvery
from hrm_ray.independent.processes import Children
from hrm_ray.independent.synchronous_start import check_position, enter_puzzles, is_synchronous
from hrm_ray.independent.wire import Disconnected
from hrm_ray.independent.workers import Workers
from hrm_ray.launch.trainer_watch import TrainerWatch
from hrm_ray.ledger import Ledger, Refused, open_ledger
from hrm_ray.ledger.export import export
from hrm_ray.metrics.fanout import FanOut
from hrm_ray.rundir import RunDir, read_json
from hrm_ray.train.plan import RunPlan, effective_batch, rewind_to
from hrm_ray.train.session import run_sinks
from hrm_ray.types import MetricSink, Record, RestartRecord, RunResult, StopPoll, StopReason, StopRequested

LOOK_EVERY_S = 0.05
"""Seconds between two looks at the processes."""
PROGRESS_EVERY_S = 1.0
"""Seconds between two records for the display."""
RENEW_EVERY_S = 1.0
"""Seconds between two renewals of a trainer: so long a stop may take to reach it between its other calls."""
LEAVE_S = 60.0
"""Seconds that trainers have to report and leave once the run ends."""
KEEPER = "anchors"


def run(plan: RunPlan, *, sink: MetricSink, stop: StopPoll) -> RunResult:
    """Train with independent trainers in processes of this machine. Raises HrmRayError, and StopRequested for a stop
    before the first merge."""
    return run_with(Children, plan, sink=sink, stop=stop)


def run_with(
    start: Callable[[RunPlan], Workers],
    plan: RunPlan,
    *,
    sink: MetricSink,
    stop: StopPoll,
    begun: Callable[[], None] = lambda: None,
) -> RunResult:
    """Train with the trainers that `start` gives; `begun` is called when the files of the run are open. Raises as
    `run`."""
    with ExitStack() as opened:
        watch = opened.enter_context(closing(FolderWatch(plan.bundle)))
        watch.take_generation()
        ledger = opened.enter_context(closing(open_ledger(RunDir(plan.bundle).ledger)))
        workers = opened.enter_context(closing(start(plan)))
        return IndependentRun(plan, sink, stop, watch, ledger, workers, opened, begun).run()


class IndependentRun:
    """One run of independent trainers, from its start or resume to its end."""

    def __init__(
        self,
        plan: RunPlan,
        display: MetricSink,
        stop: StopPoll,
        watch: FolderWatch,
        ledger: Ledger,
        workers: Workers,
        opened: ExitStack,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan, self.display, self.stop, self.watch, self.ledger = plan, display, stop, watch, ledger
        self.workers, self.opened, self._begun = workers, opened, begun
        self.settings, self.run_dir = plan.settings, RunDir(plan.bundle)
        self.names = [f"trainer-{number}" for number in range(plan.world_size)]
        self.sink: MetricSink = display
        self._coordinator: LedgerCoordinator | None = None
        self._trainers: TrainerWatch | None = None
        self.evaluated: Evaluated | None = None
        self.saved_round: int | None = None
        self._shown_s = 0.0

    def run(self) -> RunResult:
        for number, name in enumerate(self.names):
            self.workers.start_trainer(name, number)
        order = self._order_of_claims()
        if self.plan.checkpoint is not None and is_synchronous(self.plan.checkpoint):
            check_position(self.plan, order)
            if isinstance(self.plan.data, PuzzlePlan):
                enter_puzzles(self.ledger, self.plan.checkpoint, self.plan.data.rows)
        anchor = self._begin(order)
        self._open_files(anchor)
        self._begun()
        self.workers.serve(self.coordinator)
        self._train()
        return self._end()

    def merge_staged(self) -> AnchorRef:
        """In place of `run`, without trainers: merge the reports that are staged. Gives the newest anchor."""
        self._begin(self._order_of_claims())
        if self.settings.run.resume_from is not None:
            self.ledger.drop_staged()
        self.coordinator.stop = StopReason.FINISHED
        while (request := self.coordinator.due()) is not None:
            self._merge(request)
        remove_unreported(self.run_dir, self.ledger)
        return self.coordinator.anchor

    def hand_over(self, anchor: AnchorRef, place: LoaderPlace, states: Sequence[Path]) -> Path | None:
        """Write the checkpoint that a strategy goes on from, as the keeper of anchors says."""
        self.watch.check()
        skipped = sum(self.ledger.skipped().values())
        taken_from: Path | None = self._keeper("hand_over", anchor, skipped, place, states)
        return taken_from

    def _order_of_claims(self) -> DataOrder:
        """The order of claims, with all blocks of the data in the ledger."""
        order, blocks = prepare_claims(self.plan, self._reading)
        self.ledger.add_blocks(blocks)
        if not self.ledger.data_ended:
            self.ledger.end_data()
        self.ledger.set_shuffled(order.shuffled)
        if order.start:
            self.ledger.start_at(order.start)
        return order

    def _begin(self, order: DataOrder) -> AnchorRef:
        """The anchor that the run begins with, known to the coordinator."""
        anchor = self._first_anchor()
        self._lead(
            LedgerCoordinator(self.ledger, anchor, self._rules(), order, time.monotonic, renew_every_s=RENEW_EVERY_S)
        )
        return anchor

    def _lead(self, coordinator: LedgerCoordinator) -> None:
        self._coordinator = coordinator
        self._trainers = TrainerWatch(self.plan, self.workers, coordinator, self._write)

    @property
    def coordinator(self) -> LedgerCoordinator:
        if self._coordinator is None:
            raise RuntimeError("the run has no anchor yet")
        return self._coordinator

    @property
    def trainers(self) -> TrainerWatch:
        if self._trainers is None:
            raise RuntimeError("the run has no anchor yet")
        return self._trainers

    def _rules(self) -> Rules:
        cluster, run = self.settings.cluster, self.settings.run
        per_step = samples_per_step(self.plan)
        every: MergeEvery = "auto"
        if cluster.merge_every != "auto":
            every = "end" if cluster.merge_every == "end" else int(cluster.merge_every)
        epochs = run.epochs
        if run.stop_after_epoch:
            epochs = min(epochs or self.ledger.epoch + 1, self.ledger.epoch + 1)
        return Rules(
            samples_per_update=effective_batch(self.plan),
            samples_per_step=per_step,
            merge_every=every,
            budget=None if run.step_limit is None else max(1, round(run.step_limit * per_step)),
            epochs=epochs,
            within_block=run.stop_after_block,
            whole_weights=cluster.outer_optimizer == "none" and self.plan.world_size == 1,
        )

    def _first_anchor(self) -> AnchorRef:
        """The anchor that the run begins with, or goes on from: that of the newest round whose file is whole, which may
        be later than the checkpoint."""
        checkpoint = self.plan.checkpoint
        if checkpoint is None:
            begun: Written = self._keeper("begin", None)
            return AnchorRef(0, begun.path, begun.sha256, 0)
        step: int = read_json(checkpoint / STATE)["progress"]["step"]
        if self.settings.run.resume_from is not None and not self.plan.attempt:
            self._roll_back(step)
        self._keeper("resume", checkpoint)
        for one in self.ledger.lineage():
            if whole_anchor(self.run_dir, one):
                self._roll_back(one.round)
                return AnchorRef(one.round, one.anchor, one.checksum, one.total_sequences)
            if one.round <= step:
                break
        self._roll_back(step)
        if is_synchronous(checkpoint):
            remove_states(self.run_dir)  # of trainers before the strategy: its optimizer state is newer
        head = self.ledger.head
        written: Written = self._keeper("begin", checkpoint)
        return AnchorRef(step, written.path, written.sha256, 0 if head is None else head.total_sequences)

    def _roll_back(self, to: int) -> None:
        undone = self.ledger.rollback(to or None)  # the checkpoint of step 0 is before the first round
        if isinstance(undone, Refused):
            hint = "Resume from a checkpoint that is in the ledger, or train again under another --brain-name"
            raise DataError(Fault(str(self.ledger.path), undone.reason, hint))

    def _open_files(self, anchor: AnchorRef) -> None:
        plan, resumed = self.plan, self.plan.checkpoint is not None
        if resumed and plan.continues:
            rewind_to(self.run_dir, plan, anchor.round)
        sinks: FanOut = run_sinks(plan, self.run_dir, anchor.round if resumed else None, self.display)
        self.opened.push(lambda kind, error, trace: sinks.close(run_failed=error is not None))
        self.sink = sinks
        remove_old_anchors(self.run_dir, self.ledger, anchor)
        remove_unreported(self.run_dir, self.ledger)
        for note in plan.notes:
            self._event("WARNING", note)
        for remark in plan.remarks:
            self._event("INFO", remark)
        if plan.ended:
            self._write_restart(anchor)
        if resumed:
            self._event("INFO", f"resumed from {plan.checkpoint}: round {anchor.round} is the newest anchor")

    def _write_restart(self, anchor: AnchorRef) -> None:
        """The process of this run was lost, and another goes on in its place."""
        number, ended = len(self.plan.ended), self.plan.ended[-1]
        restart = RestartRecord(number, ended.cause, ended.step, anchor.round, 0.0)
        message = f"restart {number} after {ended.message}; it goes on from round {anchor.round}"
        self._write("event", {"level": "WARNING", "message": message, **restart.values()})

    def _train(self) -> None:
        """Until everything is merged, or the run was asked to stop and the trainers have left."""
        ends_s: float | None = None
        while True:
            self._look()
            request = self.coordinator.due()
            if request is not None:
                self._merge(request)
                continue
            ending = self.coordinator.stop is not None or self.coordinator.finished
            if ending:
                ends_s = time.monotonic() + LEAVE_S if ends_s is None else ends_s
                for child in [child for child in self.workers.trainers.values() if not child.placed]:
                    self.workers.end(child)  # it has nothing to report
                if not self.workers.trainers:
                    return
                if time.monotonic() >= ends_s:
                    for child in list(self.workers.trainers.values()):
                        self._event("WARNING", f"{child.name} did not leave for {LEAVE_S:.0f} s and is ended")
                        self.workers.end(child)
                        self.coordinator.lost(child.name, "it did not leave")
            elif not self.workers.trainers:
                self.trainers.end_without_trainers()
                continue
            threading.Event().wait(LOOK_EVERY_S)

    def _look(self) -> None:
        """See to processes that have ended, expired leases, a requested stop, and the display."""
        if self.coordinator.stop is None:
            reason = self.stop()
            if reason is not None:
                self.coordinator.stop = reason
        self.trainers.look()
        now_s = time.monotonic()
        if now_s >= self._shown_s + PROGRESS_EVERY_S:
            self._shown_s = now_s
            self._show_progress()

    def _merge(self, request: MergeRequest) -> None:
        try:
            merged: Merged = self._keeper("merge", request)
        except HrmRayError:
            self.coordinator.abandon()
            raise
        reports = [self.coordinator.reported(one.name) for one in request.members]
        trainers = {one.name: one.worker for one in request.members}
        if self.saved_round is None and self.plan.checkpoint is None:
            self._save()  # before the first round, so that a run that is killed from now on can be resumed
        self.watch.check()
        made = self.coordinator.commit(request, merged)
        for warning in merged.warnings:
            self._event("WARNING", warning)
        for name, reason in {**merged.rejected, **merged.lost}.items():
            self._event("WARNING", f"a report of {trainers[name]} is not merged, and its samples go back: {reason}")
        remove_reports(self.run_dir, [one.name for one in request.members])
        self.trainers.judge(merged, trainers)
        if made is None:
            return
        taken = [one for one in reports if one is not None and one.name in merged.accepted]
        values: dict[str, Any] = {
            "epoch": self.ledger.epoch,
            "reports": len(merged.accepted),
            "rejected_reports": len(merged.rejected),
            "lost_reports": len(merged.lost),
            "merge_s": round(merged.seconds, 4),
            "merge_every": self.coordinator.report_updates,
            "trained_samples": made.total_sequences,
            **merged.figures,
        }
        samples = {one.name: one.sequences for one in request.members}
        total = sum(samples[one.name] for one in taken)
        if total:
            values["loss"] = sum(one.loss * samples[one.name] for one in taken) / total
        speeds = []
        for one in taken:
            if one.seconds > 0:
                speeds.append(samples[one.name] / one.seconds)
                values[f"{one.trainer}/samples_per_s"] = round(speeds[-1], 3)
                values[f"{one.trainer}/loss"] = one.loss
        for name, state in list(self.coordinator.trainers.items()):
            values[f"{name}/rejected_reports"] = state.rejections
        if speeds:
            # A trainer with several reports in this round counts once.
            values["samples_per_s"] = round(sum(speeds) * len({one.trainer for one in taken}) / len(speeds), 3)
        values["trainers"] = len(self.coordinator.trainers)
        self._write("train", values)
        self._after_round(request, made.round)
        remove_old_anchors(self.run_dir, self.ledger, self.coordinator.anchor)

    def _after_round(self, request: MergeRequest, step: int) -> None:
        """The evaluation and the checkpoint that became due in a round."""
        run, before = self.settings.run, request.parent.round
        if run.eval_every and step // run.eval_every > before // run.eval_every:
            self._evaluate()
        if run.save_every and step // run.save_every > before // run.save_every:
            self._save()

    def _evaluate(self) -> None:
        found: Evaluated | None = self._keeper("evaluate", self.coordinator.anchor)
        if found is not None:
            self.evaluated = found
            self._write("eval", {**found.figures, "best": found.improved})
        text: str | None = self._keeper("sample", self.coordinator.anchor)
        prompt = self.settings.run.sample_prompt
        if text is not None and prompt is not None:
            message = f"sample: {prompt}{text}"
            self._write("event", {"level": "INFO", "message": message, "prompt": prompt, "sample": text})

    def _save(self) -> None:
        self.watch.check()
        self._keeper("save", self.coordinator.anchor, sum(self.ledger.skipped().values()))
        self.saved_round = self.coordinator.anchor.round

    def _end(self) -> RunResult:
        coordinator = self.coordinator
        reason = StopReason.FINISHED if coordinator.finished else coordinator.stop or StopReason.FINISHED
        anchor, fatal = coordinator.anchor, self.trainers.fatal
        if fatal is not None and not anchor.total_sequences:
            raise fatal
        if not anchor.total_sequences and coordinator.finished:
            skipped, aside = sum(self.ledger.skipped().values()), sum(o.sequences for o in self.ledger.quarantined())
            told = f"none of its samples was learned: {skipped} of skipped updates, {aside} that failed too often"
            hint = "`hrm-ray ledger` names them; a lower --lr avoids updates that are not finite"
            raise DivergedError(Fault(str(self.run_dir.root), told, hint))
        if not anchor.total_sequences:
            raise StopRequested(reason)
        if reason is StopReason.FINISHED and fatal is None:
            self._evaluate()
        self._save()
        aside = sum(one.sequences for one in self.ledger.quarantined())
        if aside:
            self._event("WARNING", f"{aside} samples failed too often and were left out; `hrm-ray ledger` names them")
        if fatal is not None:
            hint = f"step {anchor.round} is saved, --resume continues from it"
            faults = [replace(each, hint=f"{each.hint}; {hint}" if each.hint else hint) for each in fatal.faults]
            ended = type(fatal)(faults)
            ended.detail = fatal.detail
            raise ended
        epoch = self.ledger.epoch
        self._keeper("finish", anchor, reason, epoch)
        export(self.ledger, self.run_dir.chunk_tracker)
        found = self.evaluated
        figures, best = (found.figures, found.best or {}) if found is not None else ({}, {})
        return RunResult(
            reason, anchor.round, epoch, str(self.run_dir.root), figures, best, anchor.total_sequences,
            tuple(self.trainers.restarts),
        )  # fmt: skip

    def _keeper(self, name: str, *arguments: Any) -> Any:
        """A call of the keeper of anchors, which is started where it is not there, and again where it dies."""
        failures = 0
        while True:
            try:
                newest = self.run_dir.newest_whole_checkpoint() if failures and name != "resume" else None
                if newest is not None:
                    # The checkpoint may be older than the last evaluation.
                    best = None if self.evaluated is None else self.evaluated.best
                    self.workers.call_keeper(KEEPER, "resume", (newest, best), self._meanwhile)
                return self.workers.call_keeper(KEEPER, name, arguments, self._meanwhile)
            except Disconnected as gone:
                failures += 1
                told = str(gone) or "has ended"
                if failures > self.settings.cluster.max_failures:
                    hint = "See whether the machine's memory suffices, then use --resume"
                    fault = Fault(
                        "the process that merges", f"{told}, and was lost {failures} times during `{name}`", hint
                    )
                    raise HrmRayError(fault) from None
                self._event("WARNING", f"the process that merges {told}, and is started again")

    def _meanwhile(self) -> None:
        """While the keeper works, the trainers are looked after."""
        if self._coordinator is not None:
            self._look()
        else:
            reason = self.stop()
            if reason is not None:
                raise StopRequested(reason)

    def _reading(self, message: str) -> None:
        reason = self.stop()
        if reason is not None:
            raise StopRequested(reason)
        if message:
            self._event("INFO", message)

    def _show_progress(self) -> None:
        coordinator = self.coordinator
        shown = []
        open_samples = sum(one.sequences for one in self.ledger.staged())
        for name, state in sorted(coordinator.trainers.items()):
            progress = state.progress
            if progress is not None:
                open_samples += progress.open_samples
                chunk = "waits" if progress.chunk is None else f"chunk {progress.chunk}"
                rejected = f", {state.rejections} rejected" if state.rejections else ""
                shown.append(f"{name}: {chunk}, {progress.samples_per_s:.3g}/s{rejected}")
        # The steps that are trained, though not merged yet.
        step = coordinator.anchor.round + int(open_samples / samples_per_step(self.plan))
        values: dict[str, Any] = {"epoch": self.ledger.epoch, "trainers_now": "; ".join(shown)}
        self.display.write(Record("progress", step, time.time(), values))

    def _event(self, level: str, message: str) -> None:
        self._write("event", {"level": level, "message": message})

    def _write(self, kind: Any, values: dict[str, Any]) -> None:
        step = 0 if self._coordinator is None else self._coordinator.anchor.round
        self.sink.write(Record(kind, step, time.time(), values))
