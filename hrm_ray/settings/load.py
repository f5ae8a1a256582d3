"""Loads the settings: file, options, a resumed run and a trial become one validated tree, or a list of all faults.

Precedence: defaults < profile < bundle of --student-init < resumed run < preset < file < options < trial. A preset or
`num_layers`, wherever it is given, fills only leaves that the user did not set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hrm_ray.errors import Fault, SettingsError
from hrm_ray.settings.faults import fault_of_error, hint_of_name, nearest
from hrm_ray.settings.needs import NoEffect, overridden
from hrm_ray.settings.not_built import NOT_BUILT, not_built
from hrm_ray.settings.options import BOOLEAN_WORDS, Spelling, options, spellings
from hrm_ray.settings.presets import PRESETS, layer_leaves, preset_leaves
from hrm_ray.settings.profiles import PROFILES, profile_leaves
from hrm_ray.settings.rules import broken_rules
from hrm_ray.settings.tree import SECTIONS, RunSettings
from hrm_ray.settings.yaml_file import ParsedSource, is_recipe, read_settings_file, read_tree


def load_settings(
    flat_options: Mapping[str, str | bool],
    config_path: Path | None = None,
    base: Mapping[str, Any] | None = None,
    trial: Mapping[str, Any] | None = None,
    *,
    found: Sequence[Fault] = (),
    given_again: Sequence[NoEffect] = (),
    also_known: Iterable[str] = (),
    profile: str | None = None,
    architecture: Mapping[str, Any] | None = None,
) -> RunSettings:
    """One tree from the options, the settings file, a resumed run (`base`, dotted keys) and a trial's overrides.

    Options go by their spelling (`--lr`, `--no-rope`), or without the dashes; of two spellings of one option the later
    counts. `found` and `given_again` are the command line's faults and its options that were given again, reported
    together with those found here; `also_known` are a command's other options, for "the nearest is"; `profile` is
    that of a new run for which none is given; `architecture` are the leaves of the bundle that it starts from.
    Raises SettingsError with every fault.
    """
    user = _merged(
        [
            read_settings_file(config_path) if config_path is not None else ParsedSource(),
            read_options(flat_options, also_known),
            read_tree(trial or {}, "trial"),
        ]
    )
    several_in_one = isinstance(user.values.get("optimizer.batch_size"), str)
    _read_batch_sizes(user.values)
    traits = {key: option.traits for key, option in options().items()}
    dropped = {key for key in traits if traits[key].on_resume == "dropped"}
    resumed = read_tree({key: value for key, value in (base or {}).items() if key not in dropped}, "resumed run")
    faults = [*found, *resumed.faults, *user.faults]

    by_user = _filled(user.values)
    replaced = {old for key in by_user for old in (*traits[key].replaces, *traits[key].replaces_stored)}
    kept = {key: value for key, value in _filled(resumed.values).items() if key not in replaced}
    named = {"run.profile": profile} if profile is not None and base is None else {}
    profiled = profile_leaves(str({**named, **resumed.values, **user.values}.get("run.profile")))
    defaults = {**named, **profiled, **(architecture or {})}
    values = {**{key: value for key, value in defaults.items() if key not in replaced}, **kept, **by_user}
    given = frozenset(key for key, value in user.values.items() if value is not None)
    if several_in_one:
        given -= {"cluster.trainer_batch_sizes"}  # messages name what was written, --batch-size
    if is_recipe(config_path) and "run.steps" in read_options(flat_options).values:
        # A recipe's warm-up is meant for the recipe's steps: with others it gives way, as a default does.
        given -= {"optimizer.warmup_steps"} - read_options(flat_options).values.keys()
    quoted = {**resumed.quoted, **user.quoted}

    wrong = _wrong_leaves(values)
    for key, error in wrong.items():
        shown = quoted.get(key, f"{key} = {values[key]}")
        planned = not_built(f"{options()[key].flag} {values[key]}")
        faults.append(fault_of_error(error, shown) if planned is None else replace(planned, value=shown))
    settings = RunSettings.model_validate(
        {
            **_nested({key: value for key, value in values.items() if key not in wrong}),
            "given": given - set(wrong),
            "overridden": (*given_again, *user.overridden),
            "complete": base is not None,
        }
    )
    faults += broken_rules(settings, set(wrong) | _filled_by(wrong, user.values) | user.candidates | resumed.candidates)
    if faults:
        raise SettingsError(faults)
    return settings


def _read_batch_sizes(values: dict[str, Any]) -> None:
    """Take a --batch-size of several numbers, for independent trainers, apart: the largest is the batch size."""
    several = values.get("optimizer.batch_size", values.get("cluster.trainer_batch_sizes"))
    parts = several.split(",") if isinstance(several, str) else []
    if len(parts) > 1 and all(part.strip().isdecimal() and int(part) for part in parts):
        values["cluster.trainer_batch_sizes"] = several
        values["optimizer.batch_size"] = max(int(part) for part in parts)


def peek_leaves(
    flat_options: Mapping[str, str | bool], config_path: Path | None, keys: Sequence[str]
) -> dict[str, Any]:
    """A few leaves before the whole is loaded (which folder to resume, say), by dotted key.

    A wrong value counts as the default here; the load that follows reports it.
    """
    given = _merged(
        [read_settings_file(config_path) if config_path is not None else ParsedSource(), read_options(flat_options)]
    )
    wanted = {key: value for key, value in given.values.items() if key in keys}
    wrong = _wrong_leaves(wanted)
    settings = RunSettings.model_validate(_nested({key: wanted[key] for key in wanted if key not in wrong}))
    return {key: settings.leaf(key) for key in keys}


def read_options(flat_options: Mapping[str, str | bool], also_known: Iterable[str] = ()) -> ParsedSource:
    """Flat options as settings. A switch's value is True or text; a value option without its value is True."""
    parsed = ParsedSource()
    for name, value in flat_options.items():
        spelling = _spelling(name)
        shown = f"{name} {value or repr(value)}" if isinstance(value, str) else name
        if spelling is None:
            known = [*spellings(), *also_known, *NOT_BUILT]
            hint = hint_of_name(name, known, "`--help` lists the options")
            # Without its value: it may be a secret behind a misspelt name.
            unknown = Fault(name, "is not an option", hint)
            parsed.faults.append(not_built(f"--{name.removeprefix('--').replace('_', '-')}") or unknown)
            parsed.candidates.update(
                spellings()[near].option.key for near in nearest(name, known) if near in spellings()
            )
            continue
        key, meant = spelling.option.key, _meant(name, spelling, value)
        if meant is None:
            wrong = "needs a value" if spelling.fixed is None else "takes no value"
            example = f"Write {name} VALUE" if spelling.fixed is None else f"Write {name} alone"
            parsed.faults.append(Fault(shown, wrong, example))
            parsed.candidates.add(key)
        else:
            if key in parsed.values and str(parsed.values[key]).lower() != str(meant).lower():
                parsed.overridden.append(overridden(parsed.quoted[key], shown))
            parsed.values[key], parsed.quoted[key] = meant, shown
    return parsed


def _spelling(name: str) -> Spelling | None:
    """The option of a name: `--hidden-size`, `hidden_size` or `model.hidden_size`."""
    if name in options():
        name = options()[name].flag
    if name.startswith("--"):
        return spellings().get(name)
    return None if name.startswith("-") else spellings().get(f"--{name.replace('_', '-')}")


def _meant(name: str, spelling: Spelling, value: str | bool) -> str | bool | None:
    """The value that a spelling gives its leaf; None if a value is missing, or not allowed."""
    if spelling.fixed is None:
        return None if isinstance(value, bool) else str(value)
    if spelling.fixed is True:
        return value
    holds = value if isinstance(value, bool) else BOOLEAN_WORDS.get(value.lower())
    if holds is not False:
        return spelling.fixed if holds else None
    # `--no-amp false` is `--amp`, and `--ddp false` is `--no-ddp`.
    opposite = _spelling(f"--{name[5:]}" if name.startswith("--no-") else f"--no-{name[2:]}")
    return None if opposite is None else opposite.fixed


def _merged(sources: Sequence[ParsedSource]) -> ParsedSource:
    """The sources in one; later ones override earlier ones."""
    whole = ParsedSource()
    for source in sources:
        # A later source replaces the rivals of its options too, as an option replaces its own earlier value.
        for rival in {old for key in source.values for old in options()[key].traits.replaces} - source.values.keys():
            whole.values.pop(rival, None)
        whole.values.update(source.values)
        whole.quoted.update(source.quoted)
        whole.faults.extend(source.faults)
        whole.candidates.update(source.candidates)
        whole.overridden.extend(source.overridden)
    return whole


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with the leaves that their preset and number of layers fill below them."""
    preset = preset_leaves(str(values.get("model.model_preset")))
    number = str(values.get("model.num_layers"))
    layers = layer_leaves(int(number)) if number.isascii() and number.isdigit() and int(number) > 1 else {}
    return {**preset, **layers, **values}


def _filled_by(wrong: Iterable[str], given: Mapping[str, Any]) -> set[str]:
    """Leaves that a faulty profile, preset or number of layers would have filled, so that their value is unknown."""
    unknown: set[str] = set()
    if "run.profile" in wrong:
        unknown.update(key for leaves in PROFILES.values() for key in leaves)
    if "model.model_preset" in wrong:
        unknown.update(key for leaves in PRESETS.values() for key in leaves)
    if "model.num_layers" in wrong:
        unknown.update(layer_leaves(2))
    return unknown - set(given)


def _wrong_leaves(values: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves with a wrong value, each with its pydantic error."""
    wrong: dict[str, Any] = {}
    for section, leaves in _nested(values).items():
        try:
            SECTIONS[section].model_validate(leaves)
        except ValidationError as error:
            for each in error.errors():
                wrong.setdefault(f"{section}.{each['loc'][0]}", each)
    return wrong


def _nested(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, leaf = key.partition(".")
        tree.setdefault(section, {})[leaf] = value
    return tree
