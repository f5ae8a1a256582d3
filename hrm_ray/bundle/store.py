"""Bundles: a trained model's folder with config.json, weights, tokenizer or puzzle description, and metadata.

Reads and writes everything in the folder except checkpoints (see train/checkpoint.py).
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hrm_ray
from hrm_ray.atomic_files import atomic_directory
from hrm_ray.bundle.folder_watch import deleted
from hrm_ray.bundle.progress import Progress
from hrm_ray.bundle.weights_file import fill_module, read_tensors, save_tensors
from hrm_ray.data.tokenizer import CONFIG_FILE
from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.build import build_model
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.describe import count_parameters
from hrm_ray.model.transformer import Transformer
from hrm_ray.rundir import RunDir, file_sha256, read_json, write_json
from hrm_ray.types import StopReason

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""peft's names for the files of an adapter."""


@dataclass(frozen=True)
class BundleWeights:
    """A model's tensors under their plain names, and its adapters, if any, as (configuration, tensors)."""

    tensors: Mapping[str, Tensor]
    adapter: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None = None

    def write(self, run_dir: RunDir) -> None:
        save_tensors(self.tensors, run_dir.weights)
        if self.adapter is not None:
            run_dir.adapter.mkdir(exist_ok=True)
            save_tensors(self.adapter[1], run_dir.adapter / ADAPTER_WEIGHTS)
            write_json(run_dir.adapter / ADAPTER_CONFIG, self.adapter[0])


@dataclass(frozen=True)
class Bundle:
    """A model read from a bundle, in evaluation mode, with its stored settings."""

    run_dir: RunDir
    model: ActV1 | Transformer
    training_args: dict[str, Any]


def open_bundle(folder: Path, device: torch.device) -> Bundle:
    """Read a bundle (or a bundle's best/) onto `device`. Raises as `read_description` does, and for wrong weights."""
    run_dir = RunDir(folder)
    config, _ = read_description(folder)
    model = build_model(config)
    fill_module(model, read_tensors(run_dir.weights), str(run_dir.weights))
    return Bundle(run_dir, model.to(device).eval(), read_json(run_dir.training_args))


def read_description(folder: Path) -> tuple[ModelConfig, str]:
    """The architecture of a bundle, and the sha256 of its weights, which is verified.

    Raises SettingsError for a folder that does not exist, DataError for one that is not a whole bundle.
    """
    run_dir = RunDir(folder)
    if not folder.exists():
        raise SettingsError(Fault(str(folder), "no such bundle", "Give the folder that hrm-ray train wrote"))
    if not run_dir.config.is_file():
        reason = f"is not a bundle ({run_dir.config.name} is missing)"
        raise DataError(Fault(str(folder), reason, "Give the folder that hrm-ray train wrote"))
    if not run_dir.weights.is_file():
        hint = "Finish the run (hrm-ray train --resume), or give another bundle"
        raise DataError(Fault(str(run_dir.weights), "no final weights in the bundle", hint))
    architecture = read_json(run_dir.config)
    if not isinstance(architecture, dict):
        reason = "does not describe an architecture"
        raise DataError(Fault(str(run_dir.config), reason, "Restore the file from a whole bundle"))
    config = ModelConfig.from_plain(architecture, str(run_dir.config))
    metadata = read_json(run_dir.metadata)
    if not isinstance(metadata, dict) or "weights_sha256" not in metadata:
        reason = "does not say which weights were saved (weights_sha256 is missing)"
        raise DataError(Fault(str(run_dir.metadata), reason, "Restore the file, or resume the run to write it anew"))
    if file_sha256(run_dir.weights) != metadata["weights_sha256"]:
        hint = "Copy the bundle again from its source, or resume its run to write it anew"
        raise DataError(Fault(str(run_dir.weights), "its content is not what was saved (sha256 differs)", hint))
    return config, metadata["weights_sha256"]


def save_best(run_dir: RunDir, weights: BundleWeights, best: Mapping[str, Any]) -> None:
    """Write best/, a bundle with the weights of the best evaluation, atomically.

    Raises DataError where the bundle is gone, which is not made anew.
    """
    if not run_dir.root.is_dir():
        raise DataError(deleted(run_dir.root))
    described = _describing(run_dir)
    names = {path.name for path in (*described, run_dir.weights, run_dir.metadata, run_dir.adapter)}
    with atomic_directory(run_dir.best.root, overwrite=True, owned=frozenset(names), option="--bundle-dir") as building:
        for source in described:
            if source.is_file():
                shutil.copyfile(source, building / source.name)
        folder = RunDir(building)
        weights.write(folder)
        write_json(folder.metadata, _metadata(folder, best={**best}, step=best["step"]))


def save_copy(
    source: RunDir, out: Path, write_weights: Callable[[Path], object], *, overwrite: bool = False, **about: Any
) -> None:
    """Write the bundle `out`: the description of `source` with the weights that `write_weights` writes to the path
    that it is given; `about` goes into its metadata.

    Raises SettingsError where `out` exists; with `overwrite` only where it has other files than this function writes.
    """
    with atomic_directory(out, overwrite=overwrite, owned=copied_names(source)) as building:
        for path in _describing(source):
            if path.is_file():
                shutil.copyfile(path, building / path.name)
        folder = RunDir(building)
        write_weights(folder.weights)
        write_json(folder.metadata, _metadata(folder, **about))


def copied_names(source: RunDir) -> frozenset[str]:
    """The names of all files that `save_copy` may write."""
    return frozenset(path.name for path in (*_describing(source), source.weights, source.metadata))


def _describing(run_dir: RunDir) -> tuple[Path, ...]:
    """The files of a bundle that say what its weights are; not every bundle has all of them."""
    return (run_dir.config, run_dir.training_args, run_dir.tokenizer, run_dir.root / CONFIG_FILE, run_dir.puzzle)


def step_of_best(run_dir: RunDir) -> int | None:
    """The step of the weights in best/, None without them. Raises DataError for unreadable metadata."""
    metadata = run_dir.best.metadata
    return int(read_json(metadata)["step"]) if metadata.is_file() else None


def save_final(
    run_dir: RunDir,
    weights: BundleWeights,
    reason: StopReason,
    progress: Progress,
    epoch: int,
    figures: Mapping[str, float],
    best: Mapping[str, Any] | None,
) -> None:
    """Write model.safetensors and metadata.json of a run that has ended for `reason`."""
    weights.write(run_dir)
    about = _metadata(
        run_dir,
        ended=reason.value,
        step=progress.step,
        skipped_steps=progress.skipped_steps,
        trained_samples=progress.trained_samples,
        skipped_samples=progress.skipped_samples,
        epoch=epoch,
        figures=dict(figures),
        best=dict(best) if best is not None else None,
    )
    write_json(run_dir.metadata, about)


def _metadata(run_dir: RunDir, **about: Any) -> dict[str, Any]:
    return {
        "hrm_ray": hrm_ray.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "parameters": count_parameters(ModelConfig.from_plain(read_json(run_dir.config), str(run_dir.config))).total,
        "weights_sha256": file_sha256(run_dir.weights),
        **about,
    }
