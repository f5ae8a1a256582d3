"""A run on one worker: steps, and between them logging, evaluation and checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hrm_ray.bundle.folder_watch import FolderWatch
from hrm_ray.errors import DataError
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.checkpoint import Checkpointer
from hrm_ray.train.evaluator import Evaluator, Sampler
from hrm_ray.train.expert_run import ExpertRun
from hrm_ray.train.loop import WRITTEN, StepReport, TrainingLoop
from hrm_ray.train.metric_logger import MetricLogger
from hrm_ray.train.time_limit import TimeLimit
from hrm_ray.types import RunResult, StopReason, StopRequested


class Trainer:
    """Drives a loop to its end. Every rank of a group runs one.

    What is written, and where, depends on its components: the logger's sink, and the folders of evaluator and
    checkpointer.
    """

    def __init__(
        self,
        settings: RunSettings,
        loop: TrainingLoop,
        logger: MetricLogger,
        evaluator: Evaluator,
        checkpointer: Checkpointer,
        expert: ExpertRun | None = None,
        watch: FolderWatch | None = None,
        sampler: Sampler | None = None,
        time_limit: TimeLimit | None = None,
    ) -> None:
        """`watch` is on the bundle's folder: the run ends at the next record or save where that is gone. `time_limit`,
        which the loop polls, learns here how long things take."""
        self.settings = settings
        self.loop = loop
        self.logger = logger
        self.evaluator = evaluator
        self.checkpointer = checkpointer
        self.expert = expert
        self.watch = watch
        self.sampler = sampler
        self.time_limit = time_limit or TimeLimit(None)
        loop.written_poll = checkpointer.written
        self.resumed = False

    def resume(self, extra: dict[str, Any], *, restarted: bool) -> None:
        """Restore what `_save` put into the checkpoint that the loop was restored from. `restarted`: the run itself
        wrote the checkpoint, in an earlier attempt."""
        self.resumed = not restarted
        self.checkpointer.saved_step = self.loop.progress.step
        if not self.evaluator.load_state_dict(extra) and self.expert is not None:
            self.expert.before = None

    def run(self) -> RunResult:
        """Train until steps or epochs are done or a stop is requested; leaves a checkpoint and the final bundle."""
        limit, progress = self.settings.run.step_limit, self.loop.progress
        reason = StopReason.FINISHED
        if self.expert is not None and progress.step == 0:
            with self.loop.activity.doing("evaluation"):
                self._evaluate()
            self.expert.before = self.evaluator.figures or None
        while limit is None or progress.step < limit:
            try:
                report = self._step()
            except StopRequested as stopped:
                reason = stopped.reason
                break
            if report is None:
                break
            self._after(report)
            if report.stop is not None and self._ends_with(report):
                reason = report.stop
                break
        if (
            reason is StopReason.FINISHED
            and self.resumed
            and not self.loop.trained
            and (limit is None or progress.step < limit)
        ):
            self.logger.event("WARNING", "Nothing was trained: all epochs of the run are over. Give more --epochs.")
        return self._end(reason)

    def _ends_with(self, report: StepReport) -> bool:
        """Whether a run that was asked to stop ends with this step: for a resize only where it has just been saved."""
        saved = report.applied and self.checkpointer.saved_step == self.loop.progress.step
        return report.stop is not StopReason.RESIZE or saved or not self.settings.run.save_every

    def _step(self) -> StepReport | None:
        """One step; where the data cannot be read on, what was trained before is saved first."""
        run, step = self.settings.run, self.loop.progress.step
        evaluations = 0
        if run.eval_every:
            evaluations = sum(number % run.eval_every == 0 for number in (step + 1, step + 2))
        saves = int(run.save_every > 0 and (step + 1) % run.save_every == 0) + int(self.checkpointer.writing)
        self.time_limit.due = evaluations, saves
        activity = self.loop.activity
        activity.step = step + 1
        try:
            with (
                self.time_limit.measuring("step"),
                activity.doing("step" if self.loop.trained else "first step", then="records"),
            ):
                return self.loop.step()
        except DataError as error:
            step = self.loop.progress.step
            # Saving is a collective: only where every rank comes here.
            if not step or not self.loop.parts.loader.fails_alike:
                raise
            self._save()
            faults = [
                replace(fault, hint=f"{fault.hint}; step {step} is saved, --resume continues from it")
                for fault in error.faults
            ]
            raise type(error)(faults) from error

    def _after(self, report: StepReport) -> None:
        run, step = self.settings.run, self.loop.progress.step
        self.logger.observe(report)
        if report.totals[WRITTEN]:
            self._finish_save()
        if report.new_batch_size is not None:
            self.evaluator.limit_batch(report.new_batch_size.batch_size)
        if not report.applied:
            return
        if step % run.log_every == 0 or step == 1:
            self.logger.train(self._check_folder)
        if run.eval_every and step % run.eval_every == 0:
            self._evaluate_and_sample()
        # The last step is saved at the end, after the last evaluation, whose figures belong into the checkpoint.
        if run.save_every and step % run.save_every == 0 and step != run.step_limit:
            self._save(background=True)

    def _check_folder(self) -> None:
        if self.watch is not None:
            self.watch.check()

    def _evaluate_and_sample(self) -> None:
        # An evaluation may need memory that the copies take which are written.
        self._finish_save()
        with self.time_limit.measuring("evaluation"), self.loop.activity.doing("evaluation"):
            self._evaluate()
            self._sample()

    def _evaluate(self) -> None:
        # An improvement is written into best/.
        self.loop.world.from_leader(self._check_folder)
        with self.logger.paused():
            improved = self.evaluator.evaluate()
            if improved is not None:
                self.checkpointer.saved_step = None  # a checkpoint of this step lacks these figures
                self.logger.write("eval", {**self.evaluator.figures, "best": improved})

    def _sample(self) -> None:
        if self.sampler is None:
            return
        with self.logger.paused():
            text = self.sampler.sample()
        if text is not None:
            self.logger.sample(self.sampler.prompt, text)

    def _save(self, *, background: bool = False) -> None:
        """Save the current step; with `background` a thread may write the files while training goes on."""
        self._finish_save()
        self.loop.world.from_leader(self._check_folder)
        activity = self.loop.activity
        longest_s = activity.longest_s.get("checkpoint")
        with self.logger.paused(), activity.doing("checkpoint"):
            expert = self.expert.plain() if self.expert is not None else None
            self.checkpointer.save({**self.evaluator.state_dict(), "expert": expert}, background=background)
        if self.checkpointer.writing:
            # How long the copy took does not tell how long a wait for the writing may take.
            activity.lasted("checkpoint", longest_s)
        else:
            self.time_limit.measured("save", self.checkpointer.took_s)
        for note in self.checkpointer.take_notes():
            self.logger.event("INFO", note)

    def _finish_save(self) -> None:
        """Wait until the checkpoint is whole that is written in the background, if there is one."""
        if self.checkpointer.writing:
            activity = self.loop.activity
            with self.logger.paused(), activity.doing("checkpoint"):
                self.checkpointer.finish()
            took_s = self.checkpointer.took_s
            activity.lasted("checkpoint", max(activity.longest_s["checkpoint"], took_s))
            self.time_limit.measured("save", took_s)

    def _end(self, reason: StopReason) -> RunResult:
        """The last record and checkpoint; after a run that was not stopped, the last evaluation and the expert."""
        self.loop.activity.enter("ending")
        self.logger.train()
        skipped = self.loop.progress.skipped_samples
        if skipped:
            self.logger.event("INFO", f"{skipped} samples were read in skipped updates and not trained on.")
        if reason is StopReason.MAX_TIME:
            self.logger.event("INFO", f"--max-time {self.settings.run.max_time} is nearly over: the run saves and ends")
        if reason is StopReason.FINISHED:
            self._evaluate_and_sample()
        self._save()
        step, figures, run_dir = self.loop.progress.step, self.evaluator.figures, self.checkpointer.run_dir
        if reason is not StopReason.RESIZE:
            self.checkpointer.save_bundle(reason, figures, self.evaluator.best)
        expert = self.expert
        if expert is not None and reason is StopReason.FINISHED:
            folder = self.loop.world.from_leader(lambda: expert.store(self.settings, run_dir, step, figures))
            self.logger.event("INFO", f"the expert is stored in {folder}")
        best, samples = self.evaluator.best or {}, self.loop.progress.trained_samples
        return RunResult(reason, step, self.loop.parts.loader.epoch, str(run_dir.root), figures, best, samples)
