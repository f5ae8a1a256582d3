"""The body of `hrm-ray train`: starts the run, and prints what will be trained and how the run ended."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing
from textwrap import TextWrapper

from hrm_ray.cli.dry_run import print_dry_run
from hrm_ray.cli.optimize import optimized
from hrm_ray.cli.output import print_if_possible
from hrm_ray.cli.summary import ENDED_BY, summary
from hrm_ray.errors import Fault, SettingsError
from hrm_ray.launch.resolve import ResolvedRun, effective_batch, resolve
from hrm_ray.launch.run import run
from hrm_ray.launch.stopping import StopWatch
from hrm_ray.metrics.console import ConsoleSink
from hrm_ray.metrics.display_state import Schedule
from hrm_ray.model.describe import count_parameters
from hrm_ray.settings.tree import RunSettings
from hrm_ray.stop_signals import COMMAND_STARTED_S
from hrm_ray.types import RunResult, StopPoll, StopRequested

_INDENT = " " * len("device  ")


def run_train(settings: RunSettings, *, dry_run: bool, optimize: bool) -> int:
    """Train, or with `dry_run` only print what would be done; with `optimize` what fits is searched before. Returns the
    exit code."""
    if optimize and dry_run:
        reason = "a search makes trials, and a dry run starts nothing"
        raise SettingsError(Fault("--optimize with --dry-run", reason, "Leave one of them out"))
    with StopWatch(settings.run.stop_file) as watch:
        if optimize:
            settings = optimized(settings)
        if dry_run:
            resolved = resolve(settings)
            print(_wrapped(describe(resolved)))
            print_dry_run(resolved)
            return 0
        try:
            ended = train_shown(
                settings, stop=watch.poll, on_start=watch.begin, started_s=COMMAND_STARTED_S, owns_output=True
            )
            return ended.reason.exit_code
        except StopRequested as stopped:
            print_if_possible(
                f"ended   {ENDED_BY[stopped.reason]} before the first step: nothing was trained", discards=True
            )
            return stopped.reason.exit_code


def train_shown(
    settings: RunSettings,
    *,
    stop: StopPoll,
    on_start: Callable[[], None],
    started_s: float | None = None,
    owns_output: bool = False,
) -> RunResult:
    """Train, and print what is trained, the progress, and how it ended. With `owns_output` standard output is discarded
    once it cannot be written. The other arguments are those of `launch.run.run`."""
    called_s = time.time()
    resolved = resolve(settings)
    print_if_possible(_wrapped(describe(resolved)), discards=owns_output)
    with closing(ConsoleSink(sys.stdout, display_schedule(resolved), started_s=called_s)) as sink:
        result = run(resolved, sink=sink, stop=stop, on_start=on_start, started_s=started_s)
    print_if_possible(_wrapped(summary(result, resolved, time.time() - called_s)), discards=owns_output)
    return result


def display_schedule(resolved: ResolvedRun) -> Schedule:
    """When the run ends, evaluates and saves, for the display."""
    settings = resolved.settings
    evaluates = settings.data.eval_file is not None or settings.data.val_split is not None
    return Schedule(settings.run.step_limit, settings.run.eval_every if evaluates else None, settings.run.save_every)


def _wrapped(text: str) -> str:
    """`text` with its lines divided at spaces where a terminal is too narrow for them; commands stay whole."""
    if sys.stdout is None or not sys.stdout.isatty():
        return text
    width = max(2 * len(_INDENT), shutil.get_terminal_size().columns)
    wrapper = TextWrapper(width, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False)
    return "\n".join(line if "hrm-ray " in line else wrapper.fill(line) for line in text.splitlines())


def describe(resolved: ResolvedRun) -> str:
    """The model, data, batch, device and bundle of a run, as text."""
    settings, facts, devices = resolved.settings, resolved.facts, resolved.devices
    parameters = count_parameters(resolved.config)
    active = f" ({parameters.active:,} active per token)" if parameters.idle else ""
    most = "" if resolved.vocab_is_certain else "up to "
    vocabulary = f"vocabulary {most}{resolved.config.vocab_size}"
    if not resolved.vocab_is_certain and settings.data.auto_vocab_size:
        most = "from "
        vocabulary = (
            f"vocabulary {settings.data.min_vocab_size} to {settings.data.max_vocab_size}, chosen from the data"
        )
    chosen = settings.optimizer
    effective = effective_batch(settings, devices)
    workers = f"{devices.world_size} worker(s) = {effective}"
    if devices.independent:
        workers = f"1 = {effective}, in each of {devices.world_size} independent trainer(s)"
    sizes = settings.cluster.trainer_batch_sizes
    if devices.independent and sizes is not None:
        workers = f"1, in independent trainers with batches of {sizes}"
    size = f"{facts.puzzle.count} puzzles" if facts.puzzle is not None else f"{facts.bytes / 1e6:.1f} MB of text"
    skipped = f", {facts.skipped_files} other file(s) not read" if facts.skipped_files else ""
    lines = [
        f"data    {facts.path} ({facts.task}, {size} in {facts.files} file(s){skipped})",
        f"model   {resolved.config.arch}, {most}{parameters.total:,} parameters{active}, "
        f"sequence {resolved.config.seq_len}, {vocabulary}",
        f"batch   {chosen.batch_size} x {chosen.gradient_accumulation_steps} accumulated x {workers}",
        f"device  {devices.device}, {devices.threads} thread(s) per worker, launcher {devices.launcher}, strategy "
        f"{devices.strategy}",
        f"bundle  {resolved.location.run_dir.root}",
    ]
    fewest = settings.cluster.min_workers or devices.world_size
    largest = settings.cluster.max_workers or devices.world_size
    if fewest < largest:
        room = f"{fewest} to {largest}, as the cluster has room; the {effective} rows of an update stay"
        if devices.ray_address is None:
            room = f"{largest}; --min-workers has no effect on a cluster that is started for the run"
        lines.insert(3, f"workers {room}")
    if resolved.defaults is not None:
        lines.append(f"chosen  {resolved.defaults}")
    if settings.run.expert_id is not None:
        index = settings.model.expert_index
        lines.append(f"expert  {settings.run.expert_id}: number {index} of every block is trained, all else is frozen")
    if resolved.location.checkpoint is not None:
        lines.append(f"resume  {resolved.location.checkpoint}")
    return "\n".join(lines)
