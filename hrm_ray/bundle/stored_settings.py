"""The settings that a bundle was trained with, from its training_args.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.rundir import RunDir, read_json
from hrm_ray.settings.options import options
from hrm_ray.settings.tree import RunSettings, from_plain, to_dotted
from hrm_ray.settings.yaml_file import read_mapping


def stored_args(run_dir: RunDir) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and data of a bundle, as in its training_args.json. Raises DataError for other content."""
    plain = read_json(run_dir.training_args)
    if not isinstance(plain, dict) or not all(isinstance(plain.get(part), dict) for part in ("settings", "data")):
        raise _not_as_written(run_dir, "settings and data are not both in it")
    return plain["settings"], plain["data"]


def stored_leaves(run_dir: RunDir) -> dict[str, Any]:
    """The settings of a bundle by dotted key. Raises DataError."""
    return to_dotted(stored_settings(run_dir))


def stored_settings(run_dir: RunDir) -> RunSettings:
    """The settings of a bundle, also of one that an older version wrote. Raises DataError."""
    try:
        return _settings_of(stored_args(run_dir)[0])
    except SettingsError as error:
        raise _not_as_written(run_dir, "; ".join(f"{f.value}: {f.reason}" for f in error.faults)) from error


def run_described_by(config: Path | None) -> dict[str, Any] | None:
    """The settings of the run that a settings file describes, by dotted key, if it is the training_args.json of a
    bundle (or the same as YAML). Raises SettingsError where it is one of another version."""
    content = None if config is None or not config.is_file() else read_mapping(config, "--config")
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        return None
    return to_dotted(_settings_of(content["settings"])) | {"run.brain_name": None, "run.bundle_dir": None}


def _settings_of(plain: dict[str, Any]) -> RunSettings:
    """Stored settings, also of an older version. Raises SettingsError."""
    for option in options().values():
        section = plain.setdefault(option.section, {})
        if option.traits.legacy_default is not None and isinstance(section, dict):
            section.setdefault(option.name, option.traits.legacy_default)
    return from_plain(plain)


def _not_as_written(run_dir: RunDir, what: str) -> DataError:
    hint = "Restore the file from a copy of the bundle, or use the version of hrm_ray that wrote it"
    return DataError(Fault(str(run_dir.training_args), f"is not what hrm-ray train wrote ({what})", hint))
