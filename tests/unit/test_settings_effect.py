"""Every option changes something, or is noted or refused: found by reading the sources, and by watching runs."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hrm_ray.settings.base import Section
from hrm_ray.settings.rules import broken_rules, without_effect
from hrm_ray.settings.tree import SECTIONS, from_plain, leaf_keys
from tests.support.runs import PUZZLE, TEXT, hrm, puzzle_file, text_file

PACKAGE = Path(__file__).resolve().parents[2] / "hrm_ray"
SETTINGS = PACKAGE / "settings"
SECTION_OF = {kind.__name__: name for name, kind in SECTIONS.items()}
KEYS = frozenset(leaf_keys())

EXPANDED = frozenset(
    {
        "model.model_preset",
        "model.num_layers",
        "run.profile",
        "optimizer.auto_adjust_lr",
        "optimizer.effective_batch_size",
    }
)
"""Options whose whole effect is on other options, inside `hrm_ray.settings`."""


def section_of(node: ast.expr, variables: dict[str, str]) -> str | None:
    """The section that an expression stands for: `settings.run`, or a variable that holds one."""
    if isinstance(node, ast.Attribute) and node.attr in SECTIONS:
        return node.attr if ast.unparse(node.value).rpartition(".")[2] == "settings" else None
    return variables.get(node.id) if isinstance(node, ast.Name) else None


def section_variables(tree: ast.AST) -> dict[str, str]:
    """Variables that hold a section, by annotation or by assignment (`run, chosen = settings.run, ...`)."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name) and node.annotation.id in SECTION_OF:
            found[node.arg] = SECTION_OF[node.annotation.id]
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                for name, value in zip(names, values, strict=False):
                    section = section_of(value, {})
                    if isinstance(name, ast.Name) and section is not None:
                        found[name.id] = section
    return found


def reads(tree: ast.AST) -> Iterator[str]:
    """Dotted keys that a source reads: `settings.run.seed`, `chosen.lr`, or the key itself as a text."""
    for function in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]:
        variables = section_variables(function) if isinstance(function, ast.FunctionDef) else {}
        for node in ast.walk(function):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KEYS:
                yield node.value
            if isinstance(node, ast.Attribute):
                section = section_of(node.value, variables)
                if section is not None:
                    yield f"{section}.{node.attr}"


def properties() -> dict[str, set[str]]:
    """What each property of a section reads: `run.step_limit` -> `run.steps`, ..."""
    found: dict[str, set[str]] = {}
    for section, kind in SECTIONS.items():
        tree = ast.parse(Path(sys.modules[kind.__module__].__file__ or "").read_text("utf-8"))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            own = {
                n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"
            }
            found[f"{section}.{function.name}"] = {f"{section}.{name}" for name in own}
    return found


def test_every_option_is_read_outside_the_settings() -> None:
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if SETTINGS not in path.parents:
            found.update(reads(ast.parse(path.read_text("utf-8"))))
    for name, leaves in properties().items():
        if name in found:
            found |= leaves
    assert sorted(KEYS - found - EXPANDED) == []


def test_an_option_that_nobody_reads_is_found() -> None:
    source = "def f(settings):\n    run = settings.run\n    return run.seed, settings.data.split, run.not_an_option\n"
    assert {"run.seed", "data.split"} <= set(reads(ast.parse(source)))
    assert "run.keep" not in set(reads(ast.parse(source)))
    assert list(reads(ast.parse("def f(plan):\n    return plan.data.split\n"))) == [], "another object of the name"
    assert list(reads(ast.parse("self.settings.data.split"))) == ["data.split"]


PROPERTIES = properties()


@contextmanager
def watching() -> Iterator[set[str]]:
    """The leaves that are read outside `hrm_ray.settings` while the block runs, through properties too."""
    found: set[str] = set()
    section_names = {kind: name for name, kind in SECTIONS.items()}
    plain = Section.__getattribute__

    def watched(section: Any, name: str) -> Any:
        if type(section) in section_names and PACKAGE in Path(sys._getframe(1).f_code.co_filename).parents:
            key = f"{section_names[type(section)]}.{name}"
            if SETTINGS not in Path(sys._getframe(1).f_code.co_filename).parents:
                found.update(PROPERTIES.get(key, {key}))
        return plain(section, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Section, "__getattribute__", watched)
        yield found


WITHOUT_EXPLORATION = tuple(word for word in PUZZLE if word not in ("--halt-exploration-prob", "0.5"))
RUNS: dict[str, tuple[str, ...]] = {
    "text": TEXT,
    "text, transformer": (*TEXT, "--arch", "transformer"),
    "puzzles": PUZZLE,
    "puzzles, rollout": (*WITHOUT_EXPLORATION, "--supervision", "rollout"),
}
REFUSED_BY_VALUE: dict[str, tuple[str, ...]] = {
    "cluster.ray_address": ("text", "puzzles"),
    "cluster.strict": ("text", "puzzles"),
    "data.force_train": ("text", "puzzles"),
    "data.max_seq_len": ("puzzles",),
    "model.expert_index": ("text", "puzzles"),
    "model.halt_exploration_prob": ("text",),
}
"""Options that such runs read nowhere, and refuse as soon as they are more than the value that changes nothing; strict
is read where something falls back."""


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_does_not_read_it_notes_or_refuses(name: str, tmp_path: Path) -> None:
    words = RUNS[name]
    data = text_file(tmp_path) if name.startswith("text") else puzzle_file(tmp_path)
    with watching() as found:
        ran = hrm("train", "--dataset-file", data, "--bundle-dir", tmp_path / "b", *words, "--steps", "2")
    assert ran.code == 0, ran.err
    settings = from_plain(json.loads((tmp_path / "b" / "training_args.json").read_text())["settings"])
    by_value = {key for key, kinds in REFUSED_BY_VALUE.items() if name.startswith(kinds)}
    accepted = [
        key
        for key in sorted(KEYS - found - EXPANDED - by_value)
        if not (broken_rules(given := settings.model_copy(update={"given": frozenset({key})})) or without_effect(given))
    ]
    assert accepted == []
