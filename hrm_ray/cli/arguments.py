"""The words after a command that takes the flat options.

One job: split them into options with their values, the command's own switches and values, and what is neither.
Values are not checked here: `hrm_ray.settings.load` tells every fault in one message, the ones found here included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hrm_ray.errors import Fault
from hrm_ray.settings.faults import nearest
from hrm_ray.settings.options import spellings


@dataclass
class Arguments:
    """What stood on the command line."""

    options: dict[str, str | bool] = field(default_factory=dict)
    """By spelling; True for a switch, and for an option whose value is missing. Unknown options are here too."""
    own: dict[str, str | bool] = field(default_factory=dict)
    """The command's own options, such as --config, which are no leaves of the settings."""
    alone: list[str] = field(default_factory=list)
    """Words that stand alone, as many as the command takes."""
    faults: list[Fault] = field(default_factory=list)


def parse_arguments(words: Sequence[str], own: Mapping[str, bool], takes_alone: int = 0) -> Arguments:
    """Split `words`; `own` are the command's own options, each with whether it takes a value. `takes_alone` words may
    stand alone.

    `--name value` and `--name=value` are the same. A word that begins with `--` is never a value.
    """
    found = Arguments()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not _is_option(word):
            if len(found.alone) < takes_alone:
                found.alone.append(word)
                continue
            hint = "Options begin with --; put text with spaces in quotation marks"
            only = "options only" if not takes_alone else f"options and {takes_alone} other word"
            found.faults.append(Fault(word, f"stands alone, and this command takes {only}", hint))
            continue
        name, equals, text = word.partition("=")
        value: str | bool = text if equals else True
        if not equals and rest and not _is_option(rest[0]) and _takes_value(name, own):
            value = rest.pop(0)
        _put(found, found.own if name in own else found.options, name, value)
    _check_own(found, own)
    return found


def _is_option(word: str) -> bool:
    """Whether a word is an option's name; `-1` and `-0.5` are values."""
    return word.startswith("-") and word != "-" and not word[1:2].isdigit() and word[1:2] != "."


def _takes_value(name: str, own: Mapping[str, bool]) -> bool:
    """Whether the next word belongs to this option. An unknown one is taken for the known one it looks like, so that
    its value is not reported as a stray word."""
    if name in own:
        return own[name]
    spelling = spellings().get(name)
    if spelling is None:
        near = nearest(name, [*spellings(), *own], at_most=1)
        return not near or _takes_value(near[0], own)
    return spelling.fixed is None


def _put(found: Arguments, table: dict[str, str | bool], name: str, value: str | bool) -> None:
    if name in table and table[name] != value:
        found.faults.append(Fault(f"{name} {table[name]} and {name} {value}", "is given twice", "Keep one of the two"))
    table[name] = value


def _check_own(found: Arguments, own: Mapping[str, bool]) -> None:
    for name, value in list(found.own.items()):
        if own[name] and (value is True or value == ""):
            found.faults.append(Fault(name, "needs a value", f"Write {name} VALUE"))
            del found.own[name]
        elif not own[name] and value is not True:
            found.faults.append(Fault(f"{name}={value}", "takes no value", f"Write {name} alone"))
