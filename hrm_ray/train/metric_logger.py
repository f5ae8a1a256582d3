"""Records of a run: the metrics of steps and evaluations, and messages for the user."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hrm_ray.metrics.meters import DeviceMemory, MemoryMeter, Throughput
from hrm_ray.train.loop import StepReport, TrainingLoop
from hrm_ray.types import MetricSink, Record, RecordKind


def accelerator_memory(device: torch.device) -> Callable[[], DeviceMemory] | None:
    """A function that reads the accelerator's memory; None on the CPU, where the process's own memory counts."""

    def cuda_or_xpu() -> DeviceMemory:
        backend = torch.cuda if device.type == "cuda" else torch.xpu
        return DeviceMemory(
            backend.memory_allocated(device), backend.max_memory_allocated(device), backend.memory_reserved(device)
        )

    def mps() -> DeviceMemory:
        # PyTorch keeps no peak for this device: the meter takes the largest value it has seen.
        allocated_bytes = torch.mps.current_allocated_memory()
        return DeviceMemory(allocated_bytes, allocated_bytes, torch.mps.driver_allocated_memory())

    return {"cuda": cuda_or_xpu, "xpu": cuda_or_xpu, "mps": mps}.get(device.type)


class MetricLogger:
    """Writes the records of one loop to `sink`, and after every step a progress record to `display`.

    Without a sink nothing is written. Means are summed over ranks, so every rank calls `train` at the same steps.
    """

    def __init__(self, loop: TrainingLoop, sink: MetricSink | None, display: MetricSink | None = None) -> None:
        self.loop = loop
        self.sink = sink
        self.display = display
        self._throughput = Throughput()
        self._memory = MemoryMeter(accelerator_memory(loop.world.device))
        self._unlogged: StepReport | None = None

    def write(self, kind: RecordKind, values: dict[str, Any]) -> None:
        if self.sink is not None:
            self.sink.write(Record(kind, self.loop.progress.step, time.time(), values))

    def event(self, level: str, message: str) -> None:
        """Write a message for the user."""
        self.write("event", {"level": level, "message": message})

    def sample(self, prompt: str, text: str) -> None:
        """Write a sample of text: how the model continues `prompt`."""
        self.write("event", {"level": "INFO", "message": f"sample: {prompt}{text}", "prompt": prompt, "sample": text})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as training."""
        self._throughput.pause()
        yield
        self._throughput.resume()

    def observe(self, report: StepReport) -> None:
        """Count a step, and write a message for each of its events that the user should know."""
        loop, step = self.loop, self.loop.progress.step
        per_segment = report.totals.get("tokens", report.totals["rows"])
        self._throughput.add(round(per_segment / loop.parts.objective.segments_per_step))
        compiled = loop.parts.compiled
        for note in (*loop.parts.loader.take_notes(), *(compiled.take_notes() if compiled is not None else ())):
            self.event("WARNING", note)
        size = report.new_batch_size
        if size is not None:
            self.event(
                "WARNING",
                f"Out of memory at step {step}: continuing with micro-batches of {size.batch_size}, "
                f"{size.accumulation} accumulated; the effective batch stays {size.effective}.",
            )
        if report.adapted is not None and report.adapted.kind != "hold":
            level, done = ("INFO", "lowered") if report.adapted.kind == "lower" else ("WARNING", "stepped back")
            self.event(level, f"Learning rate {done} at step {step}: {report.adapted.reason}.")
        if self.display is not None:
            self.display.write(Record("progress", step, time.time(), self._progress()))
        if report.applied:
            self._unlogged = report
            return
        scaler, in_a_row = loop.parts.scaler, loop.progress.bad_steps
        if scaler is not None and in_a_row == 0:
            reason = f"float16 gradients overflowed; the loss scale is now {scaler.scale:g}"
        else:
            reason = f"gradient norm {report.norm} ({in_a_row} in a row)"
        self.event("WARNING", f"step skipped: {reason}")

    def _progress(self) -> dict[str, Any]:
        """The values of a progress record: only what is known without waiting for the device."""
        loader = self.loop.parts.loader
        values: dict[str, Any] = {"epoch": loader.epoch}
        if loader.stop_condition.epochs is not None:
            values["total_steps"] = self.loop.parts.lr_schedule.schedule.total_steps
        return values

    def train(self, check: Callable[[], None] = lambda: None) -> None:
        """Write the means since the last record, if there was a step since; before that the leading rank calls `check`,
        and an error of it is raised on every rank. A collective."""
        report, self._unlogged = self._unlogged, None
        if report is None:
            return
        parts, progress = self.loop.parts, self.loop.progress
        values: dict[str, Any] = self.loop.flush_metrics(check) | {
            "lr": report.lr,
            "grad_norm": report.norm,
            "epoch": parts.loader.epoch,
            "batch_idx": progress.batch_idx,
            "skipped_steps": progress.skipped_steps,
            "world_size": parts.shape.size,
            "physical_batch_size": parts.shape.batch_size,
            "gradient_accumulation_steps": parts.shape.accumulation,
            "effective_batch_size": parts.shape.effective,
            **parts.loader.counts(),
            **self._memory.read(),
        }
        if progress.skipped_samples:
            values["skipped_samples"] = progress.skipped_samples
        if parts.scaler is not None:
            values["loss_scale"] = parts.scaler.scale
        if parts.compiled is not None:
            values["compiled_graphs"] = parts.compiled.graphs
        rate = self._throughput.per_s()
        if rate is not None:
            values["tokens_per_s" if "tokens" in report.totals else "samples_per_s"] = rate
        self.write("train", values)
