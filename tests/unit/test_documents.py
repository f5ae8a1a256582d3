"""Every command that README and docs show is run, small; every option and file that they name exists."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import hrm_ray
from hrm_ray.cli import arch_summary, inspect, optimize, recommend, train
from hrm_ray.cli.main import app
from hrm_ray.settings.not_built import NOT_BUILT
from hrm_ray.settings.options import spellings
from tests.support.runs import hrm

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if path.name != "options.md")
MOST_WORDS = 1500
NOT_RUN = ("pip install -c constraints.txt .", "make demo", "make test")
"""Commands that change the environment or take minutes."""
OTHER_OPTIONS = {"--logdir", "--signal", "--bf16", "--rounds", "--files", "--memory", "--only"}
"""Options of other programs and of benchmarks."""

SMALL_MODEL = ("--hidden-size", "32", "--num-heads", "2", "--h-layers", "1", "--l-layers", "1", "--threads", "1")
SMALL_RUN = ("--steps", "2", "--warmup-steps", "1", "--batch-size", "4", "--eval-batches", "1", "--device", "cpu")
SMALLER: dict[str, tuple[str, ...]] = {
    "train": (*SMALL_MODEL, *SMALL_RUN, "--vocab-size", "300", "--max-train-examples", "40"),
    "generate": ("--max-new-tokens", "2"),
    "data build sudoku": ("--train", "40", "--test", "8", "--augment", "0"),
}
"""What is added to a command so that it is over soon; of an option given twice the last counts."""


def blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """The fenced blocks of a document: their language and their lines."""
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield language, body.splitlines()


def commands(path: Path) -> list[str]:
    """The lines of a document's blocks that are commands."""
    shell = (lines for language, lines in blocks(path.read_text(encoding="utf-8")) if language in ("", "sh"))
    first = r"(hrm-ray|make|pip|python|git) "
    return [line for lines in shell for line in lines if re.match(first, line)]


def inline(path: Path) -> list[str]:
    """The code within a document's sentences and tables."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


@cache
def subcommands() -> dict[str, Any]:
    """Typer's commands by their words, such as `data build sudoku`."""
    found: dict[str, Any] = {}
    pending = [("", get_command(app))]
    while pending:
        name, command = pending.pop()
        found[name] = command
        below = command.list_commands(None) if hasattr(command, "list_commands") else []
        pending.extend((f"{name} {each}".strip(), command.get_command(None, each)) for each in below)
    return found


@cache
def known_options() -> frozenset[str]:
    own = {
        name
        for command in (arch_summary.COMMAND, inspect.COMMAND, optimize.COMMAND, recommend.COMMAND)
        for name in command.own_names
    }
    typer_options = {
        name
        for each in subcommands().values()
        for parameter in each.params
        for name in parameter.opts
        if name[:1] == "-"
    }
    planned = {word for name in NOT_BUILT for word in name.split() if word.startswith("--")}
    trained = {name.partition(" ")[0] for name in train.OWN}
    return frozenset({*spellings(), *own, *typer_options, *planned, *trained, *OTHER_OPTIONS, "--version", "--help"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_commands_and_files_exist(path: Path) -> None:
    for code in inline(path):
        for option in [] if code.startswith("python -m ") else re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", code):
            assert option in known_options(), f"{path.name}: {code}"
        if re.match("hrm-ray [a-z]", code) and f"hrm-ray {code.split()[1]}" not in NOT_BUILT:
            assert any(f"{code.split(' ', 1)[1]} ".startswith(f"{name} ") for name in subcommands() if name), code
        for module in re.findall(r"python -m (tests\.[\w.]+)", code):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{path.name}: {code}"
        for tests in re.findall(r"pytest (tests/[\w/.]+)", code):
            assert (ROOT / tests).exists(), f"{path.name}: {code}"
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one folder, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    for line in commands(path):
        if line in NOT_RUN:
            continue
        program, *words = shlex.split(line, comments=True)
        assert program == "hrm-ray", f"{path.name}: {line}: add it to NOT_RUN, or show a hrm-ray command"
        name = max((each for each in subcommands() if line[8:].startswith(each)), key=len)
        added = SMALLER.get(name, ())
        if "--resume" in words:
            added = ("--steps", "3")
        ran = hrm(*words, *added)
        assert ran.code == 0, f"{path.name}: {line}\n{ran.err}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_name_what_exists(path: Path) -> None:
    for language, lines in blocks(path.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(name.name in vars(module) for name in node.names), node.module
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("hrm_ray."):
                assert callable(vars(hrm_ray)[ast.unparse(node.func).partition(".")[2]])
                options = {f"--{str(word.arg).replace('_', '-')}" for word in node.keywords}
                assert options <= known_options(), ast.unparse(node)


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS
    assert [line for line in commands(ROOT / "README.md") if line.startswith("make ")] == ["make demo", "make test"]
