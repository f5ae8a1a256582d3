"""The help page of a command that takes the flat options.

One job: print the options by section, each with its spellings, values, meaning and default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hrm_ray.settings.options import Option, options


def print_option_help(
    usage: str,
    about: str,
    own: Iterable[tuple[str, str]],
    shows: Callable[[Option], bool] = lambda option: True,
) -> None:
    """Print the page: `own` are the command's own options as (spelling, help), then those of the settings that it
    `shows`, by section."""
    console = Console(highlight=False)
    console.print(Text(f"\n Usage: {usage}\n", style="bold"))
    console.print(Text(f" {about}\n"))
    console.print(_panel("options", own))
    for section, group in groupby(filter(shows, options().values()), key=lambda option: option.section):
        console.print(_panel(section, [(_spellings(option), _meaning(option)) for option in group]))


def _panel(title: str, rows: Iterable[tuple[str, str]]) -> Panel:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(ratio=2, style="cyan", overflow="fold")
    table.add_column(ratio=3)
    for spelling, meaning in rows:
        table.add_row(Text(spelling), Text(meaning))
    return Panel(table, title=title, title_align="left", border_style="dim")


def _spellings(option: Option) -> str:
    aliases = "".join(f", {alias}" for alias in option.traits.aliases)
    if option.is_switch:
        return f"{option.flag}/{option.off_flag}{aliases}"
    value = "|".join(option.choices) if option.choices else "VALUE"
    return f"{option.flag}{aliases} {value}"


def _meaning(option: Option) -> str:
    default = option.written(option.default) if option.is_switch and option.default is not None else option.default
    return f"{option.help} [default: {option.traits.unset if default is None else default}]"
