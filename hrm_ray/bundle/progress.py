"""The progress of a run, as checkpoints and bundles store it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from hrm_ray.errors import DataError
from hrm_ray.rundir import RunDir, read_json

STATE = "state.json"
"""The file of a checkpoint that holds its progress."""


@dataclass
class Progress:
    """Weight updates (`step`), batches taken (`batch_idx`), skipped updates in a row (`bad_steps`) and in total.

    A skipped update had non-finite gradients: its samples were read and not learned. The two counts of samples are None
    in a run that began before checkpoints had them.
    """

    step: int = 0
    batch_idx: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    trained_samples: int | None = 0
    skipped_samples: int | None = 0

    @classmethod
    def from_plain(cls, plain: dict[str, int | None]) -> Progress:
        """The progress of a checkpoint's JSON, also of one without counts of samples."""
        return cls(**{"trained_samples": None, "skipped_samples": None, **plain})  # type: ignore[arg-type]

    def count_samples(self, samples: int, *, skipped: bool) -> None:
        """Add the samples of one update."""
        if skipped and self.skipped_samples is not None:
            self.skipped_samples += samples
        elif not skipped and self.trained_samples is not None:
            self.trained_samples += samples


def has_carries(checkpoint: Path) -> bool:
    """Whether a checkpoint has rows in the middle of their segments: not before the first step, nor just after
    independent trainers."""
    with safe_open(checkpoint / "slots_00000000.safetensors", framework="numpy") as file:
        return "carry.z_h" in set(file.keys())


def stored_counts(run_dir: RunDir) -> dict[int, tuple[int | None, int | None]]:
    """By step: samples trained and skipped, as each checkpoint of a bundle has counted them."""
    found = {}
    for step in run_dir.checkpoint_steps():
        try:
            progress = Progress.from_plain(read_json(run_dir.checkpoint(step) / STATE)["progress"])
        except DataError:
            continue  # deleted meanwhile by the run; a damaged checkpoint is reported where a run resumes from it
        found[step] = progress.trained_samples, progress.skipped_samples
    return found
