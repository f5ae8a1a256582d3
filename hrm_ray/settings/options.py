"""The flat options of the command line, derived from the settings tree.

One job: say which options there are, what each means, and which leaf a spelling stands for. It reads no
arguments (`hrm_ray.cli.arguments` does) and checks no values (`load` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from hrm_ray.settings.base import plain_types
from hrm_ray.settings.tree import SECTIONS, leaf_keys


@dataclass(frozen=True)
class Alias:
    """Another spelling of a leaf; with `value`, a switch that sets the leaf to just that."""

    leaf: str
    value: str | None = None


ALIASES: dict[str, Alias] = {
    "--d-model": Alias("model.hidden_size"),
    "--no-moe": Alias("model.use_moe", "false"),
    "--no-rope": Alias("model.pos_encodings", "learned"),
    "--model": Alias("data.tokenizer_path"),
    "--seq-len": Alias("data.max_seq_len"),
    "--learning-rate": Alias("optimizer.lr"),
    "--use-mixed-precision": Alias("memory.amp", "true"),
    "--no-mixed-precision": Alias("memory.amp", "false"),
    "--use-lora": Alias("adapt.use_peft", "true"),
    "--no-use-lora": Alias("adapt.use_peft", "false"),
    "--lora-rank": Alias("adapt.lora_r"),
    "--save-dir": Alias("run.bundle_dir"),
    "--output-dir": Alias("run.bundle_dir"),
}
"""Spellings of the two older command lines (FEATURES.md)."""


@dataclass(frozen=True)
class Option:
    """One leaf as a flat option."""

    key: str
    """Dotted key of the leaf, such as `model.hidden_size`."""
    flag: str
    """The option itself, such as `--hidden-size`."""
    is_switch: bool
    choices: tuple[str, ...]
    default: Any
    help: str

    @property
    def off_flag(self) -> str:
        """The spelling that turns a switch off."""
        return f"--no-{self.flag[2:]}"

    @property
    def section(self) -> str:
        """The section its leaf is in."""
        return self.key.partition(".")[0]

    @property
    def aliases(self) -> tuple[str, ...]:
        """Its other spellings."""
        return tuple(name for name, alias in ALIASES.items() if alias.leaf == self.key)

    def written(self, value: Any) -> str:
        """How a user would give this option that value, such as `--lr 0.001` or `--no-packing`."""
        if self.is_switch and isinstance(value, bool):
            return self.flag if value else self.off_flag
        return f"{self.flag} {value}"


@dataclass(frozen=True)
class Spelling:
    """What a spelling on the command line means: its option, and the value it fixes (None: a value follows)."""

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
    for name, alias in ALIASES.items():
        table[name] = Spelling(options()[alias.leaf], alias.value)
    return table


def _option(key: str) -> Option:
    section, _, name = key.partition(".")
    field = SECTIONS[section].model_fields[name]
    types = plain_types(field.annotation)
    choices = tuple(str(choice) for kind in types if get_origin(kind) is Literal for choice in get_args(kind))
    return Option(
        key=key,
        flag=f"--{name.replace('_', '-')}",
        is_switch=types == (bool,),
        choices=choices,
        default=field.default,
        help=" ".join((field.description or "").split()),
    )
