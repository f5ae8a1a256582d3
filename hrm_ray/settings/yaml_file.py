"""The settings file: YAML with nested sections or dotted keys. Values are checked in `load`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hrm_ray.errors import Fault
from hrm_ray.regular_files import special_file
from hrm_ray.settings.cluster import strategy_of_ddp
from hrm_ray.settings.faults import nearest
from hrm_ray.settings.needs import NoEffect
from hrm_ray.settings.not_built import not_built
from hrm_ray.settings.options import options, spellings
from hrm_ray.settings.tree import SECTIONS

RECIPES = Path(__file__).parent.parent / "recipes"
"""Settings files that come with the package; `--config` takes them by name."""


class _LoaderWithoutDoubles(yaml.SafeLoader):
    """Two equal keys are an error here; PyYAML keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} is there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class ParsedSource:
    """The settings of one source: the file, the command line, a trial or a resumed run."""

    values: dict[str, Any] = field(default_factory=dict)
    """Values by dotted key."""
    quoted: dict[str, str] = field(default_factory=dict)
    """Each setting as the user wrote it, for messages, by dotted key."""
    faults: list[Fault] = field(default_factory=list)
    candidates: set[str] = field(default_factory=set)
    """Leaves that a misspelt name may have meant; rules that read them would report something untrue."""
    overridden: list[NoEffect] = field(default_factory=list)
    """Options that a later spelling of the same option overrides."""


@cache
def recipes() -> tuple[str, ...]:
    """The names of the recipes."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def is_recipe(path: Path | None) -> bool:
    """Whether --config names a recipe and no file."""
    return path is not None and str(path) in recipes() and not path.exists()


def read_settings_file(path: Path) -> ParsedSource:
    """The values of a settings file, and everything wrong with its form and names.

    A name such as `sudoku4` is the recipe of that name where no such file exists. An empty file sets nothing. A file
    that cannot be read at all gives no values and one fault.
    """
    if is_recipe(path):
        path = RECIPES / f"{path}.yaml"
    elif not path.exists():
        reason = "there is no such file, and no recipe of that name"
        fault = Fault(f"--config {path}", reason, f"Give a YAML file, or a recipe: {', '.join(recipes())}")
        return ParsedSource(faults=[fault], candidates=set(options()))
    content = read_mapping(path, "--config", "Write sections such as `model:` with their settings below")
    if isinstance(content, Fault):
        return ParsedSource(faults=[content], candidates=set(options()))
    return read_tree(content, str(path))


def read_mapping(path: Path, option: str, form: str = "Write `name: value`, one a line") -> dict[Any, Any] | Fault:
    """The content of a YAML (or JSON) file given with `option`, or what is wrong with it; an empty file is {}."""

    def unusable(reason: str, hint: str) -> Fault:
        return Fault(f"{option} {path}", reason, hint)

    special = special_file(path, f"{option} {path}")
    if special is not None:
        return special
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_LoaderWithoutDoubles)
    except OSError as error:
        return unusable(f"cannot be read ({error.strerror})", "Give a readable YAML file")
    except UnicodeDecodeError as error:
        return unusable(f"is not UTF-8 text (byte {error.start})", "Save the file as UTF-8")
    except yaml.YAMLError as error:
        return unusable(f"is not YAML ({_where(error)})", "Correct the file there")
    if content is None:
        return {}
    return content if isinstance(content, dict) else unusable("contains no settings by name", form)


def read_tree(content: Mapping[Any, Any], source: str) -> ParsedSource:
    """Nested sections and dotted keys, as in a file; messages name `source` as their place."""
    parsed = ParsedSource()
    for key, value in content.items():
        if key in SECTIONS and value is None:
            continue
        if key in SECTIONS and isinstance(value, dict):
            pairs = [(f"{key}.{name}", each) for name, each in value.items()]
        else:
            pairs = [(str(key), value)]
        for dotted, each in pairs:
            if dotted == "cluster.ddp":
                dotted, each = "cluster.strategy", strategy_of_ddp(each)
            if dotted in parsed.values:
                reason = "is set twice, in its section and with a dotted key"
                parsed.faults.append(Fault(f"{dotted} in {source}", reason, "Keep one of the two"))
            elif dotted in options():
                parsed.values[dotted] = each
                parsed.quoted[dotted] = f"{dotted} = {each} ({source})"
            else:
                hint, candidates = _hint_of_key(dotted)
                missing = not_built(f"--{dotted.rpartition('.')[2].replace('_', '-')}")
                # Without its value: it may be a secret behind a misspelt name.
                parsed.faults.append(missing or Fault(f"{dotted} ({source})", "is not a setting", hint))
                parsed.candidates.update(candidates)
    return parsed


def _hint_of_key(name: str) -> tuple[str, list[str]]:
    """The hint for an unknown key, and the leaves that may have been meant."""
    if name in SECTIONS:
        first = next(key for key in options() if key.startswith(f"{name}."))
        return f"`{name}` is a section: write its settings below it, such as {first}", []
    keys_by_leaf = {key.partition(".")[2]: key for key in options()}
    leaf = name.replace("-", "_").lower().rpartition(".")[2]
    spelling = spellings().get(f"--{leaf.replace('_', '-')}")
    if spelling is not None and leaf not in keys_by_leaf:
        return f"In a file the name is {spelling.option.key}", [spelling.option.key]
    near = [keys_by_leaf[each] for each in nearest(leaf, keys_by_leaf)]
    if not near:
        return "`hrm-ray train --help` lists the settings", []
    if keys_by_leaf.get(leaf) in near:
        return f"Write {keys_by_leaf[leaf]}", near
    return f"The nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}", near


def _where(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())
