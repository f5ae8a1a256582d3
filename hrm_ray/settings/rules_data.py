"""Which leaves about the data cannot go together.

One job: those rules.
"""

from __future__ import annotations

from hrm_ray.errors import Fault
from hrm_ray.settings.hub_name import hub_name
from hrm_ray.settings.rule import Rule, said
from hrm_ray.settings.tree import RunSettings


def _one_training_set(settings: RunSettings) -> Fault | None:
    if settings.data.dataset_file is None or settings.data.dataset_id is None:
        return None
    return Fault(
        said(settings, "data.dataset_file", "data.dataset_id"), "both say what to train on", "Give one of the two"
    )


def _hub_config_once(settings: RunSettings) -> Fault | None:
    name, config = hub_name(settings.data.dataset_file or ""), settings.data.dataset_config
    if name is None or name.config is None or config is None or name.config == config:
        return None
    return Fault(
        said(settings, "data.dataset_file", "data.dataset_config"),
        f"the address names the configuration {name.config}, the option another one",
        "Name it once",
    )


def _hub_split_once(settings: RunSettings) -> Fault | None:
    """Only what this user said is refused: the split of an address stands above the default."""
    name, split = hub_name(settings.data.dataset_file or ""), settings.data.split
    if name is None or name.split is None or "data.split" not in settings.given or name.split == split:
        return None
    return Fault(
        said(settings, "data.dataset_file", "data.split"),
        f"the address names the split {name.split}, the option another one",
        "Name it once",
    )


def _hub_id_is_one(settings: RunSettings) -> Fault | None:
    given = settings.data.dataset_id
    if given is None or "://" not in given:
        return None
    return Fault(
        said(settings, "data.dataset_id"),
        "this is an address, not the id of a data set",
        "Give --dataset-id ORGANISATION/NAME, or the address to --dataset-file",
    )


DATA_RULES: tuple[Rule, ...] = (
    Rule("one_training_set", ("data.dataset_file", "data.dataset_id"), _one_training_set),
    Rule("hub_config_once", ("data.dataset_file", "data.dataset_config"), _hub_config_once),
    Rule("hub_split_once", ("data.dataset_file", "data.split"), _hub_split_once),
    Rule("hub_id_is_one", ("data.dataset_id",), _hub_id_is_one),
)
