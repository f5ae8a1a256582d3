"""Commands that take the flat options of the settings: their arguments and their help page.

Values are not checked here: `hrm_ray.settings.load` reports every fault in one message, those found here included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import typer

from hrm_ray.cli.help_page import Row, page
from hrm_ray.errors import Fault
from hrm_ray.settings.faults import nearest
from hrm_ray.settings.needs import NoEffect, overridden
from hrm_ray.settings.not_built import NOT_BUILT, SWITCHES, not_built
from hrm_ray.settings.options import BOOLEAN_WORDS, Option, options, spellings


@dataclass
class Arguments:
    """The parsed command line."""

    options: dict[str, str | bool] = field(default_factory=dict)
    """By spelling, in the order of their last occurrence; True for a switch, and for an option whose value is missing.
    Unknown options are here too."""
    own: dict[str, str | bool] = field(default_factory=dict)
    """The command's own options, such as --config, which are no leaves of the settings."""
    positional: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    overridden: list[NoEffect] = field(default_factory=list)
    """Options that are given again with another value, which is the one that counts."""

    @property
    def config(self) -> Path | None:
        """The settings file of --config."""
        return Path(str(self.own["--config"])) if "--config" in self.own else None

    def number(self, name: str, *, whole: bool, above: float) -> float | None:
        """One of the command's own options as a number above a bound; adds a fault if it is not one."""
        text = self.own.get(name)
        if not isinstance(text, str):
            return None
        try:
            number = int(text) if whole else float(text)
        except ValueError:
            number = above
        if above < number < float("inf"):
            return number
        kind = f"a whole number, {above + 1:g} or more" if whole else f"a number above {above:g}"
        self.faults.append(Fault(f"{name} {text}", f"is not {kind}", f"Give {kind}"))
        return None


@dataclass(frozen=True)
class FlatCommand:
    """A command with flat options. `own` are its other options (and, for the help page, arguments), such as "--config
    FILE", with their help; `takes` says which options of the settings it uses, others are refused as `unused`.
    """

    usage: str
    about: str
    own: Mapping[str, str]
    takes: Callable[[Option], bool] = lambda option: True
    unused: str = ""
    positionals: int = 0
    common: Sequence[str] = ()
    """Keys of the options that --help shows; --help-all shows all of them. Without it --help does."""
    examples: Sequence[str] = ()

    @property
    def own_names(self) -> dict[str, bool]:
        """The command's own options, and whether each takes a value."""
        names = (spelling.partition(" ") for spelling in self.own)
        return {name: bool(value) for name, _, value in names if name.startswith("--")}

    def parse(self, argv: Sequence[str]) -> Arguments:
        """Split `argv` into options, own options and positional arguments; --help and --help-all exit with a page.

        `--name value` and `--name=value` are the same. A word that begins with `--` is never a value. After a switch
        a boolean word is its value.
        """
        found, own, rest = Arguments(), self.own_names, list(argv)
        while rest:
            word = rest.pop(0)
            if not _is_option(word):
                found.positional.append(word)
                continue
            name, equals, text = word.partition("=")
            value: str | bool = text if equals else True
            if not equals and rest and _takes_value(name, rest[0], own):
                value = rest.pop(0)
            if (fault := not_built(name)) is not None:
                found.faults.append(fault)
                continue
            table = found.own if name in own else found.options
            before = table.pop(name, value)
            if before != value and (name in own or name in spellings()):
                found.overridden.append(overridden(_as_written(name, before), _as_written(name, value)))
            table[name] = value
        if {"--help", "--help-all"} & found.own.keys():
            print(self.page(whole="--help-all" in found.own))
            raise typer.Exit
        self._check(found, own)
        return found

    def _check(self, found: Arguments, own: Mapping[str, bool]) -> None:
        for word in found.positional[self.positionals :]:
            only = f"options and {self.positionals} argument" if self.positionals else "options only"
            hint = "Options begin with --; put text with spaces in quotation marks"
            found.faults.append(Fault(word, f"belongs to no option, and this command takes {only}", hint))
        for name, value in list(found.own.items()):
            if own[name] and (value is True or value == ""):
                found.faults.append(Fault(name, "needs a value", f"Write {name} VALUE"))
                del found.own[name]
            elif not own[name] and value is not True:
                found.faults.append(Fault(f"{name}={value}", "takes no value", f"Write {name} alone"))
        for name in list(found.options):
            spelling = spellings().get(name)
            if spelling is not None and not self.takes(spelling.option):
                found.faults.append(Fault(name, self.unused, "Leave it out"))
                del found.options[name]

    def page(self, *, whole: bool) -> str:
        """The help page: the command's own options and those of the settings that matter most, or the `whole` of them
        by section."""
        taken = [option for option in options().values() if self.takes(option)]
        own = [row for row in self.own.items() if row[0].startswith("--")]
        sections = {"Arguments": [row for row in self.own.items() if row not in own]}
        if whole or not self.common:
            sections["Options"] = own
            for section, group in groupby(taken, key=lambda option: option.section):
                sections[section.capitalize()] = [_option_row(option) for option in group]
        else:
            common = [_option_row(options()[key]) for key in self.common]
            sections[f"Options ({len(common)} of {len(taken)}; --help-all shows all)"] = [*common, *own]
        return page(self.usage, self.about, {title: rows for title, rows in sections.items() if rows}, self.examples)


def _is_option(word: str) -> bool:
    """Whether a word is an option's name; `-1` and `-0.5` are values."""
    return word.startswith("-") and word != "-" and not word[1:2].isdigit() and word[1:2] != "."


def _takes_value(name: str, word: str, own: Mapping[str, bool]) -> bool:
    """Whether the next word belongs to this option."""
    if name in NOT_BUILT:
        # It may be a secret, which begins with anything and must not be left over to be shown as a stray word.
        return name not in SWITCHES and not word.startswith("--")
    if _is_option(word):
        return False
    if name in own:
        return own[name]
    spelling = spellings().get(name)
    if spelling is None:
        # An unknown option is treated as the known one it resembles, or its value would be a second fault.
        near = nearest(name, [*spellings(), *own, *NOT_BUILT], at_most=1)
        return not near or _takes_value(near[0], word, own)
    return spelling.fixed is None or word.lower() in BOOLEAN_WORDS


def _as_written(name: str, value: str | bool) -> str:
    return name if value is True else f"{name} {value}"


def _option_row(option: Option) -> Row:
    """The row of an option of the settings, with its aliases and default."""
    aliases = option.traits.aliases
    same = [option.flag, *(alias for alias, fixed in aliases.items() if fixed is None)]
    names = [f"{option.flag}/{option.off_flag}" if option.is_switch else f"{', '.join(same)} {option.value}"]
    default = option.written(option.default) if option.is_switch else option.default
    return (
        ", ".join([*names, *(alias for alias in aliases if option.is_switch or alias not in same)]),
        f"{option.help} [default: {option.traits.unset or default}]",
    )
