"""Tiny made-up ARC tasks, as files in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Rows = list[list[int]]


def pair(shown: Rows, wanted: Rows) -> dict[str, Rows]:
    """One example as it stands in a file."""
    return {"input": shown, "output": wanted}


MIRROR = {
    "train": [pair([[1, 2], [0, 3]], [[2, 1], [3, 0]]), pair([[4, 0, 0]], [[0, 0, 4]])],
    "test": [pair([[7, 0], [0, 8], [9, 9]], [[0, 7], [8, 0], [9, 9]])],
}
"""Left and right exchanged."""
FILL = {
    "train": [pair([[5, 0, 5]], [[5, 6, 5]]), pair([[5], [0], [5]], [[5], [6], [5]])],
    "test": [pair([[0, 5]], [[6, 5]]), pair([[0] * 30] * 30, [[6] * 30] * 30)],
}
"""Black becomes pink; one test pair fills all the cells there are."""
COUNT = {"train": [pair([[1, 1, 0], [0, 1, 0]], [[3]])], "test": [pair([[2, 2]], [[2]])]}
"""How many cells are coloured."""


def write_tasks(folder: Path, **tasks: Any) -> Path:
    """A folder with a file for each task, besides one that is no task; without tasks the three above."""
    for name, content in (tasks or {"mirror": MIRROR, "fill": FILL, "deep/count": COUNT}).items():
        file = folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
    (folder / "README.md").write_text("not a task", encoding="utf-8")
    return folder
