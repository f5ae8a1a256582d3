"""The settings of a run, the bundle that it writes, and the checkpoint that it resumes from.

A new run gets a folder of its own, and a resumed one that of its checkpoint. Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hrm_ray.bundle.progress import STATE, has_carries
from hrm_ray.bundle.stored_settings import run_described_by, stored_args, stored_leaves
from hrm_ray.data.file_systems import name_for_runs
from hrm_ray.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE
from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.launch.job_package import check_outlives_job
from hrm_ray.launch.named_bundles import architecture_leaves, find_checkpoint, with_start_weights
from hrm_ray.launch.run_lock import check_not_in_use
from hrm_ray.ledger.database import SIDE_FILES
from hrm_ray.metrics.jsonl import read_records, why_no_metrics
from hrm_ray.rundir import DRIVER_MARKER, MANIFEST, RunDir, checkpoint_damage, read_json, verify_checkpoint
from hrm_ray.settings.load import load_settings, peek_leaves
from hrm_ray.settings.needs import NoEffect
from hrm_ray.settings.options import options
from hrm_ray.settings.presets import layer_leaves, preset_leaves
from hrm_ray.settings.profiles import BUNDLE_DIRS
from hrm_ray.settings.tree import RunSettings, to_dotted
from hrm_ray.types import RunResult, StopReason

REUSABLE = frozenset({TOKENIZER_FILE, CONFIG_FILE})
"""Files that the folder of a new run may contain: the tokenizer of an earlier one is used again."""

PREPARED = REUSABLE | {
    "config.json",
    "training_args.json",
    "puzzle.json",
    "data",
    "metrics.jsonl",
    "tensorboard",
    "ledger.sqlite",
    *(f"ledger.sqlite{ending}" for ending in SIDE_FILES),
    "chunk_tracker_state.json",
    "independent",
    "reports.json",
    ".generation.json",
    "stacks.txt",
    "wandb",
}
"""Files of a bundle that exist before the first checkpoint; wandb/ is what --report-to wandb keeps there."""

OLDER_BEST = "best.superseded-"
"""How the names begin that best/ of a run gets which was killed before its first checkpoint and started again."""

LOCK_FILES = frozenset({".run.lock", ".in_use.json", ".preparing"})
"""What a run has in its folder beside the bundle while it runs; a Ray run has a DRIVER_MARKER file too."""


_NAME_A_RUN = (
    *("run.resume", "run.auto_resume", "run.resume_from", "run.bundle_dir", "run.brain_name", "run.profile"),
    *("data.dataset_file", "data.dataset_id"),
)
"""Leaves that say which run is resumed."""


@dataclass(frozen=True)
class RunLocation:
    """The bundle's folder, the checkpoint to resume from, and the bundle which that belongs to."""

    run_dir: RunDir
    checkpoint: Path | None
    source: RunDir | None
    may_replace: bool = False
    """Of --auto-resume: best/ and the log of a run that was ended before its first checkpoint are replaced too."""
    damaged: Path | None = None
    """The newest checkpoint, where it is damaged and `checkpoint` is an older one."""

    @property
    def continues(self) -> bool:
        """Whether the run stays in the bundle of its checkpoint. Otherwise it is new, or a branch in a new folder."""
        return self.source is not None and self.source.root.resolve() == self.run_dir.root.resolve()


def load_run(
    flat_options: Mapping[str, str | bool],
    config: Path | None = None,
    *,
    found: Sequence[Fault] = (),
    given_again: Sequence[NoEffect] = (),
    also_known: Iterable[str] = (),
    profile: str | None = None,
) -> RunSettings:
    """The settings of a new or resumed run from options and a settings file, as `load_settings` takes them.

    With --resume or --resume-from they are laid over those of the run to resume, and where the file is the
    training_args.json of a bundle over those of its run, except the bundle's folder. Raises SettingsError where both
    are given.
    """
    given, earlier = config, run_described_by(config)
    if earlier is not None:
        config = None
    where = peek_leaves(flat_options, config, _NAME_A_RUN)
    resumes = where["run.resume"] or where["run.resume_from"] is not None
    if earlier is not None and resumes and not where["run.auto_resume"]:
        reason = "it has the settings of a run, and the run to resume has its own"
        hint = (
            f"Leave --config out, or leave out {'--resume' if where['run.resume'] else '--resume-from'} for a new run"
        )
        raise SettingsError(Fault(f"--config {given}", reason, hint))
    flat_options = with_start_weights(flat_options, resumes=resumes)
    where |= peek_leaves(flat_options, config, ("model.student_init",))
    if where["run.resume_from"] is not None:
        where["run.resume_from"] = find_checkpoint(where["run.resume_from"])
    where["run.profile"] = where["run.profile"] or profile
    base = architecture = None
    if where["run.auto_resume"]:
        if where["run.resume"] or where["run.resume_from"] is not None:
            reason = "--auto-resume starts a run where there is none, the other demands one"
            option = "--resume" if where["run.resume"] else "--resume-from"
            raise SettingsError(Fault(f"--auto-resume with {option}", reason, "Give one of the two"))
        if _find_stored(None, where).newest_checkpoint() is not None:
            where["run.resume"] = True
            flat_options = {**flat_options, "--resume": True}
    if where["run.resume"] or where["run.resume_from"] is not None:
        base = _base_settings(_find_stored(where["run.resume_from"], where), where)
    elif earlier is not None:
        base = earlier
    elif where["model.student_init"] is not None:
        architecture = architecture_leaves(where["model.student_init"])
    settings = load_settings(
        flat_options,
        config,
        base,
        found=found,
        given_again=given_again,
        also_known=also_known,
        profile=profile,
        architecture=architecture,
    )
    run = settings.run.model_copy(update={"resume_from": where["run.resume_from"]})
    return settings.model_copy(update={"run": run})


def _find_stored(resume_from: Path | None, where: Mapping[str, Any]) -> RunDir:
    """The bundle whose settings a resumed run starts from; `where` has the leaves that name a bundle."""
    if resume_from is not None:
        source = RunDir(resume_from.absolute().parent.parent)
        if not source.training_args.is_file():
            hint = "Give a checkpoint's folder, BUNDLE/checkpoints/step_N, or --bundle-dir BUNDLE --resume"
            raise SettingsError(Fault(f"--resume-from {resume_from}", "is not a checkpoint of a bundle", hint))
        return source
    data = where["data.dataset_file"] or where["data.dataset_id"]
    if where["run.brain_name"] is None and where["run.bundle_dir"] is None and data is None:
        raise SettingsError(
            Fault(
                "--auto-resume" if where["run.auto_resume"] else "--resume",
                "no run is named",
                "Give --bundle-dir (or --brain-name) of the run to resume",
            )
        )
    return RunDir(_folder(where["run.brain_name"], where["run.bundle_dir"], data, where["run.profile"]))


def _base_settings(run_dir: RunDir, where: Mapping[str, Any]) -> dict[str, Any]:
    """The stored settings of a bundle by dotted key. Raises SettingsError or DataError.

    The bundle's folder is the one that `where` names, or else the one the settings were found in: it may have moved.
    """
    if not run_dir.training_args.is_file():
        reason = f"contains no run ({run_dir.training_args.name} is missing)"
        hint = "Give --bundle-dir (or --brain-name) of an earlier run, or leave out --resume"
        raise SettingsError(Fault(str(run_dir.root), reason, hint))
    dotted = stored_leaves(run_dir)
    if where["run.resume_from"] is None:
        # The folder of --profile may be another one than that of the run.
        folder: Path | None = run_dir.root if where["run.brain_name"] is None else run_dir.root.parent
    else:
        named = where["run.brain_name"] is not None or where["run.bundle_dir"] is not None
        folder = None if named else run_dir.root
    return dotted | {"run.brain_name": None, "run.bundle_dir": None if folder is None else str(folder)}


def trained_with(settings: RunSettings) -> dict[str, Any]:
    """The leaves, by dotted key, that the run to resume was really trained with; none for a new run.

    Options that fell back then have the value that was used. Raises DataError.
    """
    run = settings.run
    if run.resume_from is not None:
        source = RunDir(run.resume_from.absolute().parent.parent)
    elif run.resume:
        source = RunDir(_folder(run.brain_name, run.bundle_dir, settings.data.training_data, run.profile))
    else:
        return {}
    return stored_leaves(source) if source.training_args.is_file() else {}


def locate_run(settings: RunSettings) -> RunLocation:
    """Bundle and checkpoint of this run; checks that the folder is free, or the checkpoint complete.

    Raises SettingsError for a used name or settings that do not fit the checkpoint, DataError for a damaged one.
    """
    run = settings.run
    run_dir = RunDir(_folder(run.brain_name, run.bundle_dir, settings.data.training_data, run.profile).absolute())
    check_outlives_job(run_dir.root, "--bundle-dir")
    if run.resume_from is not None:
        source = RunDir(run.resume_from.absolute().parent.parent)
        return _resumed(settings, run_dir, run.resume_from.absolute(), source)
    if run.resume:
        newest = run_dir.newest_checkpoint()
        if newest is None:
            hint = "Leave out --resume and give another --brain-name, or --resume-from a checkpoint"
            raise SettingsError(Fault(str(run_dir.root), "contains no checkpoint to resume from", hint))
        whole = newest
        if run.auto_resume and not settings.cluster.strict and checkpoint_damage(newest) is not None:
            whole = run_dir.newest_whole_checkpoint() or newest
        location = _resumed(settings, run_dir, whole, run_dir)
        return location if whole == newest else replace(location, damaged=newest)
    location = RunLocation(run_dir, None, None, may_replace=run.auto_resume)
    _check_new_folder(location)
    return location


def holds_no_weights(run_dir: RunDir, *, best_too: bool = False) -> bool:
    """Whether a bundle has no checkpoint and no weights (with `best_too`: but those of an evaluation), and nothing in
    it but our own files, as a run leaves it that ended before its first checkpoint."""
    if not run_dir.training_args.is_file() or not run_dir.only_partial_checkpoints:
        return False
    # A checkpoint that an interrupted replacement has moved aside is whole.
    if run_dir.newest_checkpoint() is not None:
        return False
    own = PREPARED | {run_dir.checkpoints.name, *([run_dir.best.root.name] if best_too else [])}
    return all(name in own or name.startswith(OLDER_BEST) for name in _names_in(run_dir))


def never_trained(run_dir: RunDir) -> bool:
    """Whether a bundle holds no weights, and no record of a step."""
    if not holds_no_weights(run_dir):
        return False
    try:
        return not run_dir.metrics.is_file() or all(record.kind == "event" for record in read_records(run_dir.metrics))
    except DataError:
        return False


def finished_before(settings: RunSettings, location: RunLocation) -> RunResult | None:
    """The result of a run that has finished already, where --auto-resume is asked to continue it; None where there is
    more to train."""
    run, run_dir = settings.run, location.run_dir
    if not run.auto_resume or location.checkpoint is None or location.damaged or not run_dir.metadata.is_file():
        return None
    about = read_json(run_dir.metadata)
    step: int = read_json(location.checkpoint / MANIFEST)["step"]
    goes_on = run.stop_after_epoch or run.stop_after_block or settings.data.force_train
    if goes_on or about["ended"] != StopReason.FINISHED.value or about["step"] != step:
        return None
    stored = stored_leaves(run_dir)
    as_long = all(settings.leaf(f"run.{name}") == stored[f"run.{name}"] for name in ("steps", "epochs", "iterate"))
    if not as_long and (run.step_limit is None or run.step_limit > step):
        return None
    return RunResult(
        StopReason.FINISHED, step, about["epoch"], str(run_dir.root), about["figures"], about["best"] or {}
    )


def _names_in(run_dir: RunDir) -> set[str]:
    """What the bundle's folder contains, without the files that a run has there while it runs."""
    names = {path.name for path in run_dir.root.iterdir()} - LOCK_FILES
    return {name for name in names if not name.startswith(DRIVER_MARKER)}


def check_unchanged(settings: RunSettings, location: RunLocation) -> RunLocation:
    """Look again, under the run's lock, at what `locate_run` found. Raises SettingsError if another run changed it.

    A checkpoint that an interrupted replacement moved aside is put back: gives where it is now.
    """
    run_dir = location.run_dir
    if not location.continues:
        if location.may_replace and run_dir.newest_checkpoint() is not None:
            reason = "another run saved a checkpoint in it while this one was starting"
            raise SettingsError(Fault(str(run_dir.root), reason, "Run the command again"))
        check_folder_is_free(location)
    elif settings.run.resume_from is None:
        if run_dir.newest_checkpoint() != (location.damaged or location.checkpoint):
            reason = "another run saved a checkpoint in it while this one was starting"
            raise SettingsError(Fault(str(run_dir.root), reason, "Run the command again"))
        run_dir.recover()
        if location.damaged is not None:
            return location
        return replace(location, checkpoint=run_dir.newest_checkpoint())
    return location


def check_effective_batch(location: RunLocation, effective: int, *, independent: bool = False) -> None:
    """Raises SettingsError if the effective batch is not that of the checkpoint, whose slots and position in the data
    depend on it. `independent`: it is that of each trainer."""
    if location.checkpoint is None:
        return
    trained: int = read_json(location.checkpoint / "state.json")["effective_batch_size"]
    if trained != effective:
        reason = f"the checkpoint {location.checkpoint} was trained with {trained}"
        hint = f"Choose --batch-size, --gradient-accumulation-steps and --world-size whose product is {trained}"
        if independent:
            hint = f"Choose --batch-size and --gradient-accumulation-steps whose product is {trained}, for each trainer"
        raise SettingsError(Fault(f"effective batch {effective}", reason, hint))


def check_own_files(settings: RunSettings, location: RunLocation) -> None:
    """The stop file must not be there yet, and the log file must be new, or hold metrics. Raises SettingsError."""
    stop, log = settings.run.stop_file, settings.run.log_file
    if stop is not None and stop.exists():
        reason = "the file already exists, so the run would stop at its first step"
        raise SettingsError(Fault(f"--stop-file {stop}", reason, "Remove it, or name another"))
    if stop is not None and not stop.parent.is_dir() and location.run_dir.root not in (stop.parent, *stop.parents):
        reason = f"there is no folder {stop.parent}, so the file cannot be made"
        raise SettingsError(Fault(f"--stop-file {stop}", reason, "Make the folder, or name a file in another one"))
    if log is None:
        return
    if log.is_dir() or _behind_a_file(log):
        reason = "a folder has this name" if log.is_dir() else "part of the path is a file, not a folder"
        raise SettingsError(Fault(f"--log-file {log}", reason, "Name another file"))
    if log.exists() and not log.is_file():
        raise SettingsError(Fault(f"--log-file {log}", "is a device or a pipe, not a file", "Name a file"))
    obstacle = why_no_metrics(log)
    if obstacle is not None:
        raise SettingsError(Fault(f"--log-file {log}", obstacle, "Name another file, or move this one away"))


def _behind_a_file(path: Path) -> bool:
    return any(parent.is_file() for parent in path.parents)


def _folder(brain_name: str | None, bundle_dir: Path | None, data: str | None, profile: str | None) -> Path:
    if brain_name is not None:
        return (bundle_dir or BUNDLE_DIRS[profile]) / brain_name
    if bundle_dir is not None:
        return bundle_dir
    if data is None:
        raise ValueError("nothing names the folder of the bundle")
    return BUNDLE_DIRS[profile] / name_for_runs(data)


def _resumed(settings: RunSettings, run_dir: RunDir, checkpoint: Path, source: RunDir) -> RunLocation:
    verify_checkpoint(checkpoint)
    if not source.training_args.is_file():
        reason = "is not a folder checkpoints/step_N of a bundle"
        raise DataError(Fault(str(checkpoint), reason, "Give the path of a checkpoint inside its bundle"))
    _check_same(settings, source)
    _check_trainers(settings, source, checkpoint)
    _check_ledger(settings, source)
    location = RunLocation(run_dir, checkpoint, source)
    if not location.continues:
        _check_new_folder(location)
    return location


def _check_trainers(settings: RunSettings, source: RunDir, checkpoint: Path) -> None:
    """Raises SettingsError where independent trainers cannot go on from the checkpoint."""
    merged = read_json(checkpoint / STATE)["extra"].get("independent") is not None
    if merged or not settings.cluster.parallel_independent:
        return
    hint = "Leave it out, or start a new run from its weights with --student-init"
    if stored_leaves(source)["model.supervision"] == "segment" and has_carries(checkpoint):
        reason = f"{checkpoint} has rows in the middle of their segments (--supervision segment)"
        raise SettingsError(Fault("--parallel-independent", reason, hint))


def _check_ledger(settings: RunSettings, source: RunDir) -> None:
    """Raises DataError where a run on text has lost its ledger, unless a new one is asked for."""
    if settings.run.new_ledger or stored_args(source)[1].get("task") != "lm":
        return
    if not source.has_ledger:
        reason = "the ledger, which says what data was trained, is missing"
        hint = "Restore it from a copy, or add --new-ledger: the data up to the checkpoint is read again to write it"
        raise DataError(Fault(str(source.ledger), reason, hint))


def _check_new_folder(location: RunLocation) -> None:
    """As `check_folder_is_free`, for a process without the run's lock: a run that is training there is named."""
    try:
        check_folder_is_free(location)
    except SettingsError:
        # The advice to delete the folder or to resume the run is wrong while the run is going on.
        check_not_in_use(location.run_dir)
        raise


def check_folder_is_free(location: RunLocation) -> None:
    """Raises SettingsError unless a new run can have the folder."""
    run_dir, root = location.run_dir, location.run_dir.root
    if root.is_file():
        raise SettingsError(Fault(str(root), "a file has this name", "Give another --brain-name"))
    if _behind_a_file(root):
        hint = "Give another --bundle-dir"
        raise SettingsError(Fault(str(root), "part of the path is a file, not a folder", hint))
    if not root.is_dir():
        return
    inside = sorted(_names_in(run_dir) - REUSABLE)
    if not inside:
        return
    if holds_no_weights(run_dir, best_too=True) if location.may_replace else never_trained(run_dir):
        return
    if run_dir.training_args.is_file():
        steps = run_dir.checkpoint_steps()
        reached = f"a checkpoint at step {steps[-1]}" if steps else "no checkpoint yet"
        hint = "Give --resume to continue it, or another --brain-name"
        if not steps:
            hint = "Delete the folder, or give another --brain-name"
            if holds_no_weights(run_dir, best_too=True):
                hint = "Give --auto-resume to start again in it (its metrics are replaced), or another --brain-name"
        raise SettingsError(Fault(str(root), f"already contains a run, with {reached}", hint))
    hint = "Give another --brain-name or --bundle-dir"
    raise SettingsError(Fault(str(root), f"the folder is not empty (it contains {inside[0]})", hint))


def _check_same(settings: RunSettings, source: RunDir) -> None:
    """Refuse settings that would make the checkpoint's tensors or its place in the data mean something else."""
    stored = stored_leaves(source)
    now = to_dotted(settings)
    hint = "Leave it out to resume the run, or start a new one under another --brain-name"
    faults = []
    # What a preset or a number of layers has set is one fault, under the option that the user gave.
    sets = {"model.model_preset": preset_leaves(str(settings.model.model_preset)), "model.num_layers": layer_leaves(2)}
    set_by = {giver: list[str]() for giver in sets}
    for key, option in options().items():
        then, value, on_resume = stored[key], now[key], option.traits.on_resume
        one_is_absent = on_resume == "presence_fixed" and (then is None or value is None)
        if then == value or not (on_resume == "fixed" or one_is_absent):
            continue
        givers = [giver for giver, leaves in sets.items() if giver in settings.given and key in leaves]
        if givers and key not in settings.given:
            set_by[givers[-1]].append(option.written(then))
            continue
        reason = f"the run to resume was trained with {option.described(then)}"
        faults.append(Fault(option.written(value), reason, hint))
    for giver, trained in set_by.items():
        if trained:
            reason = f"the run to resume was trained with {' '.join(trained)}"
            faults.append(Fault(options()[giver].written(now[giver]), reason, hint))
    if faults:
        raise SettingsError(faults)
