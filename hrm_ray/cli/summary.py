"""What `hrm-ray train` prints at the end of a run."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from hrm_ray.errors import DataError
from hrm_ray.launch.list_runs import disk_use
from hrm_ray.launch.resolve import ResolvedRun
from hrm_ray.metrics.display_state import EVAL_FIELDS, decisive, duration, figure, labelled
from hrm_ray.metrics.jsonl import read_records
from hrm_ray.rundir import RunDir
from hrm_ray.tables import aligned
from hrm_ray.types import Record, RunResult, StopReason

ENDED_BY = {
    StopReason.FINISHED: "finished",
    StopReason.STOP_FILE: "stopped by --stop-file",
    StopReason.SIGTERM: "stopped by SIGTERM",
    StopReason.SIGHUP: "stopped by SIGHUP",
    StopReason.SIGUSR1: "stopped by SIGUSR1",
    StopReason.MAX_TIME: "stopped by --max-time",
    StopReason.INTERRUPT: "stopped by Ctrl-C",
}


def summary(result: RunResult, resolved: ResolvedRun, taken_s: float) -> str:
    """How the run ended, what it has learned, where it lies, and the command to type next."""
    run_dir = RunDir(Path(result.bundle))
    try:
        records = read_records(run_dir.metrics)
    except DataError:
        records = []
    lines = [
        f"ended   {ENDED_BY[result.reason]} at step {result.step}, epoch {result.epoch}, after {duration(taken_s)}"
        f"{_amount(result, resolved)}{_restarts(records)}"
    ]
    losses = [(record.step, loss) for record in records if record.kind == "train" and (loss := _loss(record))]
    if losses:
        (first, before), (last, after) = losses[0], losses[-1]
        lines.append(f"loss    {before} at step {first}" + (f", {after} at step {last}" if last > first else ""))
    lines += _held_out(result, records)
    lines += _after_failures(result)
    lines.append(f"bundle  {result.bundle} ({_size(run_dir.root)})")
    lines.append(f"next:   {_next(result, resolved)}")
    if result.reason is StopReason.STOP_FILE:
        lines.append(f"        (remove {resolved.settings.run.stop_file} first)")
    return "\n".join(lines)


def _amount(result: RunResult, resolved: ResolvedRun) -> str:
    if result.samples is None:
        return ""
    if resolved.facts.puzzle is not None:
        return f", {result.samples:,} puzzles"
    length = resolved.config.seq_len
    return f", {result.samples:,} sequences of {length} tokens"


def _restarts(records: list[Record]) -> str:
    count = sum(
        record.kind == "event" and str(record.values.get("message", "")).startswith("resumed from")
        for record in records
    )
    return f", resumed {count} time(s)" if count else ""


def _after_failures(result: RunResult) -> list[str]:
    """A table of the restarts after failures."""
    rows = [("after", "at step", "on from", "lost")]
    for row in result.restarts:
        step = "" if row.resumed_step is None else f"{row.resumed_step}"
        lost = "" if row.lost_s is None else duration(row.lost_s)
        rows.append((f"restart {row.number}: {row.cause}", f"{row.failed_step}", step, lost))
    return aligned(rows).splitlines() if result.restarts else []


def _loss(record: Record) -> str | None:
    loss = record.values.get("loss")
    return figure(loss) if isinstance(loss, float) and math.isfinite(loss) else None


def _held_out(result: RunResult, records: list[Record]) -> list[str]:
    shown = Record("eval", result.step, 0.0, dict(result.figures))
    parts = [f"{label} {value}" for label, value in labelled(EVAL_FIELDS, shown)]
    evaluated = [record.step for record in records if record.kind == "eval"]
    where = f" (step {evaluated[-1]})" if evaluated else ""
    lines = [f"held out  {', '.join(parts)}{where}"] if parts else []
    step = result.best.get("step")
    best = decisive(Record("eval", result.step, 0.0, dict(result.best)))
    if best is not None and step is not None:
        lines.append(f"best    {best} at step {step:.0f}, in {RunDir(Path(result.bundle)).best.root}")
    return lines


def _size(folder: Path) -> str:
    size, _ = disk_use(folder)
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _next(result: RunResult, resolved: ResolvedRun) -> str:
    bundle, data = shlex.quote(result.bundle), resolved.settings.data
    if result.reason is not StopReason.FINISHED:
        return f"hrm-ray train --bundle-dir {bundle} --resume"
    if resolved.facts.puzzle is None:
        return f'hrm-ray generate {bundle} --prompt "..."'
    held_out = data.eval_file or data.dataset_file or data.dataset_id
    split = f" --split {shlex.quote(data.val_split)}" if data.val_split is not None and data.eval_file is None else ""
    return f"hrm-ray solve {bundle} --file {shlex.quote(str(held_out))}{split} --limit 3"
