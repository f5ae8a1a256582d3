"""A run that trains one expert of a bundle: the check before it, and the expert that it stores.

Freezing is in model/transforms/single_expert.py, files are in bundle/expert_store.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hrm_ray.bundle.expert_store import check_place, differences, expert_tensors, read_registry, store_expert
from hrm_ray.bundle.store import read_description
from hrm_ray.bundle.weights_file import read_tensors
from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.model.config import ModelConfig
from hrm_ray.rundir import RunDir, read_json
from hrm_ray.settings.tree import RunSettings


@dataclass
class ExpertRun:
    """The expert of a run; `before` are the held-out figures of the bundle that the run started from, if any."""

    base: str
    base_sha256: str
    before: dict[str, float] | None = None

    @classmethod
    def of_new_run(cls, settings: RunSettings) -> ExpertRun | None:
        """The expert of a new run; None where no single expert is trained."""
        start = settings.model.student_init
        if settings.run.expert_id is None or start is None:
            return None
        return cls(str(start), read_description(start)[1])

    def plain(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return asdict(self)

    def store(self, settings: RunSettings, run_dir: RunDir, step: int, figures: Mapping[str, float]) -> Path:
        """Store the expert of the run's final weights; returns its folder."""
        index, identifier = settings.model.expert_index, settings.run.expert_id
        if index is None or identifier is None:
            raise RuntimeError("a run of an expert has --expert-index and --expert-id")
        entry = {
            "index": index,
            "model_config": read_json(run_dir.config),
            "base": self.base,
            "base_sha256": self.base_sha256,
            "bundle": str(run_dir.root),
            "step": step,
            "before": self.before,
            "after": dict(figures) or None,
        }
        store_expert(settings.run.experts_dir, identifier, entry, expert_tensors(read_tensors(run_dir.weights), index))
        return settings.run.experts_dir / identifier


def with_expert_index(settings: RunSettings) -> tuple[RunSettings, list[str]]:
    """The settings with the expert that --expert-id trains: the first that the folder of stored experts has none of,
    and a note, unless --expert-index names one. Raises SettingsError where all are stored."""
    model, identifier = settings.model, settings.run.expert_id
    if identifier is None or model.expert_index is not None:
        return settings, []
    stored = read_registry(settings.run.experts_dir)
    taken = {entry.index for name, entry in stored.items() if name != identifier}
    index = next((number for number in range(model.num_experts) if number not in taken), None)
    if index is None:
        reason = f"all {model.num_experts} experts are stored in {settings.run.experts_dir} already"
        raise SettingsError(Fault(f"--expert-id {identifier}", reason, "Give --expert-index to train one again"))
    note = f"--expert-id {identifier}: expert {index} of every block is trained, the first that is not stored yet."
    return settings.model_copy(update={"model": model.model_copy(update={"expert_index": index})}), [note]


def check_expert_run(
    settings: RunSettings, config: ModelConfig, bundle: Path, *, resumes: bool, vocab_is_certain: bool = True
) -> None:
    """Raises SettingsError for a name that is taken, DataError where --student-init is no bundle of this architecture.

    A resumed run has its weights in the checkpoint, and its bundle of before may be gone. A vocabulary that is still to
    be trained is not compared.
    """
    identifier, start = settings.run.expert_id, settings.model.student_init
    if identifier is None or start is None:
        return
    check_place(settings.run.experts_dir, identifier, bundle)
    if resumes:
        return
    there = read_description(start)[0]
    differs = differences(there, config if vocab_is_certain else replace(config, vocab_size=there.vocab_size))
    if differs:
        reason = f"the expert would be of another architecture than this bundle: {differs}"
        raise DataError(Fault(str(start), reason, "Set the model options to those of the bundle"))
