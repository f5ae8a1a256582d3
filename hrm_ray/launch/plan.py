"""From settings to a plan that any launcher can carry out: data prepared, bundle made, everything decided.

One job: the driver's part before workers start. The plan is JSON values only, since it travels to other processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hrm_ray.data.detect import DataFacts, detect
from hrm_ray.data.folders import whole_folder
from hrm_ray.data.prepare import PreparedText, RowForm, TokenizerChoice, open_samples, prepare_puzzles, prepare_text
from hrm_ray.data.puzzles.samples import open_puzzles
from hrm_ray.data.readers import TextSource, read_documents, text_files
from hrm_ray.data.text_store import open_text_store
from hrm_ray.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, TextTokenizer
from hrm_ray.errors import DataFault, Fault, ResourceFault, SettingsError
from hrm_ray.launch.devices import Devices, choose_devices
from hrm_ray.launch.identity import (
    PREPARED,
    Identity,
    check_effective_batch,
    check_own_files,
    identify,
    stored_args,
)
from hrm_ray.launch.preflight import check_launch, check_resources
from hrm_ray.model.config import ModelConfig
from hrm_ray.rundir import MANIFEST, RunDir, read_json, write_json
from hrm_ray.settings.resolve import resolve_task
from hrm_ray.settings.tree import RunSettings, to_plain
from hrm_ray.train.assemble import model_config, schedule_length
from hrm_ray.train.start_weights import check_start_weights, start_weights
from hrm_ray.train.take_up import write_description
from hrm_ray.train.weights_file import NO_ROOM

_STORES = frozenset({"train", "eval"})
"""Folders of tokenised data that lie in a bundle's data/."""


@dataclass(frozen=True)
class Draft:
    """What is known of a run before anything is written: resolved settings, data, devices, bundle, architecture."""

    settings: RunSettings
    facts: DataFacts
    evaluation: DataFacts | None
    devices: Devices
    identity: Identity
    config: ModelConfig
    vocab_is_certain: bool
    """False where the vocabulary is still to be trained and may come out smaller."""
    notes: tuple[str, ...]
    """Fallbacks and doubts that a person must see."""


def draft(settings: RunSettings) -> Draft:
    """Check everything that can be checked without writing: data, devices, names, resources. Raises HrmRayError."""
    if settings.data.dataset_file is None:
        mend = "Give --dataset-file; `hrm-ray data build text --out corpus` makes one without a download"
        raise SettingsError(Fault("--dataset-file", "there is nothing to train on", mend))
    settings = _absolute(settings)
    facts = detect(_source(settings, evaluation=False))
    evaluation = detect(_source(settings, evaluation=True)) if _has_evaluation(settings) else None
    puzzle_len = facts.puzzle.seq_len if facts.puzzle is not None else None
    settings = resolve_task(settings, facts.task, puzzle_len)
    if evaluation is not None and evaluation.task != facts.task:
        reason = f"it holds {evaluation.task} data, the training data is {facts.task}"
        raise DataFault(Fault(str(evaluation.path), reason, "Give held-out data of the same kind"))
    notes = _overlap(settings) if evaluation is not None else []
    if evaluation is not None and facts.puzzle is not None:
        open_puzzles(evaluation.path, evaluation.split).fit_to(facts.puzzle)
    devices = choose_devices(settings.cluster)
    if devices.device == "mps" and settings.model.loss == "stablemax":
        reason = "it is computed in float64, which this device does not have"
        raise SettingsError(Fault("--loss stablemax on mps", reason, "Give --loss softmax, or --device cpu"))
    check_launch(devices)
    identity = identify(settings)
    notes += _already_there(settings, identity)
    check_effective_batch(identity, _effective_batch(settings, devices))
    check_own_files(settings, identity)
    if facts.puzzle is not None:
        config = _puzzle_config(settings, facts)
        certain = True
    else:
        vocab_size, certain = _expected_vocabulary(settings, identity)
        config = model_config(settings, vocab_size)
    check_resources(settings, config, devices, identity.run_dir.root)
    if settings.model.student_init is not None and identity.checkpoint is None:
        if certain:
            check_start_weights(settings.model.student_init, config)
        else:
            start_weights(settings.model.student_init, config)
    return Draft(settings, facts, evaluation, devices, identity, config, certain, (*devices.notes, *notes))


def make_plan(drafted: Draft) -> dict[str, Any]:
    """Make the bundle's folder and the data ready, and write the plan down.

    A new bundle appears whole or not at all: it is prepared beside its place and renamed. Raises ResourceFault where
    the disk is full.
    """
    try:
        return _made_plan(drafted)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        root = drafted.identity.run_dir.root
        mend = "Free some space there, or give another --bundle-dir"
        raise ResourceFault(Fault(str(root), f"it cannot be written ({error})", mend)) from error


def _made_plan(drafted: Draft) -> dict[str, Any]:
    with _bundle(drafted.identity) as run_dir:
        notes = list(drafted.notes)
        if drafted.facts.task == "puzzle":
            config, data = _prepare_puzzles(drafted, run_dir)
        else:
            config, data = _prepare_text(drafted, run_dir, notes)
        check_resources(drafted.settings, config, drafted.devices, run_dir.root)
        start = drafted.settings.model.student_init
        if start is not None and not drafted.vocab_is_certain and drafted.identity.checkpoint is None:
            check_start_weights(start, config)
        if drafted.facts.task == "lm" and drafted.identity.source is None:
            _check_start_tokenizer(drafted.settings, TextTokenizer.load(run_dir.root))
        plan = _plan(drafted, run_dir, config, data, notes)
        _check_data_unchanged(drafted.identity, data)
        if not drafted.identity.continues:
            write_description(run_dir, plan)
    return plan


def _already_there(settings: RunSettings, identity: Identity) -> list[str]:
    """What to say where a resumed run has no step left to take."""
    limit = settings.run.step_limit
    if identity.checkpoint is None or limit is None:
        return []
    step: int = read_json(identity.checkpoint / MANIFEST)["step"]
    if step < limit:
        return []
    return [f"The run is at step {step} already and --steps is {limit}: give more steps for it to train on."]


def read_through(drafted: Draft) -> str:
    """Read all of the data once, keeping nothing, so that a bad row is found before a run; a sentence of what there is.

    Puzzles were read whole when they were detected. Raises DataFault.
    """
    if drafted.facts.task == "puzzle":
        return f"data: all {drafted.facts.puzzle.count if drafted.facts.puzzle else 0} puzzles are sound"
    counts = []
    for evaluation in (False, True):
        if not evaluation or drafted.evaluation is not None:
            counts.append(sum(1 for _ in read_documents(_source(drafted.settings, evaluation=evaluation))))
    held_out = f", {counts[1]} held out" if len(counts) > 1 else ""
    return f"data: {counts[0]} documents are readable{held_out}"


def _plan(
    drafted: Draft, run_dir: RunDir, config: ModelConfig, data: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    settings, devices = drafted.settings, drafted.devices
    samples, _ = open_samples(data, run_dir.data)
    effective = _effective_batch(settings, devices)
    schedule_steps = schedule_length(settings, len(samples), effective, config.halt_max_steps)
    if settings.run.step_limit is None and settings.model.supervision == "segment":
        notes.append(
            f"The learning-rate schedule is laid out for {schedule_steps} steps, the most that {settings.run.epochs} "
            "epoch(s) can take when no puzzle halts early; give --steps for a schedule that reaches its end."
        )
    checkpoint = drafted.identity.checkpoint
    return {
        "settings": to_plain(settings),
        "model_config": config.to_plain(),
        "bundle": str(drafted.identity.run_dir.root),
        "run_name": drafted.identity.run_dir.root.name,
        "resume": None if checkpoint is None else str(checkpoint),
        "continues": drafted.identity.continues,
        "data": data,
        "samples": len(samples),
        "schedule_steps": schedule_steps,
        "world_size": devices.world_size,
        "threads": devices.threads,
        "device": devices.device,
        "ray_address": devices.ray_address,
        "notes": notes,
    }


def _effective_batch(settings: RunSettings, devices: Devices) -> int:
    chosen = settings.optimizer
    return chosen.batch_size * chosen.gradient_accumulation_steps * devices.world_size


@contextmanager
def _bundle(identity: Identity) -> Iterator[RunDir]:
    """The bundle's folder to prepare in: beside its place for a new one, in its place for a resumed one."""
    if identity.continues:
        yield identity.run_dir
        return
    root = identity.run_dir.root
    with whole_folder(root, overwrite=True, owned=PREPARED, option="--bundle-dir") as folder:
        prepared = RunDir(folder)
        tokenizers = identity.source if identity.source is not None else identity.run_dir
        for name in (TOKENIZER_FILE, CONFIG_FILE):
            if (tokenizers.root / name).is_file():
                shutil.copyfile(tokenizers.root / name, folder / name)
        yield prepared


def _prepare_text(drafted: Draft, run_dir: RunDir, notes: list[str]) -> tuple[ModelConfig, dict[str, Any]]:
    settings = drafted.settings
    stored = _stored_data(drafted.identity)
    if drafted.identity.continues and stored is not None and _same_evaluation(settings, stored, run_dir):
        # The tokenised data of the run is there and was checked when it was made: go on with exactly that.
        return replace(drafted.config, vocab_size=stored["vocab_size"]), stored
    with whole_folder(run_dir.data, overwrite=True, owned=_STORES, option="--bundle-dir") as stores:
        prepared = prepare_text(
            _source(settings, evaluation=False),
            _source(settings, evaluation=True) if drafted.evaluation is not None else None,
            bundle=run_dir.root,
            stores=stores,
            choice=_tokenizer_choice(drafted),
            form=RowForm(
                settings.data.max_seq_len or 0, settings.data.packing, prefix=settings.model.lm_mask == "prefix"
            ),
        )
        data = _text_data(settings, prepared)
        # Before the new data takes the place of what the run was trained on.
        _check_data_unchanged(drafted.identity, data)
        if prepared.notes and settings.cluster.strict:
            mend = "Mend the data or the option, or leave out --strict"
            raise SettingsError([Fault("--strict", note.rstrip("."), mend) for note in prepared.notes])
    notes.extend(prepared.notes)
    return replace(drafted.config, vocab_size=data["vocab_size"]), data


def _same_evaluation(settings: RunSettings, stored: dict[str, Any], run_dir: RunDir) -> bool:
    """Whether the run's stores hold the held-out data that is asked for now; the name alone could be out of date."""
    if stored["path"] != str(settings.data.dataset_file) or stored["held_out"] != _held_out_name(settings):
        return False
    if stored["held_out"] is None:
        return True
    return open_text_store(run_dir.data / "eval").meta.fingerprint == stored["held_out_fingerprint"]


def _start_tokenizer(settings: RunSettings) -> Path | None:
    """The bundle whose weights are started from, where it has a tokenizer: its embeddings belong to those tokens."""
    start = settings.model.student_init
    return start if start is not None and RunDir(start).tokenizer.is_file() else None


def _check_start_tokenizer(settings: RunSettings, tokenizer: TextTokenizer) -> None:
    """Weights of a bundle mean something only under its own tokenizer. Raises SettingsError."""
    start = _start_tokenizer(settings)
    if start is not None and TextTokenizer.load(start).fingerprint != tokenizer.fingerprint:
        reason = "its weights belong to its own tokenizer, and another one was chosen"
        raise SettingsError(Fault(f"--student-init {start}", reason, f"Give --tokenizer-path {start}"))


def _tokenizer_choice(drafted: Draft) -> TokenizerChoice:
    """What the settings say; a resumed run or a branch keeps the tokenizer of its checkpoint in any case, and weights
    of a bundle bring their tokenizer along unless another is asked for."""
    data = drafted.settings.data
    start = _start_tokenizer(drafted.settings)
    if drafted.identity.source is None and start is not None and not _asks_for_tokenizer(drafted.settings):
        return TokenizerChoice(start, data.vocab_size, data.tokenizer_train_examples, retrain=False)
    if drafted.identity.source is not None:
        return TokenizerChoice(None, drafted.config.vocab_size, data.tokenizer_train_examples, retrain=False)
    return TokenizerChoice(data.tokenizer_path, data.vocab_size, data.tokenizer_train_examples, data.retrain_tokenizer)


def _asks_for_tokenizer(settings: RunSettings) -> bool:
    """Whether the user chose a tokenizer, or how one is to be trained."""
    own = {"data.vocab_size", "data.tokenizer_train_examples", "data.retrain_tokenizer"}
    return settings.data.tokenizer_path is not None or bool(own & settings.given)


def _text_data(settings: RunSettings, prepared: PreparedText) -> dict[str, Any]:
    return {
        **prepared.plan,
        "path": str(settings.data.dataset_file),
        "split": settings.data.split,
        "held_out": _held_out_name(settings),
        "held_out_fingerprint": prepared.evaluation.meta.fingerprint if prepared.evaluation is not None else None,
        "vocab_size": prepared.tokenizer.vocab_size,
        "tokenizer": prepared.tokenizer_origin,
        "documents": prepared.train.meta.documents,
        "tokens": prepared.train.meta.tokens,
        "rows": prepared.train.rows,
        "fingerprint": prepared.train.meta.fingerprint,
    }


def _prepare_puzzles(drafted: Draft, run_dir: RunDir) -> tuple[ModelConfig, dict[str, Any]]:
    settings = drafted.settings
    evaluation = _source(settings, evaluation=True) if drafted.evaluation is not None else None
    prepared = prepare_puzzles(_source(settings, evaluation=False), evaluation)
    samples = open_puzzles(drafted.facts.path, drafted.facts.split)
    if not drafted.identity.continues:
        write_json(run_dir.puzzle, prepared.train.plain())
    return drafted.config, {**prepared.plan, "rows": len(samples), "fingerprint": samples.fingerprint()}


def _puzzle_config(settings: RunSettings, facts: DataFacts) -> ModelConfig:
    puzzle = facts.puzzle
    assert puzzle is not None
    return model_config(
        settings, puzzle.vocab_size, seq_len=puzzle.seq_len, puzzle_identifiers=puzzle.num_puzzle_identifiers
    )


def _expected_vocabulary(settings: RunSettings, identity: Identity) -> tuple[int, bool]:
    """Tokens of the vocabulary as far as it is known before the data is read, and whether that is certain."""
    if identity.source is not None:
        return TextTokenizer.load(identity.source.root).vocab_size, True
    if settings.data.tokenizer_path is not None:
        return TextTokenizer.load(settings.data.tokenizer_path).vocab_size, True
    start = _start_tokenizer(settings)
    if start is not None and not _asks_for_tokenizer(settings):
        return TextTokenizer.load(start).vocab_size, True
    bundle = identity.run_dir
    if bundle.tokenizer.is_file() and not settings.data.retrain_tokenizer:
        return TextTokenizer.load(bundle.root).vocab_size, True
    return settings.data.vocab_size, False


def _source(settings: RunSettings, *, evaluation: bool) -> TextSource:
    data = settings.data
    path = data.eval_file if evaluation and data.eval_file is not None else data.dataset_file
    assert path is not None
    split = data.split
    if evaluation:
        split = data.val_split if data.val_split is not None else TextSource(path).split
    # Where the training split is the whole folder, the files held out of it are not part of it.
    apart = None if evaluation else data.val_split
    return TextSource(path, split, data.text_column, data.prompt_column, data.response_column, apart)


def _overlap(settings: RunSettings) -> list[str]:
    """What to say where a file is trained on and evaluated on. Raises SettingsError under --strict."""
    train, held_out = _source(settings, evaluation=False), _source(settings, evaluation=True)
    if train.path.resolve() == held_out.path.resolve() and train.split == held_out.split:
        both = {train.path.resolve()}
    else:
        both = set(text_files(train)) & set(text_files(held_out))
    if not both:
        return []
    reason = "it is in the training data and in the held-out data, so the figures do not tell what was learned"
    if settings.cluster.strict:
        mend = "Give --eval-file data that is not in --dataset-file, or --val-split another split"
        raise SettingsError(Fault(str(min(both)), reason, mend))
    return [f"{min(both)}: {reason}."]


def _has_evaluation(settings: RunSettings) -> bool:
    return settings.data.eval_file is not None or settings.data.val_split is not None


def _held_out_name(settings: RunSettings) -> str | None:
    """One word for which held-out data a run evaluates on."""
    if not _has_evaluation(settings):
        return None
    source = _source(settings, evaluation=True)
    return f"{source.path}:{source.split}"


def _stored_data(identity: Identity) -> dict[str, Any] | None:
    if identity.source is None:
        return None
    return stored_args(identity.source)[1]


def _check_data_unchanged(identity: Identity, data: dict[str, Any]) -> None:
    """A resumed run must see the samples that its place in the data was counted in."""
    stored = _stored_data(identity)
    if stored is not None and stored["fingerprint"] != data["fingerprint"]:
        reason = "the data is not what the checkpoint was trained on (its fingerprint differs)"
        mend = "Put the earlier data back, or start a new run with --student-init from this one"
        raise DataFault(Fault(str(data["path"]), reason, mend))


def _absolute(settings: RunSettings) -> RunSettings:
    """Every path absolute: workers and later runs may stand in other folders."""
    changed: dict[str, Any] = {}
    for section in ("model", "data", "run"):
        values = getattr(settings, section)
        paths = {name: value.absolute() for name, value in values if isinstance(value, Path)}
        changed[section] = values.model_copy(update=paths)
    return settings.model_copy(update=changed)
