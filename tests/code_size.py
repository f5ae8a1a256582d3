"""The size of the package, now or at a commit: `python -m tests.code_size [COMMIT ...]` prints a column for each.

Names are classes and public module-level aliases; a function's length counts its lines from `def` to its end.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "hrm_ray"


def sources_now() -> dict[str, str]:
    """The package's files in the working tree, by path."""
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def sources_at(commit: str) -> dict[str, str]:
    """The package's files at a commit, by path."""
    packed = subprocess.run(["git", "archive", commit, PACKAGE], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        members = [member for member in archive.getmembers() if member.name.endswith(".py")]
        return {member.name: archive.extractfile(member).read().decode("utf-8") for member in members}  # type: ignore[union-attr]


def measure(sources: Mapping[str, str]) -> dict[str, str]:
    """The figures by name, as text for a table."""
    lines = {path: source.count("\n") for path, source in sources.items()}
    code_lines, comments, names, lengths = 0, 0, 0, []
    for source in sources.values():
        tree = ast.parse(source)
        stripped = [line.strip() for line in source.splitlines()]
        comments += sum(line.startswith("#") or " # " in line for line in stripped)
        code_lines += sum(bool(line) for line in stripped)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append((node.end_lineno or node.lineno) - node.lineno + 1)
            names += isinstance(node, ast.ClassDef)
        names += sum(_is_alias(node) for node in tree.body)
    total = sum(lines.values())
    lengths.sort()
    longest = sorted(lines.items(), key=lambda item: -item[1])[:5]
    return {
        "files": str(sum(1 for count in lines.values() if count)),
        "lines": f"{total:,}",
        "functions": f"{len(lengths):,}",
        "lines of a function: median, 90 %, longest": (
            f"{statistics.median(lengths):.0f}, {lengths[int(0.9 * len(lengths))]}, {lengths[-1]}"
        ),
        "classes and aliases": str(names),
        "the same per 1000 lines": f"{1000 * names / total:.1f}",
        "lines with a comment": f"{100 * comments / code_lines:.1f} %",
        "longest files": ", ".join(f"{path.removeprefix(PACKAGE + '/')} {count}" for path, count in longest),
    }


def _is_alias(node: ast.stmt) -> bool:
    """Whether a module-level statement names a type: `Name: TypeAlias = ...`, or a capitalised name set to one."""
    if isinstance(node, ast.AnnAssign):
        return "TypeAlias" in ast.dump(node.annotation)
    if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
        return False
    name = node.targets[0].id
    return name[0].isupper() and not name.isupper() and isinstance(node.value, ast.Subscript | ast.BinOp | ast.Name)


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commits", nargs="*", help="commits to measure beside the working tree")
    commits = parser.parse_args(words).commits
    columns = [*((commit, measure(sources_at(commit))) for commit in commits), ("now", measure(sources_now()))]
    print(f"| | {' | '.join(name for name, _ in columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for figure in columns[0][1]:
        print(f"| {figure} | {' | '.join(values[figure] for _, values in columns)} |")


if __name__ == "__main__":
    main()
