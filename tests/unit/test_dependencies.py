"""What pyproject.toml requires is what hrm_ray imports, and the development tools stay light."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
if sys.version_info >= (3, 11):
    import tomllib

    PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
else:
    pytest.skip("the standard library reads TOML since Python 3.11", allow_module_level=True)

BASE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
PART_OF = {"pydantic_core": "pydantic", "fsspec": "huggingface-hub"}
"""Modules of distributions that a required one always brings along."""
MODULES = {"huggingface-hub": "huggingface_hub", "pyyaml": "yaml", "mlflow-skinny": "mlflow"}
"""The module of a distribution where the names differ."""
LIGHT_MEGABYTES = 100


@cache
def imported() -> dict[str, str]:
    """Top-level modules of others that hrm_ray imports at run time, each with one file that does."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "hrm_ray").rglob("*.py")):
        for name in run_time_imports(ast.parse(path.read_text(encoding="utf-8"))):
            top = name.partition(".")[0]
            if top != "hrm_ray" and top not in sys.stdlib_module_names:
                found.setdefault(top, path.relative_to(ROOT).as_posix())
    return found


def run_time_imports(tree: ast.Module) -> Iterator[str]:
    """The modules that a file imports, also by name (`import_module("x")`), but not those for type checkers."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                yield str(node.args[0].value)
        pending.extend(ast.iter_child_nodes(node))


def module_of(requirement: Requirement) -> str:
    name = canonical(requirement.name)
    return MODULES.get(name, name)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_imported() -> None:
    modules = imported()
    assert [each.name for each in BASE if module_of(each) not in modules] == []


def test_everything_imported_is_required() -> None:
    optional = [each for name, lines in EXTRAS.items() if name != "dev" for each in lines]
    declared = {module_of(each) for each in [*BASE, *optional]} | set(PART_OF)
    assert {module: file for module, file in imported().items() if module not in declared} == {}


@pytest.mark.parametrize(("module", "owner"), PART_OF.items())
def test_a_part_comes_with_its_owner(module: str, owner: str) -> None:
    assert any(canonical(each.name) == owner for each in BASE)
    brought = {canonical(Requirement(line).name) for line in importlib.metadata.requires(owner) or []}
    assert canonical(module) in brought


def test_ray_brings_its_dashboard_and_jobs() -> None:
    assert next(each for each in BASE if each.name == "ray").extras >= {"default", "train", "tune"}


def test_every_extra_is_imported() -> None:
    modules = imported()
    optional = [each for name, lines in EXTRAS.items() if name != "dev" for each in lines]
    assert [each.name for each in optional if module_of(each) not in modules] == []


@pytest.mark.parametrize("tool", EXTRAS["dev"], ids=lambda tool: tool.name)
def test_development_tools_are_light(tool: Requirement) -> None:
    """A heavier one becomes an extra of its own, whose tests are skipped where it is missing."""
    base = {name for each in BASE for name in closure(str(each))}
    added = closure(str(tool)) - base
    assert sum(megabytes(name) for name in added) < LIGHT_MEGABYTES, sorted(added)


@cache
def closure(line: str) -> frozenset[str]:
    """The installed distributions that a requirement needs, itself included."""
    found: set[str] = set()
    pending, seen = [(Requirement(line), "")], set()
    while pending:
        requirement, extra = pending.pop()
        name = canonical(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not applies or (str(requirement), extra) in seen:
            continue
        seen.add((str(requirement), extra))
        try:
            below = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        pending.extend((Requirement(each), wanted) for each in below for wanted in ("", *requirement.extras))
    return frozenset(found)


@cache
def megabytes(name: str) -> float:
    files = importlib.metadata.files(name) or []
    return sum(file.size or 0 for file in files) / 2**20
