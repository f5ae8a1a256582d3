"""Text from the documentation that comes with Python: the language reference's topics and the library's docstrings.

Modules are parsed, never imported, so none of their code runs."""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Not documentation: tests, other people's packages, and packages whose docstrings are fixtures.
_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "ensurepip"}
)

# Shorter docstrings are mostly "Return x." and their like, repeated everywhere.
_LEAST_CHARACTERS = 40


def python_documents() -> Iterator[tuple[str, str]]:
    """(source, text) pairs: each topic of pydoc, then each module of the standard library with its docstrings.

    A docstring that an earlier module had already is left out. Which documents there are depends on the Python that
    runs this.
    """
    yield from _topics()
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for file in _modules(library):
        text = _module_text(file, ".".join(file.relative_to(library).with_suffix("").parts), seen)
        if text:
            yield f"library/{file.relative_to(library).as_posix()}", text


def _topics() -> Iterator[tuple[str, str]]:
    # Some distributions ship Python without pydoc's topics; the library's docstrings are then all there is.
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield f"topics/{name}", text.strip() + "\n"


def _modules(library: Path) -> list[Path]:
    found: list[Path] = []
    for root, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith(("config-", "."))]
        found.extend(Path(root, name) for name in names if name.endswith(".py"))
    return sorted(found, key=lambda file: file.relative_to(library).parts)


def _module_text(file: Path, name: str, seen: set[str]) -> str:
    """The docstrings of a module with their headings; empty where it has none or is no readable source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings are not ours to report
            tree = ast.parse(file.read_bytes().decode("utf-8"))
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return ""
    parts = [text for text in _docstrings(tree, f"module {name.removesuffix('.__init__')}", "", seen)]
    return "\n\n".join(parts) + "\n" if parts else ""


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, heading: str, path: str, seen: set[str]
) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring and len(docstring) >= _LEAST_CHARACTERS and docstring not in seen:
        seen.add(docstring)
        yield f"{heading}\n\n{docstring.strip()}"
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"class {path}{child.name}", f"{path}{child.name}.", seen)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(
                child, f"{path}{child.name}({ast.unparse(child.args)})", f"{path}{child.name}.", seen
            )
