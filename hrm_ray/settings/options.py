"""The flat options of the command line, derived from the fields of the settings tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from hrm_ray.settings.base import Traits, plain_types
from hrm_ray.settings.tree import SECTIONS, leaf_keys

BOOLEAN_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""Words that may follow a switch."""

_VALUE_NAMES = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Option:
    """One leaf as a flat option."""

    key: str
    """Dotted key of the leaf, such as `model.hidden_size`."""
    flag: str
    """The option itself, such as `--hidden-size`."""
    is_switch: bool
    value: str
    """What follows it: INT, FLOAT, PATH, TEXT, or its choices with | between them."""
    choices: tuple[str, ...]
    default: Any
    help: str
    traits: Traits

    @property
    def off_flag(self) -> str:
        """The spelling that turns a switch off."""
        return f"--no-{self.flag[2:]}"

    @property
    def section(self) -> str:
        """The section its leaf is in."""
        return self.key.partition(".")[0]

    @property
    def name(self) -> str:
        """The leaf's name in its section."""
        return self.key.partition(".")[2]

    def written(self, value: Any) -> str:
        """How a user would give this option that value, such as `--lr 0.001` or `--no-packing`."""
        if self.is_switch and isinstance(value, bool):
            return self.flag if value else self.off_flag
        return f"{self.flag} {value}"

    def described(self, value: Any) -> str:
        """The value for a message; where it is None, what the option does by default. A switch is named with it."""
        if value is None:
            return f"the default ({self.traits.unset})"
        return self.written(value) if self.is_switch else str(value)


@dataclass(frozen=True)
class Spelling:
    """The meaning of a spelling on the command line: its option, and the value that it sets (None: a value follows)."""

    option: Option
    fixed: bool | str | None


@cache
def options() -> Mapping[str, Option]:
    """Every option by the dotted key of its leaf, in the order of the tree."""
    return {key: _option(key) for key in leaf_keys()}


@cache
def spellings() -> Mapping[str, Spelling]:
    """Every accepted spelling, aliases and `--no-` forms included."""
    table: dict[str, Spelling] = {}
    for option in options().values():
        table[option.flag] = Spelling(option, True if option.is_switch else None)
        if option.is_switch:
            table[option.off_flag] = Spelling(option, False)
        for alias, fixed in option.traits.aliases.items():
            table[alias] = Spelling(option, fixed)
    return table


def value_name(annotation: Any) -> str:
    """What help pages call the values of a type: INT, FLOAT, PATH, TEXT, or its choices with | between them."""
    names: list[str] = []
    for kind in plain_types(annotation):
        if get_origin(kind) is Literal:
            names += map(str, get_args(kind))
        else:
            names.append(value_name(get_args(kind)[0]) if get_origin(kind) is list else _VALUE_NAMES[kind])
    return "|".join(names)


def _option(key: str) -> Option:
    section, _, name = key.partition(".")
    field = SECTIONS[section].model_fields[name]
    traits = field.json_schema_extra
    if not isinstance(traits, Traits):
        raise TypeError(f"{key} is not declared with option()")
    types = plain_types(field.annotation)
    choices = tuple(str(choice) for kind in types if get_origin(kind) is Literal for choice in get_args(kind))
    return Option(
        key=key,
        flag=f"--{name.replace('_', '-')}",
        is_switch=types == (bool,),
        value=value_name(field.annotation),
        choices=choices,
        default=field.default,
        help=" ".join((field.description or "").split()),
        traits=traits,
    )
