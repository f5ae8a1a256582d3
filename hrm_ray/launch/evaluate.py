"""Held-out figures of a trained model on any data: those that its run's evaluations give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm_ray.bundle.progress import STATE
from hrm_ray.bundle.store import read_description
from hrm_ray.bundle.stored_settings import stored_args, stored_settings
from hrm_ray.bundle.weights_file import fill_module, read_tensors
from hrm_ray.data.detect import detect
from hrm_ray.data.file_systems import has_wildcards, is_local
from hrm_ray.data.packing import TextSamples
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.prepare import PuzzlePlan, held_out_documents, open_puzzle_sets
from hrm_ray.data.puzzles.format import PuzzleFacts
from hrm_ray.data.puzzles.samples import open_puzzles, puzzle_splits
from hrm_ray.data.text_data import TextDataDir
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.launch.data_sources import chunking_config, source_of
from hrm_ray.model.build import build_model
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.transforms.cast_weights import cast_weights
from hrm_ray.rundir import MANIFEST, RunDir, read_json, verify_checkpoint
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import objective_of
from hrm_ray.train.evaluate import EvalSet, evaluate
from hrm_ray.train.plan import TextData
from hrm_ray.train.precision import NARROW, activation_dtype, choose_precision
from hrm_ray.train.strategies.single import AVERAGE, WEIGHTS
from hrm_ray.train.world import World
from hrm_ray.types import SampleSet

SEQUENCES = 1000
"""Sequences that are read of other text than a run's own, where no limit is given. Of puzzles all are."""
_NO_DATA = "Give --dataset-file with data to evaluate on"


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model. `data` names what it was evaluated on, `step` the weight updates of its training."""

    bundle: str
    step: int | None
    data: str
    figures: dict[str, float]
    notes: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """JSON values."""
        return {"bundle": self.bundle, "step": self.step, "data": self.data, **self.figures}


@dataclass(frozen=True)
class _Stored:
    """A trained model's parts. `home` is the bundle of its run, which has the held-out data."""

    home: RunDir
    described: RunDir
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    step: int | None


def evaluate_bundle(
    folder: Path, *, dataset_file: str | None = None, split: str | None = None, limit: int | None = None, device: str
) -> Evaluation:
    """Evaluate a bundle, its best/, or a checkpoint (BUNDLE/checkpoints/step_N) on `device` (cpu, cuda, xpu, mps).

    Without `dataset_file` on the data that the run was evaluated on, as many samples as the run read; else on a split
    of `dataset_file`. `limit` is the largest number of sequences or puzzles. Raises SettingsError where there is no
    such data, DataError for a damaged bundle or data of the other kind.
    """
    stored = _read(folder)
    settings = stored_settings(stored.described)
    kind = torch.device(device)
    config = replace(stored.config, forward_dtype=activation_dtype(settings.memory, kind))
    samples, name, count, notes = _samples(stored, settings, dataset_file, split, limit or SEQUENCES)
    model = build_model(config)
    fill_module(model, stored.tensors, str(folder))
    memory = settings.memory
    if memory.model_dtype != "fp32":
        cast_weights(model, NARROW[memory.model_dtype])
    objective = objective_of(model, settings).to(kind)
    world = World(0, 1, kind, False)
    precision = choose_precision(memory.amp is True, memory.amp_dtype, memory.model_dtype, kind)
    count = min(limit or count, len(samples))
    batch_size = settings.optimizer.batch_size
    held_out = EvalSet(samples, batch_size, -(-count // batch_size), count)
    with precision.computing(kind):
        figures = evaluate(objective, held_out, world)
    return Evaluation(str(folder), stored.step, name, figures, tuple(notes))


def _read(folder: Path) -> _Stored:
    checkpoint = folder.absolute()
    if (checkpoint / MANIFEST).is_file() or checkpoint.parent.name == "checkpoints":
        return _read_checkpoint(checkpoint)
    run_dir = RunDir(folder)
    config, _ = read_description(folder)
    metadata = read_json(run_dir.metadata)
    parent = RunDir(checkpoint.parent)
    home = parent if parent.best.root == checkpoint and parent.training_args.is_file() else run_dir
    return _Stored(home, run_dir, config, read_tensors(run_dir.weights), metadata.get("step"))


def _read_checkpoint(folder: Path) -> _Stored:
    verify_checkpoint(folder)
    home = RunDir(folder.parent.parent)
    if stored_settings(home).adapt.use_peft:
        reason = "a checkpoint of adapters holds them apart from the weights"
        raise SettingsError(Fault(str(folder), reason, f"Give the bundle, {home.root}"))
    config = ModelConfig.from_plain(read_json(home.config), str(home.config))
    tensors = read_tensors(folder / WEIGHTS)
    if (folder / AVERAGE).is_file():
        # The run evaluates the moving average.
        average = read_tensors(folder / AVERAGE)
        tensors |= {name: average[name].to(tensors[name].dtype) for name in average}
    return _Stored(home, home, config, tensors, int(read_json(folder / STATE)["progress"]["step"]))


def _samples(
    stored: _Stored, settings: RunSettings, dataset_file: str | None, split: str | None, sequences: int
) -> tuple[SampleSet, str, int, list[str]]:
    """The samples, the name of the data, how many are evaluated by default, and warnings. Of other text than the run's
    own as much is read as gives `sequences`."""
    plain = stored_args(stored.described)[1]
    if dataset_file is None:
        if split is not None:
            raise SettingsError(Fault(f"--split {split}", "no data set is named", "Give --dataset-file too"))
        samples, name, count = _own_samples(stored, settings, plain)
        return samples, name, count, []

    def of_split(named: str | None) -> tuple[RunSettings, TextSource]:
        data = settings.data.model_copy(update={"eval_file": dataset_file, "val_split": named})
        changed = settings.model_copy(update={"data": data})
        return changed, source_of(changed, evaluation=True)

    if split is None and is_local(dataset_file) and not has_wildcards(dataset_file):
        split = _test_split(of_split("test")[1])
    settings, source = of_split(split)
    data = settings.data
    task = detect(source, data.on_bad_row).task
    if task != plain["task"]:
        kinds = {"lm": "text", "puzzle": "puzzles"}
        reason = f"contains {kinds[task]}, and the model was trained on {kinds[plain['task']]}"
        raise DataError(Fault(dataset_file, reason, "Give data of the same kind"))
    if task == "puzzle":
        named = split or ("test" if "test" in puzzle_splits(Path(dataset_file)) else "train")
        puzzles = open_puzzles(Path(dataset_file), named)
        puzzles.fit_to(PuzzleFacts.from_plain(read_json(stored.described.puzzle)))
        return puzzles, f"{dataset_file}:{named}", len(puzzles), []
    text = TextData.from_plain(plain).text
    chunking = replace(chunking_config(settings), max_train_examples=None)
    tokenizer = TextTokenizer.of_bundle(stored.described.root)
    documents, notes = held_out_documents(source, tokenizer, text.form, chunking, sequences)
    return TextSamples(documents, text.form), f"{source.path}:{source.split}", sequences, notes


def _test_split(source: TextSource) -> str | None:
    """The split test, where the data has one: what else it has was perhaps trained on."""
    try:
        list_parts(source)
    except DataError:
        return None
    return source.split


def _own_samples(stored: _Stored, settings: RunSettings, plain: Mapping[str, Any]) -> tuple[SampleSet, str, int]:
    """What the run was evaluated on."""
    none = Fault(str(stored.home.root), "its run had no held-out data", _NO_DATA)
    if plain["task"] == "puzzle":
        plan = PuzzlePlan.from_plain(plain)
        _, held_out = open_puzzle_sets(plan)
        if held_out is None:
            raise SettingsError(none)
        count = plan.held_out_rows
        if count is None:
            # Version 0.1 did not store it; its worker count is known only where it was given.
            chosen, workers = settings.optimizer, settings.cluster.world_size or 1
            count = settings.data.eval_batches * chosen.batch_size * chosen.gradient_accumulation_steps * workers
        return held_out, f"{plan.eval_path}:{plan.eval_split}", count
    data, folder = TextData.from_plain(plain), TextDataDir(stored.home.data)
    if data.text.evaluation is None or data.held_out is None:
        raise SettingsError(none)
    if not folder.evaluation(data.text.evaluation).is_file():
        reason = "the held-out documents of its run are not in it"
        raise SettingsError(Fault(str(stored.home.root), reason, _NO_DATA))
    samples = TextSamples(folder.read_evaluation(data.text.evaluation), data.text.form)
    return samples, data.held_out, data.held_out_rows
