"""Experts that were trained apart: a folder with ID/expert.safetensors for each and one registry.json.

Training an expert is a run like any other (model/transforms/single_expert.py freezes the rest).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from hrm_ray.bundle.store import read_description, save_copy
from hrm_ray.bundle.weights_file import read_tensors, save_tensors
from hrm_ray.errors import DataError, Fault, ResourceError, SettingsError
from hrm_ray.model.config import ModelConfig
from hrm_ray.rundir import RunDir, file_sha256, read_json, write_json
from hrm_ray.settings.faults import hint_of_name

EXPERT_FILE, REGISTRY_FILE = "expert.safetensors", "registry.json"
_LOCK_FILE = f"{REGISTRY_FILE}.lock"
_STACK = ".mlp.experts."
"""Part of the names of all stacked experts' tensors, and of no others."""
_FREE = frozenset({"seq_len", "dropout_rate", "moe_capacity_factor", "forward_dtype"})
"""Fields in which the configurations of models that share experts may differ: experts do not depend on them."""
_LOCK_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class StoredExpert:
    """One entry of the registry.

    `index` is the expert's number in every block; `base` and `base_sha256` the bundle it was trained in and its
    weights; `bundle` the run's own; `before` and `after` the held-out figures, where there were any.
    """

    index: int
    model_config: dict[str, Any]
    base: str
    base_sha256: str
    bundle: str
    step: int
    before: dict[str, float] | None
    after: dict[str, float] | None
    sha256: str
    written: str


def expert_tensors(weights: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The slices [out, in] of expert `index` in all stacks of `weights`, by the stacks' names."""
    return {name: tensor[index] for name, tensor in weights.items() if _STACK in name}


def with_expert(weights: Mapping[str, Tensor], expert: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """A copy of `weights` with the slices of expert `index` replaced."""
    whole = dict(weights)
    for name, tensor in expert.items():
        whole[name] = weights[name].clone()
        whole[name][index] = tensor
    return whole


def read_registry(folder: Path) -> dict[str, StoredExpert]:
    """All experts of a folder by id; none without a registry. Raises DataError for a file that is not a registry,
    SettingsError where the folder's path is a file."""
    in_the_way = next((place for place in (folder, *folder.parents) if place.is_file()), None)
    if in_the_way is not None:
        subject = "" if in_the_way == folder else f"{in_the_way} "
        raise SettingsError(Fault(f"--experts-dir {folder}", f"{subject}is a file, not a folder", "Give a folder"))
    path = folder / REGISTRY_FILE
    if not path.is_file():
        return {}
    plain = read_json(path)
    names = {field.name for field in fields(StoredExpert)}
    entries = plain.get("experts") if isinstance(plain, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(e, dict) and e.keys() == names for e in entries.values()):
        hint = "Restore the file from a copy, or use the version of hrm_ray that wrote it"
        raise DataError(Fault(str(path), "is not a registry of experts", hint))
    return {identifier: StoredExpert(**entry) for identifier, entry in entries.items()}


def check_place(folder: Path, identifier: str, bundle: Path) -> None:
    """Raises SettingsError if no expert of this name can be stored, or another run than `bundle` has stored one."""
    entry = read_registry(folder).get(identifier)
    # Some file systems ignore case.
    if identifier.lower() in (REGISTRY_FILE, _LOCK_FILE):
        reason = f"a file of {folder} has this name"
        raise SettingsError(Fault(f"--expert-id {identifier}", reason, "Give another --expert-id"))
    if (folder / identifier).is_file():
        reason = f"{folder / identifier} is a file, not a folder"
        raise SettingsError(Fault(f"--expert-id {identifier}", reason, "Give another --expert-id, or --experts-dir"))
    if entry is not None and entry.bundle != str(bundle):
        reason = f"{folder} has an expert of this name, trained in {entry.bundle}"
        raise SettingsError(Fault(f"--expert-id {identifier}", reason, "Give another --expert-id, or --experts-dir"))


def store_expert(folder: Path, identifier: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the expert's file, then its entry (without `sha256` and `written`), each atomically.

    Raises ResourceError where another run keeps the registry locked.
    """
    path = folder / identifier / EXPERT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = folder / _LOCK_FILE
    try:
        with FileLock(lock, timeout=_LOCK_TIMEOUT_S):
            registry = read_registry(folder)
            save_tensors(tensors, path)
            written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            registry[identifier] = StoredExpert(**entry, sha256=file_sha256(path), written=written)
            plain = {name: asdict(one) for name, one in sorted(registry.items())}
            write_json(folder / REGISTRY_FILE, {"experts": plain})
    except Timeout:
        reason = f"another run has been writing the registry for {_LOCK_TIMEOUT_S:g} s"
        raise ResourceError(Fault(str(lock), reason, "End that run, then continue with --resume")) from None


def read_expert(folder: Path, identifier: str) -> tuple[StoredExpert, dict[str, Tensor]]:
    """An expert's entry and tensors. Raises SettingsError for an unknown id, DataError for a changed file."""
    registry = read_registry(folder)
    if identifier not in registry:
        there = f"There are {', '.join(registry)}" if registry else "Train one with hrm-ray train --expert-id"
        reason = f"no expert of this name in {folder}"
        raise SettingsError(Fault(identifier, reason, hint_of_name(identifier, registry, there)))
    path, entry = folder / identifier / EXPERT_FILE, registry[identifier]
    tensors = read_tensors(path)
    if file_sha256(path) != entry.sha256:
        hint = "Copy the folder again from its source, or resume its run to write it anew"
        raise DataError(Fault(str(path), "its content is not what was stored (sha256 differs)", hint))
    return entry, tensors


def put_expert(folder: Path, identifier: str, into: Path, out: Path) -> StoredExpert:
    """Write the bundle `out`: a copy of `into` with the stored expert in it.

    Raises SettingsError for an unknown id or an existing folder, DataError for damaged files and other architectures.
    """
    entry, expert = read_expert(folder, identifier)
    config, sha256 = read_description(into)
    differs = differences(ModelConfig.from_plain(entry.model_config, str(folder / REGISTRY_FILE)), config)
    if differs:
        reason = f"expert {identifier} is of another architecture: {differs}"
        raise DataError(Fault(str(into), reason, f"Give a bundle of the same architecture, such as {entry.base}"))
    weights = read_tensors(RunDir(into).weights)
    _check_fit(weights, expert, entry.index, into)
    about = {"id": identifier, "index": entry.index, "sha256": entry.sha256, "into": str(into), "into_sha256": sha256}
    whole = with_expert(weights, expert, entry.index)
    save_copy(RunDir(into), out, lambda path: save_tensors(whole, path), expert=about)
    return entry


def differences(one: ModelConfig, other: ModelConfig) -> str:
    """The differences of two architectures that matter to an expert, as text; empty if there are none."""
    first, second = asdict(one), asdict(other)
    return ", ".join(
        f"{name} {first[name]}, not {second[name]}"
        for name in first
        if first[name] != second[name] and name not in _FREE
    )


def _check_fit(weights: Mapping[str, Tensor], expert: Mapping[str, Tensor], index: int, source: Path) -> None:
    there = {name: (tensor.shape, tensor.dtype) for name, tensor in expert_tensors(weights, index).items()}
    ours = {name: (tensor.shape, tensor.dtype) for name, tensor in expert.items()}
    wrong = sorted(name for name in there.keys() | ours.keys() if there.get(name) != ours.get(name))
    if wrong:
        reason = f"its experts are of another shape or type than the stored one, first {wrong[0]}"
        raise DataError(Fault(str(source), reason, "Give a bundle whose weights are of the same type"))
