"""A whole run on one worker: steps, and between them logging, evaluation, checkpoints and the end.

One job: what happens when. The step itself is the loop's; files are named by RunDir.
"""

from __future__ import annotations

import time
from dataclasses import astuple, replace
from typing import Any

from hrm_ray.bundle.store import BundleWeights, save_best, save_final, step_of_best
from hrm_ray.data.stream import ConsumedRange
from hrm_ray.errors import DataError
from hrm_ray.metrics.meters import MemoryMeter, Throughput
from hrm_ray.rundir import RunDir
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.adaptive_lr import Action
from hrm_ray.train.assemble import TrainerComponents
from hrm_ray.train.checkpoint import save_checkpoint
from hrm_ray.train.device_memory import accelerator_memory
from hrm_ray.train.evaluate import better, evaluate
from hrm_ray.train.expert_run import ExpertRun
from hrm_ray.train.ledger_writer import LedgerWriter
from hrm_ray.train.loaders import BatchSize
from hrm_ray.train.loop import StepReport
from hrm_ray.types import MetricSink, Record, RunResult, StopReason


class Trainer:
    """Drives a loop to its end. Every rank runs one; the leading rank's sink writes the records."""

    def __init__(
        self,
        settings: RunSettings,
        components: TrainerComponents,
        run_dir: RunDir,
        sink: MetricSink,
        expert: ExpertRun | None = None,
        ledger_writer: LedgerWriter | None = None,
    ) -> None:
        """`ledger_writer` is the leading rank's ledger, where there is one."""
        self.settings = settings
        self.ledger_writer = ledger_writer
        self.expert = expert
        self.loop = components.loop
        self.held_out = components.held_out
        rows = self.loop.parts.shape.batch_size
        if self.held_out is not None and rows < self.held_out.batch_size and self.held_out.batch_size % rows == 0:
            # The checkpoint's micro-batches had become smaller for lack of memory.
            self.held_out = self.held_out.with_batch(rows)
        self.run_dir = run_dir
        self.sink = sink
        self.best: dict[str, Any] | None = None
        self.figures: dict[str, float] = {}
        self._throughput = Throughput()
        self._memory = MemoryMeter(accelerator_memory(self.loop.world.device))
        self._evaluated_at = -1
        self._saved_at = -1
        data = settings.data
        # Figures on other samples cannot be compared.
        count = self.held_out.count if self.held_out is not None else 0
        self._evaluated_on = [str(data.eval_file), data.val_split, count]
        self._last_report: StepReport | None = None
        self.resumed = False
        self._trained: list[ConsumedRange] = []
        """Taken from the loader and not yet in a whole checkpoint."""

    def resume(self, extra: dict[str, Any]) -> None:
        """Take up the runner's own state of a checkpoint.

        The best so far counts only while best/ holds its weights. After going back behind a better one, or into
        another bundle, the next evaluation is the best again, so that best/ and what is said of it agree. On other
        held-out data than before nothing has been evaluated yet.
        """
        self.resumed = True
        self._saved_at = self.loop.progress.step
        if extra["evaluated_on"] != self._evaluated_on:
            if self.expert is not None:
                self.expert.before = None
            return
        best = extra["best"]
        self.best = best if best is not None and step_of_best(self.run_dir) == best["step"] else None
        self.figures = extra["figures"]
        self._evaluated_at = extra["evaluated_at"]

    def log_event(self, level: str, message: str) -> None:
        """Put a sentence for a person into the records."""
        self._write("event", {"level": level, "message": message})

    def run(self) -> RunResult:
        """Train until steps or epochs are done or a stop is asked for; leaves a checkpoint and the final bundle."""
        limit = self.settings.run.step_limit
        reason = StopReason.FINISHED
        if self.expert is not None and self.loop.progress.step == 0:
            self._evaluate()
            self.expert.before = self.figures or None
        while limit is None or self.loop.progress.step < limit:
            report = self._step()
            if report is None:
                break
            self._after(report)
            if report.stop is not None:
                reason = report.stop
                break
        if self.resumed and not self.loop.trained and (limit is None or self.loop.progress.step < limit):
            self.log_event("WARNING", "Nothing was trained: all epochs of the run are over. Give more --epochs.")
        return self._end(reason)

    def _step(self) -> StepReport | None:
        """One step; where the data ends it, what was trained before is saved first."""
        try:
            return self.loop.step()
        except DataError as error:
            step = self.loop.progress.step
            if not step or not self.loop.parts.loader.fails_alike:
                raise
            self._save()
            faults = [
                replace(fault, hint=f"{fault.hint}; step {step} is saved, --resume goes on from there")
                for fault in error.faults
            ]
            raise DataError(faults) from error

    def _after(self, report: StepReport) -> None:
        run, step = self.settings.run, self.loop.progress.step
        self._count(report)
        for note in self.loop.parts.loader.take_notes():
            self.log_event("WARNING", note)
        if report.new_batch_size is not None:
            self._log_new_batch_size(report.new_batch_size)
        if report.adapted is not None and report.adapted.kind != "hold":
            self._tell_of_rate(report.adapted)
        if not report.applied:
            self.log_event("WARNING", self._why_skipped(report))
            return
        self._last_report = report
        if step % run.log_every == 0 or step == 1:
            self._log(report)
        if run.eval_every and step % run.eval_every == 0:
            self._evaluate()
        # What is saved at the end comes after the last evaluation, whose figures belong into the checkpoint.
        if run.save_every and step % run.save_every == 0 and step != run.step_limit:
            self._save()

    def _log_new_batch_size(self, shape: BatchSize) -> None:
        if self.held_out is not None:
            self.held_out = self.held_out.with_batch(shape.batch_size)
        self.log_event(
            "WARNING",
            f"Out of memory at step {self.loop.progress.step}: from here on micro-batches of {shape.batch_size} with "
            f"{shape.accumulation} accumulated; the effective batch stays {shape.effective}.",
        )

    def _tell_of_rate(self, action: Action) -> None:
        level, done = ("INFO", "lowered") if action.kind == "lower" else ("WARNING", "stepped back")
        self.log_event(level, f"Learning rate {done} at step {self.loop.progress.step}: {action.reason}.")

    def _why_skipped(self, report: StepReport) -> str:
        scaler, in_a_row = self.loop.parts.scaler, self.loop.progress.bad_steps
        if scaler is not None and in_a_row == 0:
            return f"step skipped: float16 gradients overflowed; the loss scale is now {scaler.scale:g}"
        return f"step skipped: gradient norm {report.norm} ({in_a_row} in a row)"

    def _count(self, report: StepReport) -> None:
        per_segment = report.totals.get("tokens", report.totals["rows"])
        self._throughput.add(round(per_segment / self.loop.parts.objective.segments_per_step))

    def _log(self, report: StepReport) -> None:
        means = self.loop.flush_metrics()
        self._last_report = None
        shape, progress = self.loop.parts.shape, self.loop.progress
        rate = self._throughput.per_s()
        unit = "tokens_per_s" if "tokens" in report.totals else "samples_per_s"
        values: dict[str, Any] = means | {
            "lr": report.lr,
            "grad_norm": report.norm,
            "epoch": self.loop.parts.loader.epoch,
            "batch_idx": progress.batch_idx,
            "skipped_steps": progress.skipped_steps,
            "physical_batch_size": shape.batch_size,
            "gradient_accumulation_steps": shape.accumulation,
            "effective_batch_size": shape.effective,
            **self.loop.parts.loader.counts(),
            **self._memory.read(),
        }
        if self.loop.parts.scaler is not None:
            values["loss_scale"] = self.loop.parts.scaler.scale
        if rate is not None:
            values[unit] = rate
        self._write("train", values)

    def _evaluate(self) -> None:
        if self.held_out is None or self._evaluated_at == self.loop.progress.step:
            return
        self._throughput.pause()
        strategy = self.loop.parts.strategy
        with strategy.evaluating() as objective:
            with strategy.precision.computing(self.loop.world.device):
                self.figures = evaluate(objective, self.held_out, self.loop.world)
            improved = better(self.figures, self.best)
            if improved:
                weights = self._weights()
                self.best = {**self.figures, "step": self.loop.progress.step}
                if self.loop.world.leads:
                    save_best(self.run_dir, weights, self.best)
        self._evaluated_at = self.loop.progress.step
        self._saved_at = -1
        self._write("eval", dict(self.figures) | {"best": improved})
        self._throughput.resume()

    def _save(self) -> None:
        if self._saved_at == self.loop.progress.step:
            return
        self._throughput.pause()
        extra: dict[str, Any] = {"best": self.best, "figures": self.figures, "evaluated_at": self._evaluated_at}
        extra["evaluated_on"] = self._evaluated_on
        extra["expert"] = self.expert.plain() if self.expert is not None else None
        self._trained += self.loop.parts.loader.take_consumed()
        covered = self._trained
        if self.ledger_writer is not None:
            covered = self.ledger_writer.covered(self.loop.progress.step, covered)
        extra["trained"] = [astuple(item) for item in covered]
        save_checkpoint(
            self.loop, self.run_dir, extra, self.settings.run.keep, lambda checksum: self._enter(covered, checksum)
        )
        self._trained = []
        self._saved_at = self.loop.progress.step
        self._throughput.resume()

    def _enter(self, covered: list[ConsumedRange], checksum: str) -> None:
        """Enter what a checkpoint stands for into the ledger; on the leading rank."""
        if self.ledger_writer is not None:
            ended = self.loop.parts.loader.data_ended
            self.ledger_writer.commit(self.loop.progress.step, covered, checksum, data_ended=ended)

    def _end(self, reason: StopReason) -> RunResult:
        """The last checkpoint, and after a run that was not stopped the last evaluation and the final weights."""
        progress, epoch = self.loop.progress, self.loop.parts.loader.epoch
        if self._last_report is not None:
            # The steps since the last record, fewer than --log-every.
            self._log(self._last_report)
        if reason is StopReason.FINISHED:
            self._evaluate()
        self._save()
        with self.loop.parts.strategy.evaluating():
            weights = self._weights()
            if self.loop.world.leads:
                save_final(self.run_dir, weights, reason, progress, epoch, self.figures, self.best)
        if self.expert is not None and reason is StopReason.FINISHED and self.loop.world.leads:
            place = self.expert.store(self.settings, self.run_dir, progress.step, self.figures)
            self.log_event("INFO", f"the expert is stored in {place}")
        return RunResult(reason, progress.step, epoch, str(self.run_dir.root), self.figures)

    def _weights(self) -> BundleWeights:
        """What a bundle gets of the weights as they are now; a collective."""
        weights, adapters = self.loop.parts.strategy.full_weights(), self.loop.parts.adapters
        if adapters is None:
            return BundleWeights(weights)
        return BundleWeights(adapters.merged_weights(), adapters.in_file())

    def _write(self, kind: Any, values: dict[str, Any]) -> None:
        if self.loop.world.leads:
            self.sink.write(Record(kind, self.loop.progress.step, time.time(), values))
