"""Settings of one run: its name and folder, how long, what is saved and when.

One job: the leaves of section `run`, and how many weight updates follow from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field, field_validator

from hrm_ray.settings.base import Section, refusal

DEFAULT_STEPS = 200
"""Weight updates of a run for which neither steps nor epochs were given."""
DEFAULT_BUNDLE_DIR = Path("artifacts") / "brains"
DEFAULT_EXPERTS_DIR = Path("artifacts") / "experts"

Profile: TypeAlias = Literal["hrm-hf", "train-advanced"]

_NOT_IN_A_NAME = frozenset('/\\:*?"<>|')
"""Not allowed in file names on Windows or Linux."""


class RunSectionSettings(Section):
    """Name, length, checkpoints and logs."""

    profile: Profile = "hrm-hf"
    """Whose defaults hold where nothing is said: those of the HRM-HF trainer, or of the train_advanced script."""
    brain_name: str | None = None
    """Name of the bundle, a folder inside --bundle-dir (if not said: the name of the data)."""
    bundle_dir: Path | None = None
    """Folder of bundles (with --brain-name), or the bundle's own folder (alone); artifacts/brains if not said."""
    expert_id: str | None = None
    """Train one expert of a bundle (--student-init) and store it under this name in --experts-dir."""
    experts_dir: Path = DEFAULT_EXPERTS_DIR
    """Folder of stored experts and of their registry."""
    steps: int | None = Field(default=None, ge=1)
    """Weight updates to train for (if neither this nor --epochs is given: 200)."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data to train for; with --steps, whichever ends first."""
    iterate: bool = False
    """Begin one epoch after the other until the run is stopped."""
    stop_after_epoch: bool = False
    """End the run when an epoch ends."""
    stop_after_block: bool = False
    """End the run when a block ends; resumed, it goes on with the next one."""
    eval_every: int = Field(default=0, ge=0)
    """Weight updates between evaluations; 0 evaluates only at the end."""
    save_every: int = Field(default=200, ge=0)
    """Weight updates between checkpoints; 0 saves only at the end."""
    keep: int = Field(default=3, ge=1)
    """How many of the newest checkpoints are kept."""
    resume: bool = False
    """Go on from the newest checkpoint of the bundle."""
    resume_from: Path | None = None
    """Go on from this checkpoint."""
    stop_file: Path | None = None
    """When this file appears, the run finishes its step, saves and ends."""
    log_file: Path | None = None
    """Write the metrics, one JSON object per line, to this file too."""
    log_every: int = Field(default=10, ge=1)
    """Weight updates between lines of metrics."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Where all random numbers come from; same seed and set-up, same losses."""

    @field_validator("brain_name", "expert_id")
    @classmethod
    def _one_folder_name(cls, value: str | None) -> str | None:
        if value is not None and (_NOT_IN_A_NAME & set(value) or value.startswith(".") or value[-1] in ". "):
            raise refusal("cannot be the name of a folder", "Give letters, digits, - and _")
        return value

    @property
    def step_limit(self) -> int | None:
        """Weight updates after which the run ends; None where it is not steps that limit it."""
        unlimited = self.iterate or self.stop_after_epoch or self.stop_after_block
        return DEFAULT_STEPS if self.steps is None and self.epochs is None and not unlimited else self.steps
