"""The settings tree: its sections and which leaves the user set; to and from plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_serializer

from hrm_ray.errors import Fault, SettingsError
from hrm_ray.settings.adapt import AdaptSettings
from hrm_ray.settings.base import Section
from hrm_ray.settings.cluster import ClusterSettings
from hrm_ray.settings.data import DataSettings
from hrm_ray.settings.faults import fault_of_error
from hrm_ray.settings.memory import MemorySettings
from hrm_ray.settings.model import ModelSettings
from hrm_ray.settings.needs import NoEffect
from hrm_ray.settings.optimizer import OptimizerSettings
from hrm_ray.settings.run import RunSectionSettings

SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "memory": MemorySettings,
    "adapt": AdaptSettings,
    "cluster": ClusterSettings,
    "run": RunSectionSettings,
}


class RunSettings(BaseModel):
    """All settings of a run, validated and frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True)

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    memory: MemorySettings = MemorySettings()
    adapt: AdaptSettings = AdaptSettings()
    cluster: ClusterSettings = ClusterSettings()
    run: RunSectionSettings = RunSectionSettings()
    given: frozenset[str] = frozenset()
    """Dotted keys that the user of this run set, in the file, on the command line or in a trial: not presets, defaults
    or the settings of a resumed run. Options that change nothing are noted only if they are in it."""
    overridden: tuple[NoEffect, ...] = ()
    """What the user gave before the same option with another value."""

    complete: bool = False
    """Whether they are those of an earlier run, for which all defaults have been chosen."""

    @field_serializer("given", when_used="json")
    def _given_in_order(self, given: frozenset[str]) -> list[str]:
        return sorted(given)

    def leaf(self, dotted: str) -> Any:
        """The value of a leaf by its dotted key, such as `model.hidden_size`."""
        section, _, name = dotted.partition(".")
        part: Section = getattr(self, section)
        return getattr(part, name)

    def with_leaves(self, leaves: Mapping[str, Any]) -> RunSettings:
        """The same settings with these leaves, by dotted key; they are not checked."""
        changed: dict[str, dict[str, Any]] = {}
        for key, value in leaves.items():
            section, _, name = key.partition(".")
            changed.setdefault(section, {})[name] = value
        sections: dict[str, Section] = {name: getattr(self, name) for name in changed}
        return self.model_copy(update={name: part.model_copy(update=changed[name]) for name, part in sections.items()})


def leaf_keys() -> Iterator[str]:
    """Every leaf's dotted key, in the order of the tree."""
    for section, kind in SECTIONS.items():
        for name in kind.model_fields:
            yield f"{section}.{name}"


def to_plain(settings: RunSettings) -> dict[str, Any]:
    """The whole tree as nested dictionaries that JSON can hold; paths become text."""
    return settings.model_dump(mode="json")


def from_plain(plain: Mapping[str, Any]) -> RunSettings:
    """The tree back from `to_plain`'s dictionaries.

    Raises SettingsError for anything that is not such a dictionary.
    """
    try:
        return RunSettings.model_validate(dict(plain))
    except ValidationError as error:
        raise SettingsError([_fault_of_stored(each) for each in error.errors()]) from None


def to_dotted(settings: RunSettings) -> dict[str, Any]:
    """Every leaf by its dotted key, values as in `to_plain`; what `load_settings` takes as `base`."""
    plain = to_plain(settings)
    return {key: plain[key.partition(".")[0]][key.partition(".")[2]] for key in leaf_keys()}


def _fault_of_stored(error: Any) -> Fault:
    dotted = ".".join(str(part) for part in error["loc"])
    return fault_of_error(error, f"{dotted} = {error['input']} (stored settings)")
