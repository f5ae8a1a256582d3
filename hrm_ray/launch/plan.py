"""What the driver does before workers start: it prepares the bundle and the data, and makes the plan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from hrm_ray.bundle.start_weights import check_start_weights
from hrm_ray.bundle.stored_settings import stored_args
from hrm_ray.data.bpe import SizeBounds
from hrm_ray.data.catalog import CHANGED
from hrm_ray.data.corpus import CorpusReading
from hrm_ray.data.prepare import (
    PreparedText,
    PrepareRequest,
    PuzzlePlan,
    TokenizerChoice,
    prepare_puzzles,
    prepare_text,
)
from hrm_ray.data.text_data import TextDataDir
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DISK_FULL_ERRNOS, DataError, Fault, ResourceError, SettingsError
from hrm_ray.launch.data_sources import chunking_config, has_evaluation, source_of
from hrm_ray.launch.new_bundle import new_bundle
from hrm_ray.launch.preflight import check_resources
from hrm_ray.launch.resolve import (
    ResolvedRun,
    asks_for_tokenizer,
    effective_batch,
    fixed_vocabulary,
    row_form,
    start_tokenizer,
)
from hrm_ray.launch.run_directory import RunLocation
from hrm_ray.ledger import copy_ledger
from hrm_ray.model.config import ModelConfig
from hrm_ray.rundir import RunDir, write_json
from hrm_ray.settings.resolve import fit_warmup
from hrm_ray.settings.rules import as_note
from hrm_ray.settings.schedule_length import schedule_length
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.plan import RunPlan, TextData, write_description


def make_plan(resolved: ResolvedRun, on_read: Callable[[CorpusReading], None] = lambda _: None) -> RunPlan:
    """Prepare the bundle's folder and the data, and write the plan. `on_read` is called while text is read.

    A new bundle is prepared in a temporary folder and moved into place when complete. Raises ResourceError if the disk
    is full.
    """
    try:
        return _prepare(resolved, on_read)
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        root = resolved.location.run_dir.root
        hint = "Free some space there, or give another --bundle-dir"
        raise ResourceError(Fault(str(root), f"it cannot be written ({error})", hint)) from error


def _prepare(resolved: ResolvedRun, on_read: Callable[[CorpusReading], None]) -> RunPlan:
    location = resolved.location
    with nullcontext(location.run_dir) if location.continues else new_bundle(location) as run_dir:
        notes, remarks = list(resolved.notes), [as_note(resolved.no_effect)] if resolved.no_effect else []
        data: TextData | PuzzlePlan
        if resolved.facts.task == "puzzle":
            config, data = resolved.config, _prepare_puzzles(resolved, run_dir)
        else:
            config, data = _prepare_text(resolved, run_dir, notes, remarks, on_read)
        keep_freed = check_resources(resolved.settings, config, resolved.devices, run_dir.root)
        start = resolved.settings.model.student_init
        if start is not None and not resolved.vocab_is_certain and resolved.location.checkpoint is None:
            check_start_weights(start, config)
        if resolved.facts.task == "lm" and resolved.location.source is None:
            _check_start_tokenizer(resolved.settings, TextTokenizer.load(run_dir.root))
        plan = _run_plan(resolved, config, data, notes, tuple(remarks), keep_freed_memory=keep_freed)
        if not resolved.location.continues:
            write_description(run_dir, plan)
    return plan


def _run_plan(
    resolved: ResolvedRun,
    config: ModelConfig,
    data: TextData | PuzzlePlan,
    notes: list[str],
    remarks: tuple[str, ...],
    *,
    keep_freed_memory: bool,
) -> RunPlan:
    settings, devices = resolved.settings, resolved.devices
    effective = effective_batch(settings, devices)
    first_rows = data.first_rows if isinstance(data, TextData) else data.rows
    schedule_steps = schedule_length(
        settings, data.rows or 0, effective, config.halt_max_steps, first_samples=first_rows
    )
    estimated = isinstance(data, TextData) and data.rows_estimated and schedule_steps != settings.run.step_limit
    if estimated and settings.optimizer.lr_schedule != "constant":
        notes.append(
            f"The learning-rate schedule has about {schedule_steps} steps, estimated from the beginning of "
            "the data; give --steps for a schedule that reaches its end exactly."
        )
    if settings.run.step_limit is None and settings.model.supervision == "segment":
        notes.append(
            f"The learning-rate schedule has {schedule_steps} steps, the most that {settings.run.epochs} "
            "epoch(s) can take when no puzzle halts early; give --steps for a schedule that reaches its end."
        )
    settings, shortened = fit_warmup(settings, schedule_steps)
    notes += shortened
    return RunPlan(
        settings=settings,
        config=config,
        data=data,
        bundle=resolved.location.run_dir.root,
        checkpoint=resolved.location.checkpoint,
        continues=resolved.location.continues,
        schedule_steps=schedule_steps,
        adaptive_lr=resolved.adaptive_lr,
        device=devices.device,
        world_size=devices.world_size,
        threads=devices.threads,
        ray_address=devices.ray_address,
        keep_freed_memory=keep_freed_memory,
        notes=tuple(notes),
        remarks=remarks,
    )


def _prepare_text(
    resolved: ResolvedRun,
    run_dir: RunDir,
    notes: list[str],
    remarks: list[str],
    on_read: Callable[[CorpusReading], None],
) -> tuple[ModelConfig, TextData]:
    settings = resolved.settings
    source = resolved.location.source
    if source is not None and not resolved.location.continues:
        # A branch goes on in the corpus of its checkpoint, so it knows that corpus from the start.
        run_dir.data.mkdir(parents=True, exist_ok=True)
        if source.has_ledger:
            copy_ledger(source.ledger, run_dir.ledger)
        for known in (TextDataDir(source.data).parts, TextDataDir(source.data).catalog):
            if known.is_file():
                shutil.copyfile(known, run_dir.data / known.name)
    rows = settings.data.eval_batches * effective_batch(settings, resolved.devices)
    stored = _stored_data(resolved.location)
    prepared = prepare_text(
        source_of(settings, evaluation=False),
        source_of(settings, evaluation=True) if resolved.evaluation is not None else None,
        bundle=run_dir.root,
        data=run_dir.data,
        choice=_tokenizer_choice(resolved),
        form=row_form(settings),
        chunking_config=chunking_config(settings),
        request=PrepareRequest(
            count=settings.run.epochs is not None and (stored is None or stored["rows"] is None),
            eval_rows=rows,
            max_val_examples=settings.data.max_val_examples,
            keep_evaluation=_same_evaluation(settings, resolved.location, run_dir, rows),
        ),
        on_read=on_read,
    )
    if prepared.notes and settings.cluster.strict:
        hint = "Correct the data or the option, or leave out --strict"
        raise SettingsError([Fault("--strict", note.rstrip("."), hint) for note in prepared.notes])
    notes.extend(prepared.notes)
    if prepared.account is not None:
        remarks.append(prepared.account)
    data = _text_data(settings, prepared, rows)
    if stored is not None:
        # Where the tokenizer came from when the run began.
        data = replace(data, tokenizer=stored["tokenizer"])
        if stored["rows"] is not None:
            # The length of the learning-rate schedule is kept, although more is known by now.
            counts = {name: stored[name] for name in ("rows", "first_rows", "rows_estimated")}
            data = replace(data, **counts)
    return replace(resolved.config, vocab_size=data.vocab_size), data


def _same_evaluation(settings: RunSettings, location: RunLocation, run_dir: RunDir, rows: int) -> bool:
    """Whether the bundle already contains the held-out data of these settings, in the same amount."""
    stored = _stored_data(location)
    if stored is None or not location.continues or stored["held_out"] != _held_out_name(settings):
        return False
    asked_then = (stored["held_out_rows"], stored["max_val_examples"])
    return asked_then == (rows, settings.data.max_val_examples)


def _check_start_tokenizer(settings: RunSettings, tokenizer: TextTokenizer) -> None:
    """Raises SettingsError if --student-init is a bundle with another tokenizer: its embeddings would be
    meaningless."""
    start = start_tokenizer(settings)
    if start is not None and TextTokenizer.load(start).fingerprint != tokenizer.fingerprint:
        reason = "its weights were trained with its own tokenizer, but another one was chosen"
        raise SettingsError(Fault(f"--student-init {start}", reason, f"Give --tokenizer-path {start}"))


def _tokenizer_choice(resolved: ResolvedRun) -> TokenizerChoice:
    """The tokenizer of the settings. A resumed run or a branch always keeps the tokenizer of its checkpoint, and
    --student-init brings the tokenizer of its bundle unless another is chosen."""
    data = resolved.settings.data
    start = start_tokenizer(resolved.settings)
    if resolved.location.source is None and start is not None and not asks_for_tokenizer(resolved.settings):
        return TokenizerChoice(str(start), 0, data.tokenizer_train_examples, retrain=False)
    if resolved.location.source is not None:
        return TokenizerChoice(None, resolved.config.vocab_size, data.tokenizer_train_examples, retrain=False)
    bounds = None
    if data.auto_vocab_size:
        corpus = (resolved.facts.bytes, data.max_train_examples)
        bounds = SizeBounds(data.min_vocab_size, data.max_vocab_size, *corpus)
    examples, retrain = data.tokenizer_train_examples, data.retrain_tokenizer
    is_demand = "data.vocab_size" in resolved.settings.given or data.auto_vocab_size
    return TokenizerChoice(
        data.tokenizer_path, fixed_vocabulary(resolved.settings), examples, retrain, bounds, is_demand
    )


def _text_data(settings: RunSettings, prepared: PreparedText, held_out_rows: int) -> TextData:
    counted = prepared.sequences
    return TextData(
        text=prepared.plan,
        path=settings.data.training_data,
        split=settings.data.split,
        held_out=_held_out_name(settings),
        held_out_rows=held_out_rows,
        max_val_examples=settings.data.max_val_examples,
        vocab_size=prepared.tokenizer.vocab_size,
        pad_id=prepared.tokenizer.pad_id,
        tokenizer=prepared.tokenizer_origin,
        rows=counted.count if counted is not None else None,
        first_rows=counted.first_epoch if counted is not None else None,
        rows_estimated=counted is not None and counted.estimated,
    )


def _prepare_puzzles(resolved: ResolvedRun, run_dir: RunDir) -> PuzzlePlan:
    settings = resolved.settings
    evaluation = source_of(settings, evaluation=True) if resolved.evaluation is not None else None
    prepared = prepare_puzzles(
        source_of(settings, evaluation=False),
        evaluation,
        max_train_examples=settings.data.max_train_examples,
        max_val_examples=settings.data.max_val_examples,
    )
    if not resolved.location.continues:
        write_json(run_dir.puzzle, prepared.train.plain())
        source = resolved.location.source
        if source is not None and source.has_ledger:
            copy_ledger(source.ledger, run_dir.ledger)  # of independent trainers
    _check_puzzles_unchanged(resolved.location, prepared.plan)
    return replace(
        prepared.plan, held_out_rows=settings.data.eval_batches * effective_batch(settings, resolved.devices)
    )


def _held_out_name(settings: RunSettings) -> str | None:
    """The held-out data of a run as `path:split`; None without evaluation."""
    if not has_evaluation(settings):
        return None
    source = source_of(settings, evaluation=True)
    return f"{source.path}:{source.split}"


def _stored_data(location: RunLocation) -> dict[str, Any] | None:
    if location.source is None:
        return None
    return stored_args(location.source)[1]


def _check_puzzles_unchanged(location: RunLocation, data: PuzzlePlan) -> None:
    """Raises DataError if a resumed run would read other puzzles, since its position in the data would be wrong; for
    text the catalog checks this."""
    stored = _stored_data(location)
    if stored is not None and stored["fingerprint"] != data.fingerprint:
        reason = "the data is not what the checkpoint was trained on (its fingerprint differs)"
        raise DataError(Fault(data.path, reason, CHANGED))
