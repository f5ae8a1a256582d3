"""The house keeps its shape: imports point down, heavy libraries stay where they belong, every leaf is explained."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from hrm_ray.settings.cluster import Launcher, StrategyName
from hrm_ray.settings.options import options, spellings
from hrm_ray.settings.tree import SECTIONS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hrm_ray"

_LOW = frozenset({"foundation", "settings"})
_MIDDLE = _LOW | {"model", "data", "metrics", "ledger"}
MAY_IMPORT: dict[str, frozenset[str]] = {
    "foundation": frozenset(),
    "settings": frozenset({"foundation"}),
    "model": _LOW,
    "data": _LOW,
    "metrics": _LOW,
    "ledger": frozenset({"foundation"}),
    "merging": frozenset({"foundation"}),
    "bundle": _LOW | {"model", "data"},
    "inference": _LOW | {"model", "data", "bundle"},
    "train": _MIDDLE | {"bundle", "inference"},
    "independent": _MIDDLE | {"bundle", "merging", "train"},
    "launch": _MIDDLE | {"bundle", "merging", "train", "independent"},
    "orchestration": _MIDDLE | {"bundle", "train", "independent", "launch"},
    "search": _MIDDLE | {"bundle", "train", "launch"},
    "cli": _MIDDLE | {"bundle", "inference", "train", "launch", "orchestration", "search"},
}
"""Layer -> layers below it that it may import (its own is always allowed)."""

DOTTED_NAME = re.compile(r"hrm_ray(\.\w+)+(:\w+)?")
NAMED_UPWARD = frozenset(
    ("hrm_ray.launch.devices", f"hrm_ray.orchestration.{name}") for name in ("worker_group", "independent_launcher")
)
"""Modules of a layer above that a table names, to be loaded when they are asked for: the launchers."""
RAY_ONLY_IN = frozenset({"orchestration"})
NO_TORCH_IN = frozenset({"foundation", "settings", "data", "metrics", "ledger", "merging"})
LIGHT_MODULES = frozenset(
    f"hrm_ray.cli.{name}"
    for name in ("main", "error_handler", "build_data", "flat_command", "help_page", "train", "arch_summary", "inspect")
) | {"hrm_ray.__init__"}
"""Modules that help pages and refusals of wrong options load: torch is imported inside functions only, if at all."""
VAGUE_NAMES = frozenset({"utils", "util", "helpers", "helper", "common", "misc"})

Import = tuple[str, int, bool]
"""Module, line, and whether it is imported as soon as the file is."""


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(module: str) -> str | None:
    """The layer of a dotted module of ours; None for the package itself and for foreign modules."""
    parts = module.split(".")
    if parts[0] != "hrm_ray" or len(parts) == 1:
        return None
    return parts[1] if parts[1] in MAY_IMPORT else "cli" if parts[1] in ("__main__", "__init__") else "foundation"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(tree: ast.Module, module: str) -> Iterator[Import]:
    """Every import of a file; those under TYPE_CHECKING count for the layers, but load nothing, and so do dotted names
    in strings (`hrm_ray.launch.local:run`)."""
    pending: list[tuple[ast.AST, bool]] = [(tree, True)]
    while pending:
        node, at_once = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno, at_once) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            yield base, node.lineno, at_once
            yield from ((f"{base}.{name.name}", node.lineno, at_once) for name in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED_NAME.fullmatch(node.value):
            yield node.value.partition(":")[0], node.lineno, False
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        pending.extend((child, at_once and not lazy) for child in ast.iter_child_nodes(node))


def violations(source: str, module: str) -> list[str]:
    """What a file's imports break, as sentences."""
    layer = layer_of(module)
    found: list[str] = []
    if layer is None:
        return found
    for imported, line, at_once in imports_of(ast.parse(source), module):
        target, top = layer_of(imported), imported.split(".")[0]
        allowed = (module, imported) in NAMED_UPWARD or target in MAY_IMPORT[layer]
        if target is not None and target != layer and not allowed:
            found.append(f"{module}:{line} ({layer}) imports {imported} ({target})")
        if top == "ray" and layer not in RAY_ONLY_IN:
            found.append(f"{module}:{line} imports ray outside orchestration")
        if top == "torch" and (layer in NO_TORCH_IN or (at_once and module in LIGHT_MODULES)):
            found.append(f"{module}:{line} ({layer}) imports torch")
    return found


@pytest.mark.parametrize("path", python_files(), ids=module_of)
def test_imports_point_down(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module_of(path)) == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from hrm_ray.train import loop", "hrm_ray.model.layers"),
        ("from hrm_ray.model.config import ModelConfig", "hrm_ray.data.readers"),
        ("from ..data import order", "hrm_ray.metrics.plots"),
        ("def f():\n    import ray.train", "hrm_ray.launch.local"),
        ("import torch.nn as nn", "hrm_ray.settings.model"),
        ("def f():\n    from torch import nn", "hrm_ray.data.order"),
        ("import torch", "hrm_ray.cli.train"),
        ("from hrm_ray.settings.tree import RunSettings", "hrm_ray.errors"),
        ("from hrm_ray import cli", "hrm_ray.orchestration.worker_group"),
        ("from hrm_ray.data.order import Order", "hrm_ray.ledger.owner"),
        ("from hrm_ray.ledger import Ledger", "hrm_ray.data.readers"),
        ("import torch", "hrm_ray.ledger.export"),
        ("TABLE = {'cli': 'hrm_ray.cli.run:run_train'}", "hrm_ray.launch.run"),
        ("TABLE = {'ray': 'hrm_ray.orchestration.worker_group:run'}", "hrm_ray.train.session"),
    ],
)
def test_a_wrong_import_is_found(source: str, module: str) -> None:
    assert len(set(violations(source, module))) >= 1


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("def f():\n    import torch", "hrm_ray.cli.train"),
        ("import torch", "hrm_ray.cli.inference"),
        ("import ray", "hrm_ray.orchestration.worker_group"),
        ("from hrm_ray.settings.tree import RunSettings", "hrm_ray.model.config"),
        ("from hrm_ray.model import config", "hrm_ray.train.assemble"),
    ],
)
def test_a_right_import_passes(source: str, module: str) -> None:
    assert violations(source, module) == []


def test_every_launcher_is_there() -> None:
    """The table and the option's values are the same, and each module has a `run` of the same arguments."""
    from hrm_ray.launch.devices import LAUNCHERS

    assert set(LAUNCHERS) == set(get_args(Launcher))
    for module in LAUNCHERS.values():
        tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
        (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run")
        assert found.args.args[0].arg == "plan"
        assert {"sink", "stop"} <= {argument.arg for argument in found.args.kwonlyargs}


def test_every_strategy_is_there() -> None:
    from hrm_ray.train.memory_estimate import DIVIDED
    from hrm_ray.train.strategies import STRATEGIES

    assert set(STRATEGIES) == set(get_args(StrategyName))
    assert set(STRATEGIES) == {"single", "ddp", *DIVIDED}


def test_no_vague_module_names() -> None:
    assert [path for path in PACKAGE.rglob("*") if path.stem in VAGUE_NAMES] == []


@pytest.mark.parametrize("path", python_files(), ids=module_of)
def test_every_module_says_its_job(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--no-such-option"],
        ["generate", "--help"],
        ["data", "--help"],
        ["data", "inspect", "--help"],
        ["data", "inspect", "tests/fixtures/none.jsonl"],
        ["data", "inspect", "README.md"],
        ["ledger", "--help"],
    ],
)
def test_light_commands_load_neither_torch_nor_ray(words: list[str]) -> None:
    script = (
        "import sys\nfrom hrm_ray.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'matplotlib'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.splitlines()[-1] == "LOADED []"


def test_root_help_loads_no_pydantic() -> None:
    script = (
        "import sys\nfrom hrm_ray.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('pydantic' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip() == "False"


def test_every_leaf_is_explained() -> None:
    unexplained = [key for key, option in options().items() if len(option.help) < 10]
    assert unexplained == []


def test_leaf_names_are_unique_in_the_tree() -> None:
    names = [name for kind in SECTIONS.values() for name in kind.model_fields]
    assert len(names) == len(set(names))


def test_spellings_do_not_collide() -> None:
    every = [option.flag for option in options().values()]
    every += [option.off_flag for option in options().values() if option.is_switch]
    every += [alias for option in options().values() for alias in option.traits.aliases]
    assert len(every) == len(set(every)) == len(spellings())
