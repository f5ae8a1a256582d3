"""Settings of one run: its name and folder, its length, and what is saved and when."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from hrm_ray.settings.base import Section, option, refusal
from hrm_ray.settings.duration import seconds_of
from hrm_ray.settings.needs import EVALUATION_OR_SAMPLE, NO_STEPS, ONE_EXPERT, RESUMED, TEXT

DEFAULT_STEPS = 200
"""Weight updates of a run for which neither steps nor epochs were given."""
DEFAULT_EXPERTS_DIR = Path("artifacts") / "experts"


_NOT_IN_A_NAME = frozenset('/\\:*?"<>|')
"""Not allowed in file names on Windows or Linux."""
SERVICES = ("wandb", "mlflow")
"""What --report-to can report to."""


class RunSectionSettings(Section):
    """Name, length, checkpoints and logs."""

    profile: Literal["hrm-hf", "train-advanced"] | None = option(
        None, "fixed", affects=("memory",), unset="defaults chosen from the data and the device"
    )
    """Set of defaults: those of the HRM-HF trainer (the default of train-actv1), or of the train_advanced script."""
    brain_name: str | None = option(None, "free", unset="the name of the data")
    """Name of the bundle, a folder inside --bundle-dir."""
    bundle_dir: Path | None = option(
        None,
        "free",
        aliases={"--save-dir": None, "--output-dir": None},
        unset="artifacts/brains, or the folder of --profile",
    )
    """Folder of bundles (with --brain-name), or the bundle's own folder (without)."""
    expert_id: str | None = option(None, "free", affects=("memory",), unset="the whole model is trained")
    """Train one expert of the bundle given by --student-init, and store it under this name in --experts-dir."""
    experts_dir: Path = option(DEFAULT_EXPERTS_DIR, "free", needs=(ONE_EXPERT,))
    """Folder of stored experts and their registry."""
    steps: int | None = option(None, "free", ge=1, unset="200 if --epochs is not given either")
    """Number of weight updates to train for."""
    epochs: int | None = option(
        None, "free", ge=1, unset="as many as --steps needs", aliases={"--num-train-epochs": None}
    )
    """Number of passes over the data to train for; with --steps, the run ends at whichever comes first."""
    iterate: bool = option(False, "free", needs=(NO_STEPS,))
    """Begin another epoch until the run is stopped."""
    stop_after_epoch: bool = option(False, "free")
    """End the run at the end of an epoch."""
    stop_after_block: bool = option(False, "free")
    """End the run at the end of a block; resumed, it continues with the next block."""
    eval_every: int = option(0, "free", ge=0, needs=(EVALUATION_OR_SAMPLE,), aliases={"--eval-steps": None})
    """Weight updates between evaluations; 0 evaluates only at the end."""
    sample_prompt: str | None = option(None, "free", needs=(TEXT,), unset="no text is generated")
    """Show how the model continues this text at each evaluation and at the end; without data to evaluate on, after
    --eval-every weight updates."""
    save_every: int = option(200, "free", ge=0, aliases={"--save-steps": None})
    """Weight updates between checkpoints; 0 saves only at the end."""
    keep: int = option(3, "free", ge=1, aliases={"--save-total-limit": None})
    """Number of newest checkpoints to keep."""
    resume: bool = option(False, "dropped")
    """Resume from the bundle's newest checkpoint."""
    auto_resume: bool = option(False, "dropped")
    """Resume from the bundle's newest whole checkpoint, or start the run where there is none: one command for a job
    queue. A run that has finished is left as it is. With --strict a damaged newest checkpoint is an error."""
    resume_from: Path | None = option(None, "dropped", unset="a new run")
    """Resume from this checkpoint."""
    new_ledger: bool = option(False, "dropped", needs=(RESUMED,))
    """Resume where ledger.sqlite is lost: read the data up to the checkpoint again, and write a new ledger of it."""
    max_time: str | None = option(None, "dropped", unset="no limit")
    """Save and end (exit code 75) before this much time has passed since this command was started, as 90s, 30m, 1h30m
    or 1:30:00; a number alone is seconds. Room is left for two steps, the evaluations that are due and the save, as
    long as the last ones took. A run that is complete before ends with exit code 0."""
    stop_file: Path | None = option(None, "free", unset="no file")
    """When this file appears, the run finishes its step, saves and ends."""
    log_file: Path | None = option(None, "free", unset="the bundle's metrics.jsonl alone")
    """Append the metrics to this file too, one JSON object per line; several runs may share it."""
    log_every: int = option(10, "free", ge=1, aliases={"--logging-steps": None})
    """Weight updates between lines of metrics."""
    report_to: str | None = option(None, "free", unset="none")
    """Report the metrics to wandb, mlflow, or both (wandb,mlflow); none and tensorboard report to no service, since
    TensorBoard files are written in any case."""
    seed: int = option(0, "fixed", ge=0, lt=2**63)
    """Random seed; the same seed and set-up give the same losses."""

    @field_validator("report_to")
    @classmethod
    def _known_services(cls, value: str | None) -> str | None:
        names = value.split(",") if value is not None else []
        unknown = [name for name in names if name not in (*SERVICES, "tensorboard", "none")]
        if unknown:
            raise refusal(f"{unknown[0]!r} is no service", f"Give {', '.join(SERVICES)}, tensorboard or none")
        if "none" in names and len(names) > 1:
            raise refusal("none stands alone", "Leave none out, or give nothing else")
        return value

    @field_validator("sample_prompt")
    @classmethod
    def _utf8(cls, value: str | None) -> str | None:
        try:
            (value or "").encode("utf-8")
        except UnicodeEncodeError:
            raise refusal("is not UTF-8 text", "Give text in UTF-8") from None
        return value

    @field_validator("max_time")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None and seconds_of(value) is None:
            raise refusal("is not a duration", "Give one like 90s, 30m, 1h30m or 1:30:00")
        return value

    @field_validator("brain_name", "expert_id")
    @classmethod
    def _one_folder_name(cls, value: str | None) -> str | None:
        if value is not None and (_NOT_IN_A_NAME & set(value) or value.startswith(".") or value[-1] in ". "):
            raise refusal("cannot be the name of a folder", "Give letters, digits, - and _")
        return value

    @property
    def services(self) -> list[str]:
        """The services that metrics are reported to, each once."""
        return [name for name in dict.fromkeys((self.report_to or "").split(",")) if name in SERVICES]

    @property
    def step_limit(self) -> int | None:
        """Weight updates after which the run ends; None if the run is not limited by steps."""
        unlimited = self.iterate or self.stop_after_epoch or self.stop_after_block
        return DEFAULT_STEPS if self.steps is None and self.epochs is None and not unlimited else self.steps

    @property
    def max_time_s(self) -> int | None:
        """The seconds of --max-time."""
        return None if self.max_time is None else seconds_of(self.max_time)
