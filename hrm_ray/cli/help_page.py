"""Help pages: one form for the commands of Typer and for those with the flat options of the settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

Row = tuple[str, str]
"""An option or command with its values, and what it is for."""

_NARROWEST, _WIDEST, _NAMES = 50, 100, 30


def page(usage: str, about: str, sections: Mapping[str, Iterable[Row]], examples: Sequence[str] = ()) -> str:
    """A help page: usage, what the command does, sections of rows, and examples, as wide as the terminal.

    Lines are broken at spaces only, so that no name is cut.
    """
    width = max(_NARROWEST, min(shutil.get_terminal_size().columns, _WIDEST))
    lines = [f"Usage: hrm-ray {usage}", "", *_filled(about, width, "  ")]
    for title, rows in sections.items():
        lines += ["", f"{title}:"]
        for names, meaning in rows:
            lines += _row(names, meaning, width)
    if examples:
        lines += ["", "Examples:", *(f"  {example}" for example in examples)]
    return "\n".join(lines)


def _filled(text: str, width: int, indent: str, first: str | None = None) -> list[str]:
    return wrap(
        text,
        width,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _row(names: str, meaning: str, width: int) -> list[str]:
    """Names on the left and their meaning beside them, or below where the names are long."""
    indent = " " * min(_NAMES, width // 2)
    if len(names) + 4 <= len(indent):
        return _filled(meaning, width, indent, f"  {names}".ljust(len(indent))) or [f"  {names}"]
    return [*_filled(names, width, "      ", "  "), *_filled(meaning, width, indent)]


class HelpCommand(TyperCommand):
    """A command of Typer with our help page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page into `formatter`."""
        formatter.write(_page_of(self, ctx))


class HelpGroup(TyperGroup):
    """A group of commands of Typer with our help page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page into `formatter`."""
        named = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        commands = [(name, each.help or "") for name, each in named if each is not None and not each.hidden]
        formatter.write(_page_of(self, ctx, {"Commands": commands}))


class CommandLine(typer.Typer):
    """A group of commands with these help pages."""

    def __init__(self, about: str) -> None:
        super().__init__(
            help=about, cls=HelpGroup, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None
        )

    def command(self, name: str | None = None, **settings: Any) -> Any:
        """A decorator that adds a command."""
        return super().command(name, cls=HelpCommand, **settings)


def _page_of(command: TyperCommand | TyperGroup, ctx: Any, below: Mapping[str, list[Row]] | None = None) -> str:
    """The page of a Typer command, with its arguments, its options and the sections `below`."""
    every: list[Any] = command.get_params(ctx)
    parameters = [each for each in every if not each.hidden]
    arguments = [each for each in parameters if each.param_type_name == "argument"]
    rows = {
        "Arguments": [(_argument(each), each.help or "") for each in arguments],
        "Options": [_typer_option(each) for each in parameters if each.param_type_name == "option"],
        **(below or {}),
    }
    path = ctx.command_path.partition(" ")[2]
    words = [path, "COMMAND" if below else "", *map(_argument, arguments), "" if below else "[OPTIONS]"]
    usage = " ".join(word for word in words if word)
    return page(usage, command.help or "", {title: each for title, each in rows.items() if each}) + "\n"


def _argument(argument: Any) -> str:
    name = (argument.metavar or argument.name).upper() + ("..." if argument.nargs != 1 else "")
    return name if argument.required else f"[{name}]"


def _typer_option(option: Any) -> Row:
    names = "/".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else f" {option.metavar or _value_name(option)}"
    meaning = " ".join((option.help or "").split())
    if option.required:
        return f"{names}{value}", f"{meaning} [required]"
    if option.default is None or (option.is_flag and not option.secondary_opts):
        return f"{names}{value}", meaning
    default = (option.opts if option.default else option.secondary_opts)[0] if option.is_flag else option.default
    return f"{names}{value}", f"{meaning} [default: {default}]"


def _value_name(option: Any) -> str:
    # Imported here: the page of `hrm-ray` itself needs no settings.
    from hrm_ray.settings.options import value_name

    return value_name(option.type_descriptor.annotation)
