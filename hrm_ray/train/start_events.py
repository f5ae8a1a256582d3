"""What a worker reports when training starts: notes on the settings, restarts and changes of the number of workers."""

from __future__ import annotations

import time
from dataclasses import replace

from hrm_ray.bundle.progress import STATE
from hrm_ray.metrics.jsonl import read_records
from hrm_ray.model.transforms.compile import compile_notes
from hrm_ray.rundir import RunDir
from hrm_ray.train.attention_choice import flash_notes
from hrm_ray.train.metric_logger import MetricLogger
from hrm_ray.train.plan import RunPlan
from hrm_ray.train.precision import slow_bfloat16
from hrm_ray.types import RestartRecord


def log_start(plan: RunPlan, logger: MetricLogger) -> None:
    """Report the notes of the plan, and those on this worker's device."""
    device = logger.loop.world.device
    # On a running cluster the driver has not seen the workers' machines.
    own = flash_notes(plan.settings, plan.config, device) + compile_notes(plan.settings, device)
    for note in (*plan.notes, *(own if plan.ray_address else ())):
        logger.event("WARNING", note)
    for remark in plan.remarks:
        logger.event("INFO", remark)
    if logger.loop.parts.strategy.precision.autocast is not None and slow_bfloat16(device):
        logger.event("INFO", "This CPU has no bfloat16 units: --amp saves memory but is slower than --no-amp.")


def log_attempt(plan: RunPlan, logger: MetricLogger) -> None:
    """Report what this attempt changes: a larger number of workers, or a restart after a failure."""
    if plan.grown_from:
        _log_growth(plan, logger)
    elif plan.ended and logger.loop.world.leads:
        _log_restarts(plan, logger)


def log_rank_schedule(logger: MetricLogger) -> None:
    """Warn where AdaLoRA's ranks keep the schedule of another number of steps than the learning rate has now."""
    parts = logger.loop.parts
    adapters, schedule_steps = parts.adapters, parts.lr_schedule.schedule.total_steps
    if adapters is None or adapters.ranks is None or adapters.ranks.plan.total_steps == schedule_steps:
        return
    planned = adapters.ranks.plan
    logger.event(
        "WARNING",
        f"AdaLoRA's ranks keep the schedule of {planned.total_steps} steps that the run began with (the last go at "
        f"step {planned.total_steps - planned.final_steps}), though the run has {schedule_steps} steps now.",
    )


def _log_growth(plan: RunPlan, logger: MetricLogger) -> None:
    shape, step = logger.loop.parts.shape, logger.loop.progress.step
    message = (
        f"{shape.size} workers instead of {plan.grown_from} from step {step} on: micro-batches of {shape.batch_size}, "
        f"{shape.accumulation} accumulated; the effective batch stays {shape.effective}"
    )
    logger.write("event", {"level": "INFO", "message": message, "world_size": shape.size})


def _log_restarts(plan: RunPlan, logger: MetricLogger) -> None:
    """Write a record of the restart, and of earlier ones that the metrics lack: of those the workers failed before they
    could write, or the record went with what is trained again."""
    step, last = logger.loop.progress.step, len(plan.ended)
    since_s = plan.begun_s if plan.checkpoint is None else (plan.checkpoint / STATE).stat().st_mtime
    lost_s = max(0.0, time.time() - since_s)
    written = {
        record.values.get("restart")
        for record in read_records(RunDir(plan.bundle).metrics)
        if record.time_s >= plan.begun_s
    }
    for number, ended in enumerate(plan.ended, 1):
        message = f"restart {number} after {ended.message}"
        record = RestartRecord(number, ended.cause, ended.step)
        if number == last:
            workers = f" with {plan.world_size} workers" if plan.world_size > 1 else ""
            message += f"; it continues from step {step}{workers}, {lost_s:.0f} s lost"
            record = replace(record, resumed_step=step, lost_s=round(lost_s, 1))
        elif number in written:
            continue
        values = {**record.values(), "world_size": plan.world_size}
        logger.write("event", {"level": "WARNING", "message": message, **values})
