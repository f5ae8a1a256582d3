"""`hrm-ray optimize` and `train --optimize`: search what fits into memory, and show the search and what it found."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hrm_ray.cli.flat_command import FlatCommand
from hrm_ray.errors import Fault, SettingsError
from hrm_ray.settings.yaml_file import recipes

if TYPE_CHECKING:
    from hrm_ray.search.optimize import Found, Search, Trial
    from hrm_ray.settings.tree import RunSettings

COMMAND = FlatCommand(
    "optimize [OPTIONS]",
    "Finds the longest context up to --max-seq-len, then the largest micro-batch, that fit into memory, by the first "
    "updates of the run in processes of their own. The effective batch stays. Options that save memory are added where "
    "the run does not fit without them. Takes the options of train.",
    {
        "--config FILE": f"YAML file of settings, or a recipe: {', '.join(recipes())}. Options override it.",
        "--out FILE": "YAML file to write, which train --config takes [default: optimized.yaml]",
        "--help": "Show the options that matter most.",
        "--help-all": "Show all options.",
    },
    common=(
        "data.dataset_file",
        "data.max_seq_len",
        "model.model_preset",
        "optimizer.batch_size",
        "optimizer.effective_batch_size",
        "memory.memory_budget",
        "memory.gradient_checkpointing",
        "memory.use_chunked_training",
        "optimizer.use_8bit_optimizer",
        "cluster.device",
        "cluster.world_size",
    ),
    examples=(
        "hrm-ray optimize --dataset-file corpus --max-seq-len 4096 --effective-batch-size 32 --memory-budget 1GB",
        "hrm-ray train --config optimized.yaml",
    ),
)
DEFAULT_OUT = "optimized.yaml"
KEPT = frozenset(
    {"data.max_seq_len", "data.vocab_size", "optimizer.batch_size", "optimizer.gradient_accumulation_steps"}
)
"""What a search decides and a resumed run keeps."""


def optimize_command(argv: Sequence[str]) -> int:
    """Run the command on its arguments; returns the exit code."""
    arguments = COMMAND.parse(argv)
    from hrm_ray.launch.run_directory import load_run

    settings = load_run(
        arguments.options,
        arguments.config,
        found=arguments.faults,
        given_again=arguments.overridden,
        also_known=COMMAND.own_names,
    )
    from hrm_ray.atomic_files import atomic_write
    from hrm_ray.search.found_settings import as_file

    out = Path(str(arguments.own.get("--out", DEFAULT_OUT)))
    check_out(out)
    optimized, about = search_shown(settings)
    with atomic_write(out) as file:
        file.write(as_file(optimized, about).encode())
    print(f"wrote   {out}\nnext:   hrm-ray train --config {shlex.quote(str(out))}")
    return 0


def check_out(out: Path) -> None:
    """Raises SettingsError unless the file can be written, or replaced because a search wrote it."""
    from hrm_ray.search.found_settings import FILE_BEGINS

    def fault(reason: str, hint: str = "Give another --out") -> SettingsError:
        return SettingsError(Fault(f"--out {out}", reason, hint))

    if out.is_dir():
        raise fault("is a folder")
    if not out.absolute().parent.is_dir():
        raise fault(f"there is no folder {out.absolute().parent}", "Make the folder, or give another --out")
    if out.exists() and not (out.is_file() and _begins_with(out, FILE_BEGINS)):
        raise fault("a file of this name is there, which no search wrote")


def _begins_with(path: Path, text: str) -> bool:
    with path.open("rb") as file:
        return file.read(len(text.encode())) == text.encode()


def optimized(settings: RunSettings) -> RunSettings:
    """The settings with what a search finds; a run that --auto-resume continues keeps the sizes that it has."""
    from hrm_ray.launch.run_directory import trained_with
    from hrm_ray.search.found_settings import settings_with

    if not (settings.run.auto_resume and settings.run.resume):
        return search_shown(settings)[0]
    print("search  the run goes on from its checkpoint, with the context and batch that it has: nothing is searched")
    return settings_with(settings, {key: value for key, value in trained_with(settings).items() if key in KEPT})


def search_shown(settings: RunSettings) -> tuple[RunSettings, str]:
    """Search, and print each trial, the speeds and the options; returns the settings with what was found, and what that
    is in a line."""
    from hrm_ray.launch.resolve import resolve
    from hrm_ray.search.found_settings import as_options, found_leaves, settings_with
    from hrm_ray.search.optimize import Search, check_optimizable
    from hrm_ray.search.trial import run_trial

    check_optimizable(settings)
    resolved = resolve(_in_no_bundle(settings), checks_memory=False)
    search = Search(resolved, run_trial, _print_trial)
    asked = search.asked
    context = "" if asked.context is None else f"the longest context up to {asked.context}, then "
    print(
        f"search  {context}the largest micro-batch up to {search.share}, within "
        f"{_gigabytes(search.limit_bytes)} of {_gigabytes(search.budget_bytes)}",
        flush=True,
    )
    found = _found(search)
    leaves = found_leaves(search, found)
    about = f"{found.point}, {_gigabytes(found.verdict.peak_bytes or 0)} at the peak"
    _print_found(search, found, as_options(leaves))
    return settings_with(settings, leaves), about


def _in_no_bundle(settings: RunSettings) -> RunSettings:
    """The settings with the folder of a bundle that is not there: an earlier run's folder matters to no trial."""
    nowhere = Path(tempfile.gettempdir()) / "hrm-ray-no-bundle"
    return settings.model_copy(
        update={"run": settings.run.model_copy(update={"bundle_dir": nowhere, "brain_name": None, "stop_file": None})}
    )


def _found(search: Search) -> Found:
    """What an earlier search found, where a trial confirms it; otherwise what a search finds now, which is kept."""
    from hrm_ray.search.earlier_searches import file_of, recall, remember

    file = file_of(search)
    earlier = recall(file, search.limit_bytes)
    if earlier is not None:
        print(f"earlier {earlier.point} ({file}); one trial confirms it", flush=True)
        confirmed = search.confirm(earlier)
        if confirmed is not None:
            return confirmed
        print("        it does not fit any more: searching anew", flush=True)
    found = search.run()
    try:
        remember(file, found)
    except OSError as error:
        print(f"note: what was found cannot be kept in {file} ({error.strerror})", file=sys.stderr)
    return found


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"


def _print_trial(number: int, trial: Trial) -> None:

    verdict = trial.verdict
    parts = [_gigabytes(verdict.peak_bytes)] if verdict.peak_bytes is not None else []
    if verdict.update_s is not None and verdict.fits:
        parts.append(f"{1000 * verdict.update_s:.0f} ms an update")
    said = f"{verdict.kind}{f' ({verdict.why})' if verdict.why else ''}"
    print(f"trial {number} {trial.point}: {', '.join([*parts, said])}, after {verdict.took_s:.0f} s", flush=True)


def _print_found(search: Search, found: Found, options: str) -> None:
    from hrm_ray.tables import aligned

    point, chosen = found.point, search.resolved.settings.optimizer
    print(f"found   {point}")
    before = f"{chosen.batch_size} x {chosen.gradient_accumulation_steps}"
    after = f"{point.batch_size} x {search.share // point.batch_size}"
    if before != after:
        print(f"batch   {before} -> {after}: the effective batch stays {search.share} on each worker")
    for lever in point.levers:
        if lever.changes:
            print(f"note    {lever.name}: {lever.changes}")
    rows: list[list[str]] = [["batch", "memory", search.rate_name]]
    speeds: list[tuple[float, int]] = []
    for trial in found.speeds():
        rate, verdict = search.rate(trial), trial.verdict
        if rate is not None:
            speeds.append((rate, trial.point.batch_size))
        shown = "unknown" if rate is None else f"{rate:,.0f}"
        rows.append([str(trial.point.batch_size), _gigabytes(verdict.peak_bytes or 0), shown])
    print(aligned(rows))
    if speeds and max(speeds)[1] != point.batch_size:
        faster = max(speeds)[1]
        print(
            f"note    micro-batches of {faster} were faster: --batch-size {faster} "
            f"--gradient-accumulation-steps {search.share // faster}"
        )
    print(f"options {options}")
