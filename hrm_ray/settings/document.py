"""The page of all options, docs/options.md: `python -m hrm_ray.settings.document > docs/options.md`."""

from __future__ import annotations

from itertools import groupby

from hrm_ray.settings.options import Option, options
from hrm_ray.settings.tree import SECTIONS

_HEAD = """# Options

Every option of `hrm-ray train`, by section. In a settings file (`--config run.yaml`) an option has the name in the
first column, below its section: `optimizer: {lr: 0.001}`. This page is written by
`python -m hrm_ray.settings.document > docs/options.md`.

"Resumed" says what a resumed run may do to an option: change it (free), or keep it, because the saved state depends on
it (fixed). A "presence fixed" option may change its value, but must be given if and only if the first run had it. One
marked "this launch" is not taken from the earlier run."""
_ON_RESUME = {"fixed": "fixed", "presence_fixed": "presence fixed", "free": "free", "dropped": "this launch"}


def page() -> str:
    """The page as Markdown."""
    lines = [_HEAD]
    for section, group in groupby(options().values(), key=lambda option: option.section):
        lines += ["", f"## {section}", "", " ".join((SECTIONS[section].__doc__ or "").split()), ""]
        lines += ["| setting | option | default | resumed | meaning |", "|---|---|---|---|---|"]
        lines += [_row(option) for option in group]
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    value = "" if option.is_switch else f" {option.value}"
    spellings = [f"`{option.flag}{value}`", *([f"`{option.off_flag}`"] if option.is_switch else [])]
    spellings += [f"`{alias}`" for alias in option.traits.aliases]
    if option.traits.unset is not None:
        default = option.traits.unset
    elif option.is_switch:
        default = "on" if option.default else "off"
    else:
        # Windows writes a path with backslashes.
        default = f"{option.default:g}" if isinstance(option.default, float) else str(option.default).replace("\\", "/")
    cells = (f"`{option.name}`", ", ".join(spellings), default, _ON_RESUME[option.traits.on_resume], option.help)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(page(), end="")
