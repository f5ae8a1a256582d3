"""The file of --adaptive-lr-config: when the learning rate is lowered, and by how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from hrm_ray.errors import Fault, SettingsError
from hrm_ray.settings.base import Section
from hrm_ray.settings.faults import fault_of_error, hint_of_name
from hrm_ray.settings.yaml_file import read_mapping

OPTION = "--adaptive-lr-config"


class AdaptiveLrSettings(Section):
    """Thresholds of the control by the loss trend; a window's loss is the mean over its weight updates and all ranks.

    Shares are relative: 0.01 of a loss of 2.0 is 0.02 nats.
    """

    window_steps: int = Field(default=100, ge=1)
    """Weight updates in a window; windows begin after the warm-up."""
    min_improvement: float = Field(default=0.01, ge=0, lt=1)
    """Share by which a window's loss must be below the best one to count as an improvement."""
    plateau_windows: int = Field(default=3, ge=1)
    """Consecutive windows without an improvement that count as a plateau."""
    plateau_factor: float = Field(default=0.5, gt=0, lt=1)
    """Factor that multiplies the learning rate at a plateau."""
    divergence_rise: float = Field(default=0.2, gt=0)
    """Share by which a window's loss must be above the best one to count as divergence."""
    divergence_factor: float = Field(default=0.25, gt=0, lt=1)
    """Factor that multiplies the learning rate at divergence; at most plateau_factor."""
    cooldown_windows: int = Field(default=1, ge=0)
    """Windows that are ignored after a change, while the loss settles."""
    min_factor: float = Field(default=0.01, gt=0, le=1)
    """Smallest factor on the schedule's learning rate."""


def read_adaptive_lr(path: Path) -> AdaptiveLrSettings:
    """The thresholds in a YAML or JSON file; what it leaves out has its default. Raises SettingsError, all at once."""
    content = read_mapping(path, OPTION)
    if isinstance(content, Fault):
        raise SettingsError(content)
    known = AdaptiveLrSettings.model_fields
    faults = [_unknown(str(key), value, path) for key, value in content.items() if key not in known]
    try:
        settings = AdaptiveLrSettings.model_validate({key: content[key] for key in content if key in known})
    except ValidationError as error:
        faults += [fault_of_error(each, _quoted(each["loc"][0], each["input"], path)) for each in error.errors()]
    else:
        if settings.divergence_factor > settings.plateau_factor:
            reason = f"is above plateau_factor {settings.plateau_factor}, but divergence must not lower the rate less"
            quoted = _quoted("divergence_factor", settings.divergence_factor, path)
            faults.append(Fault(quoted, reason, f"Give {settings.plateau_factor} or less"))
    if faults:
        raise SettingsError(faults)
    return settings


def _unknown(key: str, value: Any, path: Path) -> Fault:
    known = AdaptiveLrSettings.model_fields
    return Fault(
        _quoted(key, value, path), "is not a setting", hint_of_name(key, known, f"Known are {', '.join(known)}")
    )


def _quoted(key: Any, value: Any, path: Path) -> str:
    return f"{key} = {value} ({OPTION} {path})"
