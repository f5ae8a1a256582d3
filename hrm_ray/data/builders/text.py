"""Builds a text corpus from the documentation that comes with Python, so that a first run needs no download.

It holds the language reference's topics and the library's docstrings. Modules are parsed, never imported, so none of
their code runs."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hrm_ray.atomic_files import atomic_directory, check_vacant
from hrm_ray.errors import Fault, SettingsError, UnavailableError

_TEST_SHARE = 25  # one document in so many is held out
_TEXT_FILES = frozenset({"train.jsonl", "test.jsonl"})

# Not documentation: tests, other people's packages, and packages whose docstrings are fixtures.
_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "ensurepip"}
)

# Shorter docstrings are mostly "Return x." and their like, repeated everywhere.
_LEAST_CHARACTERS = 40


@dataclass(frozen=True)
class TextSummary:
    """The result of build_text: documents and UTF-8 bytes of text per split, and exact duplicates left out."""

    folder: Path
    train_documents: int
    test_documents: int
    train_bytes: int
    test_bytes: int
    duplicates: int


def build_text(out: Path, *, max_bytes: int | None = None, seed: int = 0, overwrite: bool = False) -> TextSummary:
    """A text corpus of Python's own documentation: train.jsonl and test.jsonl with rows {"text", "source"}.

    Documents come in an order keyed by `seed`, each at most once; about one in 25 is held out, chosen by a hash of its
    text, so no held-out document occurs in training. `max_bytes` ends the corpus before the document that would pass it
    (UTF-8 bytes of text, both splits together). Raises SettingsError for values that cannot be satisfied.
    """
    check_vacant(out, overwrite=overwrite, owned=_TEXT_FILES, option="--out")
    unique: dict[str, tuple[str, str]] = {}
    documents = 0
    for source, text in python_documents():
        documents += 1
        unique.setdefault(hashlib.sha256(f"{seed} {text}".encode()).hexdigest(), (source, text))
    if not unique:
        reason = "the sources of its standard library are missing"
        hint = "Use a complete installation of Python"
        raise UnavailableError(Fault(f"Python {platform.python_version()}", reason, hint))
    splits: dict[str, list[str]] = {"train": [], "test": []}
    sizes = {"train": 0, "test": 0}
    for key, (source, text) in sorted(unique.items()):
        length = len(text.encode("utf-8"))
        if max_bytes is not None and sum(sizes.values()) + length > max_bytes:
            break
        # By the last digits, because the first ones order the documents: a short corpus would have one split only.
        split = "test" if int(key[-8:], 16) % _TEST_SHARE == 0 else "train"
        splits[split].append(json.dumps({"text": text, "source": source}, ensure_ascii=False))
        sizes[split] += length
    if not all(splits.values()):
        reason = "too little text for a training and a test split"
        raise SettingsError(Fault(f"--max-bytes {max_bytes}", reason, "Give --max-bytes 1000000 or more"))
    with atomic_directory(out, overwrite=overwrite, owned=_TEXT_FILES) as building:
        for split, rows in splits.items():
            (building / f"{split}.jsonl").write_bytes(("\n".join(rows) + "\n").encode("utf-8"))
    return TextSummary(
        folder=out,
        train_documents=len(splits["train"]),
        test_documents=len(splits["test"]),
        train_bytes=sizes["train"],
        test_bytes=sizes["test"],
        duplicates=documents - len(unique),
    )


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
