"""Resolves the settings of a run against data, devices, folders and resources. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hrm_ray.bundle.start_weights import check_start_weights, start_weights
from hrm_ray.data.catalog import check_parts
from hrm_ray.data.detect import DataFacts, detect
from hrm_ray.data.file_systems import absolute, has_wildcards, is_local, real, require_path
from hrm_ray.data.named_tokenizer import absolute_name, has_chat_template, load_named
from hrm_ray.data.packing import RowForm
from hrm_ray.data.parts import list_parts, shared_part
from hrm_ray.data.puzzles.samples import open_puzzles
from hrm_ray.data.text_data import TextDataDir
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.launch.data_sources import has_evaluation, source_of
from hrm_ray.launch.defaults import account_of_defaults, with_checkpointing, with_defaults
from hrm_ray.launch.devices import Devices, choose_devices, visible_gpus
from hrm_ray.launch.fallbacks import settle_memory_options, without_effect_on
from hrm_ray.launch.preflight import check_launch, check_resources
from hrm_ray.launch.run_directory import RunLocation, check_effective_batch, check_own_files, locate_run, trained_with
from hrm_ray.metrics.reporters import check_reporters
from hrm_ray.model.config import ModelConfig, model_config
from hrm_ray.model.transforms.compile import compile_notes
from hrm_ray.rundir import MANIFEST, RunDir, read_json
from hrm_ray.settings.adaptive_lr import AdaptiveLrSettings, read_adaptive_lr
from hrm_ray.settings.needs import OWN_TOKENIZER, TRAINED_BEFORE, NoEffect
from hrm_ray.settings.options import options
from hrm_ray.settings.resolve import fit_warmup, moderate_lr, resolve_task, with_effective_batch
from hrm_ray.settings.rule import written
from hrm_ray.settings.rules import as_faults, without_effect
from hrm_ray.settings.tree import SECTIONS, RunSettings
from hrm_ray.train.attention_choice import flash_notes
from hrm_ray.train.expert_run import check_expert_run, with_expert_index


@dataclass(frozen=True)
class ResolvedRun:
    """What is known about a run before anything is written: resolved settings, data, devices, bundle, architecture."""

    settings: RunSettings
    facts: DataFacts
    evaluation: DataFacts | None
    devices: Devices
    location: RunLocation
    config: ModelConfig
    vocab_is_certain: bool
    """False where the vocabulary is still to be trained: it may come out smaller, or under --auto-vocab-size larger."""
    notes: tuple[str, ...]
    """Fallbacks and doubts that a person must see."""
    no_effect: tuple[NoEffect, ...]
    """Options that the user gave and that change nothing in this run."""
    adaptive_lr: AdaptiveLrSettings | None
    """What the file of --adaptive-lr-config says."""
    keep_freed_memory: bool
    """Whether workers on CPUs keep freed memory for the next tensor."""
    defaults: str | None
    """The defaults that were chosen from the data and the device, in a line; None where the size was given."""


def resolve(settings: RunSettings, *, checks_memory: bool = True) -> ResolvedRun:
    """Check everything that can be checked without writing: data, devices, names, resources. Raises HrmRayError.

    Without `checks_memory` the run may take more memory than there is.
    """
    if settings.data.training_data is None:
        hint = (
            "Give --dataset-file or --dataset-id; `hrm-ray data build text --out corpus` makes one without a download"
        )
        raise SettingsError(Fault("--dataset-file", "there is nothing to train on", hint))
    devices = choose_devices(settings.cluster)
    settings, facts, evaluation, notes = _resolve_data(_with_absolute_paths(settings), devices.device)
    # Some checks ask CUDA what it can do, and CUDA keeps to the GPUs that it sees the first time.
    with visible_gpus(devices):
        return _resolve_on(devices, settings, facts, evaluation, notes, checks_memory=checks_memory)


def _resolve_data(settings: RunSettings, device: str) -> tuple[RunSettings, DataFacts, DataFacts | None, list[str]]:
    """Facts about the training and held-out data, the settings resolved for them, and notes."""
    on_bad_row = settings.data.on_bad_row
    path = settings.data.dataset_file
    if settings.run.resume and path is not None and is_local(path) and not has_wildcards(path):
        require_path(Path(path), "If the data has moved, give its new place: --resume --dataset-file NEW_PLACE")
    facts = detect(source_of(settings, evaluation=False), on_bad_row)
    evaluation = detect(source_of(settings, evaluation=True), on_bad_row) if has_evaluation(settings) else None
    puzzle_len = facts.puzzle.seq_len if facts.puzzle is not None else None
    settings = resolve_task(with_defaults(settings, facts, device), facts.task, puzzle_len)
    if evaluation is not None and evaluation.task != facts.task:
        reason = f"contains {evaluation.task} data, but the training data is {facts.task}"
        raise DataError(Fault(evaluation.path, reason, "Give held-out data of the same kind"))
    notes: list[str] = []
    for each in (facts, evaluation):
        if each is not None and each.notes and settings.cluster.strict:
            raise DataError(Fault(each.path, each.notes[0].removesuffix("."), "Remove them, or leave out --strict"))
        notes += each.notes if each is not None else ()
    notes += _overlap_notes(settings, facts) if evaluation is not None else []
    if evaluation is not None and facts.puzzle is not None:
        open_puzzles(Path(evaluation.path), evaluation.split).fit_to(facts.puzzle)
    return settings, facts, evaluation, notes


def _resolve_on(
    devices: Devices,
    settings: RunSettings,
    facts: DataFacts,
    evaluation: DataFacts | None,
    notes: list[str],
    *,
    checks_memory: bool,
) -> ResolvedRun:
    if devices.device == "mps" and settings.model.loss == "stablemax":
        reason = "it is computed in float64, which this device does not have"
        raise SettingsError(Fault("--loss stablemax on mps", reason, "Give --loss softmax, or --device cpu"))
    _check_batch_sizes(settings, devices)
    settings = with_effective_batch(settings, devices.workers_of_an_update)
    no_effect = _without_effect(settings, facts, evaluation, devices.device)
    if settings.cluster.wait_for_resources is not None and devices.ray_address is None:
        option = f"--wait-for-resources {settings.cluster.wait_for_resources}"
        hint = "Leave it out, or give --ray-address"
        no_effect += (NoEffect(option, "no running cluster is used, and this machine does not grow", hint),)
    if settings.data.force_train and not TRAINED_BEFORE.holds(settings):
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"force_train": False})})
    for settle in (with_expert_index, moderate_lr):
        settings, settled = settle(settings)
        notes += settled
    if settings.run.step_limit is not None:
        settings, shortened = fit_warmup(settings, settings.run.step_limit)
        notes += shortened
    settings, fallbacks = settle_memory_options(settings, devices.device, trained_with(settings))
    notes += fallbacks
    check_launch(devices)
    location = locate_run(settings)
    if facts.task == "lm" and location.source is not None:
        # The cheap part of what the run checks, so that a dry run does not accept another corpus: names and sizes.
        known = TextDataDir(location.source.data)
        if known.parts.is_file():
            check_parts(known.read_parts(), list_parts(source_of(settings, evaluation=False)).parts)
    if settings.run.new_ledger and location.source is not None:
        if facts.task != "lm":
            no_effect += (NoEffect("--new-ledger", "a run on puzzles has no ledger"),)
        elif location.source.has_ledger:
            no_effect += (NoEffect("--new-ledger", "the ledger is there, and is kept"),)
    own_log = settings.run.log_file == location.run_dir.metrics
    if own_log:
        no_effect += (NoEffect(f"--log-file {settings.run.log_file}", "the run writes its metrics there anyway"),)
    if no_effect and settings.cluster.strict:
        raise SettingsError(as_faults(no_effect))
    if own_log:
        settings = settings.model_copy(update={"run": settings.run.model_copy(update={"log_file": None})})
    if location.damaged is not None and location.checkpoint is not None:
        notes.append(f"{location.damaged} is damaged: the run resumes from {location.checkpoint.name}.")
    if not settings.run.auto_resume:
        notes += _no_steps_left(settings, location)
    check_effective_batch(location, effective_batch(settings, devices), independent=devices.independent)
    check_own_files(settings, location)
    check_reporters(settings.run.services)
    if facts.puzzle is not None:
        config = _puzzle_config(settings, facts)
        certain = True
    else:
        vocab_size, certain = _expected_vocabulary(settings, location)
        config = model_config(settings, vocab_size)
    settings = with_checkpointing(settings, config, devices.device, devices.world_size)
    if not devices.ray_address:
        device = torch.device(devices.device)
        notes += flash_notes(settings, config, device) + compile_notes(settings, device)
    notes += _chunk_notes(settings) + _chat_notes(settings)
    keep_freed = check_resources(settings, config, devices, location.run_dir.root, checks_memory=checks_memory)
    resumes = location.checkpoint is not None
    check_expert_run(settings, config, location.run_dir.root, resumes=resumes, vocab_is_certain=certain)
    if settings.model.student_init is not None and not resumes:
        if certain:
            check_start_weights(settings.model.student_init, config)
        else:
            start_weights(settings.model.student_init, config)
    return ResolvedRun(
        settings,
        facts,
        evaluation,
        devices,
        location,
        config,
        certain,
        tuple(notes),
        no_effect,
        _adaptive_lr(settings),
        keep_freed,
        account_of_defaults(settings, config, devices.device, devices.threads),
    )


def _check_batch_sizes(settings: RunSettings, devices: Devices) -> None:
    """Raises SettingsError unless there is a batch size for each trainer, or one for all."""
    sizes = settings.cluster.batch_size_of_trainers
    if sizes and len(sizes) != devices.world_size:
        value = f"--batch-size {settings.cluster.trainer_batch_sizes}"
        reason = f"names {len(sizes)} batch sizes, and the run has {devices.world_size} trainer(s)"
        raise SettingsError(Fault(value, reason, f"Give one number for all, or --world-size {len(sizes)}"))


def _without_effect(
    settings: RunSettings, facts: DataFacts, evaluation: DataFacts | None, device: str
) -> tuple[NoEffect, ...]:
    """The options without effect on this data and device. Raises SettingsError under --strict."""
    found = without_effect(settings)
    has_columns = any(each.columns for each in (facts, evaluation) if each is not None)
    if facts.task == "lm" and "data.text_column" in settings.given and not has_columns:
        found.append(NoEffect(f"--text-column {settings.data.text_column}", "plain text files have no columns"))
    reasons = {
        "as_text": "no file is read only because of it",
        "delimiter": "no file is a .csv or .tsv",
        "text_rows": "no file is plain text",
    }
    for name, reason in reasons.items():
        unused = all(name in each.unused for each in (facts, evaluation) if each is not None)
        if facts.task == "lm" and f"data.{name}" in settings.given and unused:
            found.append(NoEffect(written(settings, f"data.{name}"), reason))
    found += without_effect_on(settings, device)
    if found and settings.cluster.strict:
        raise SettingsError(as_faults(found))
    return tuple(found)


def effective_batch(settings: RunSettings, devices: Devices) -> int:
    """Rows of one weight update over all workers that take it together."""
    chosen = settings.optimizer
    return chosen.batch_size * chosen.gradient_accumulation_steps * devices.workers_of_an_update


def row_form(settings: RunSettings) -> RowForm:
    """The form of the rows: length, packing, stride."""
    data = settings.data
    return RowForm(data.max_seq_len or 0, data.packing, prefix=settings.model.lm_mask == "prefix", stride=data.stride)


def start_tokenizer(settings: RunSettings) -> Path | None:
    """The bundle whose weights are started from, where it has a tokenizer: its embeddings belong to those tokens."""
    start = settings.model.student_init
    return start if start is not None and RunDir(start).tokenizer.is_file() else None


def fixed_vocabulary(settings: RunSettings) -> int:
    """The size of a vocabulary that the data does not choose, once the settings are resolved."""
    if settings.data.vocab_size is None:
        raise ValueError("the size of the vocabulary is not resolved; see launch.defaults")
    return settings.data.vocab_size


def asks_for_tokenizer(settings: RunSettings) -> bool:
    """Whether the user chose a tokenizer, or how one is to be trained."""
    trains_one = any(OWN_TOKENIZER in options()[key].traits.needs for key in settings.given)
    return settings.data.tokenizer_path is not None or trains_one


def _no_steps_left(settings: RunSettings, location: RunLocation) -> list[str]:
    """A note if a resumed run has no step left."""
    limit = settings.run.step_limit
    if location.checkpoint is None or limit is None:
        return []
    step: int = read_json(location.checkpoint / MANIFEST)["step"]
    if step < limit:
        return []
    return [f"The run is at step {step} already and --steps is {limit}: give more steps for it to train on."]


def _chunk_notes(settings: RunSettings) -> list[str]:
    """A note on what truncated gradients leave out."""
    memory = settings.memory
    one_chunk = memory.chunk_size >= (settings.data.max_seq_len or 0)
    if not memory.use_chunked_training or memory.chunk_gradients == "exact" or one_chunk:
        return []
    return [
        f"--use-chunked-training: gradients stop at the borders of chunks of {memory.chunk_size} tokens; the loss is "
        "that of the whole sequence. --chunk-gradients exact lets them through."
    ]


def _chat_notes(settings: RunSettings) -> list[str]:
    """A note if the tokenizer brings a chat template, which is not used."""
    data = settings.data
    if data.messages_column is None or data.tokenizer_path is None or not has_chat_template(data.tokenizer_path):
        return []
    return [
        f'--messages-column {data.messages_column}: chats are written as "User: ..." and "Assistant: ...", not with '
        "the tokenizer's chat template."
    ]


def _adaptive_lr(settings: RunSettings) -> AdaptiveLrSettings | None:
    """The thresholds of the learning-rate control; two windows at least must fit into a run. Raises SettingsError."""
    path, limit = settings.optimizer.adaptive_lr_config, settings.run.step_limit
    if path is None:
        return None
    rule = read_adaptive_lr(path)
    needed = settings.optimizer.warmup_steps + 2 * rule.window_steps
    if limit is not None and needed > limit:
        reason = (
            f"windows of {rule.window_steps} steps cannot act before step {needed}, but the run ends at step {limit}"
        )
        raise SettingsError(Fault(f"--adaptive-lr-config {path}", reason, "Lower window_steps, or give more --steps"))
    return rule


def _puzzle_config(settings: RunSettings, facts: DataFacts) -> ModelConfig:
    puzzle = facts.puzzle
    if puzzle is None:
        raise ValueError("the data is no puzzle set")
    return model_config(
        settings, puzzle.vocab_size, seq_len=puzzle.seq_len, puzzle_identifiers=puzzle.num_puzzle_identifiers
    )


def _expected_vocabulary(settings: RunSettings, location: RunLocation) -> tuple[int, bool]:
    """Tokens of the vocabulary as far as it is known before the data is read, and whether that is certain.

    Of a range that the data chooses from it is the smallest: a run must not be refused for a size it may never have;
    the plan asks for the resources again when the size is known.
    """
    if location.source is not None:
        return TextTokenizer.of_bundle(location.source.root).vocab_size, True
    if settings.data.tokenizer_path is not None:
        return load_named(settings.data.tokenizer_path).vocab_size, True
    start = start_tokenizer(settings)
    if start is not None and not asks_for_tokenizer(settings):
        return TextTokenizer.load(start).vocab_size, True
    bundle = location.run_dir
    if bundle.tokenizer.is_file() and not settings.data.retrain_tokenizer:
        return TextTokenizer.load(bundle.root).vocab_size, True
    return (settings.data.min_vocab_size if settings.data.auto_vocab_size else fixed_vocabulary(settings)), False


def _overlap_notes(settings: RunSettings, facts: DataFacts) -> list[str]:
    """A note if the same file is used for training and evaluation. Raises SettingsError under --strict."""
    train, held_out = source_of(settings, evaluation=False), source_of(settings, evaluation=True)
    both: str | None = None
    if real(train.path) == real(held_out.path) and train.split == held_out.split:
        both = train.path
    elif facts.task == "lm":
        both = shared_part(train, held_out)
    if both is None:
        return []
    reason = "it is in both training and held-out data, so evaluation does not measure generalisation"
    if settings.cluster.strict:
        hint = "Give --eval-file data that is not in --dataset-file, or --val-split another split"
        raise SettingsError(Fault(both, reason, hint))
    return [f"{both}: {reason}."]


def _with_absolute_paths(settings: RunSettings) -> RunSettings:
    """The settings with absolute paths: workers and later runs may have other working folders."""
    changed: dict[str, Any] = {}
    for section in SECTIONS:
        values = getattr(settings, section)
        paths = {name: value.absolute() for name, value in values if isinstance(value, Path)}
        changed[section] = values.model_copy(update=paths)
    data = changed["data"]
    addresses = {"dataset_file": data.dataset_file, "eval_file": data.eval_file}
    moved = {leaf: absolute(address) for leaf, address in addresses.items() if address is not None}
    if data.dataset_id is not None and Path(data.dataset_id).is_dir():
        moved["dataset_id"] = absolute(data.dataset_id)
    if data.tokenizer_path is not None:
        moved["tokenizer_path"] = absolute_name(data.tokenizer_path)
    changed["data"] = data.model_copy(update=moved)
    return settings.model_copy(update=changed)
