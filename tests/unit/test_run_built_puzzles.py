"""Built puzzle sets from the command to a model that was trained on them and solves; bad requests leave nothing."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.support.arc_tasks import COUNT, write_tasks
from tests.support.runs import PUZZLE, hrm, refused

SMALL = (*PUZZLE, "--steps", "2", "--eval-every", "1", "--eval-batches", "1")


def built(tmp_path: Path, *words: object) -> tuple[str, ...]:
    """Build, and give the words of the command that is said to come next, on a small model."""
    ran = hrm("data", "build", *words, "--out", tmp_path / "set")
    assert ran.code == 0, ran.err
    following = shlex.split(ran.out.strip().splitlines()[-1])
    assert following[:3] == ["next:", "hrm-ray", "train"] and "--dataset-file" in following
    return tuple("32" if word == "512" else word for word in following[2:])


BUILT = {
    "sudoku": ("sudoku", "--size", "6", "--train", "8", "--test", "4", "--augment", "1"),
    "maze": ("maze", "--size", "6", "--train", "8", "--test", "4", "--augment", "2"),
    "arc": ("arc", "TASKS", "--augment", "2"),
}


@pytest.mark.parametrize("kind", BUILT)
def test_what_is_said_to_come_next_trains_and_solves(tmp_path: Path, kind: str) -> None:
    words = [write_tasks(tmp_path / "tasks", count=COUNT) if word == "TASKS" else word for word in BUILT[kind]]
    ran = hrm(*built(tmp_path, *words), *SMALL, "--bundle-dir", tmp_path / "bundle")
    assert ran.code == 0 and "held out" in ran.out, ran.err
    ran = hrm("solve", tmp_path / "bundle", "--file", tmp_path / "set", "--limit", "1")
    assert ran.code == 0 and "of 1 solved exactly" in ran.out
    first = ran.out.splitlines()[0]
    if kind == "arc":
        assert first.startswith("2 2   "), "a small grid is shown without its padding"
    if kind == "maze":
        assert len(first) == 6 + 3 + 6 and set(first[:6]) <= set("# SG")


def test_a_maze_is_solved_as_it_is_written(tmp_path: Path) -> None:
    """With spaces, or with points for them."""
    train = built(tmp_path, *BUILT["maze"])
    assert hrm(*train, *SMALL, "--bundle-dir", tmp_path / "bundle").code == 0
    rows = ("S  # G", "## # #", "   #  ", " ######", "      ", "######")
    maze = "".join(row[:6] for row in rows)
    answers = [hrm("solve", tmp_path / "bundle", word).out for word in (maze, maze.replace(" ", "."), "\n".join(maze))]
    assert answers[0] == answers[1] and answers[0].startswith("S  # G   ")
    refused(2, "solve", tmp_path / "bundle", "S" * 35, naming=("35 symbols", "36 cells"))
    refused(2, "solve", tmp_path / "bundle", "x" * 36, naming=("symbol 'x'", "(space)"))


BAD = {
    "sudoku 5x5": (2, ("sudoku", "--size", "5"), ("size 5", "4, 6 or 9")),
    "a maze too wide": (2, ("maze", "--size", "31"), ("size 31", "5 to 30")),
    "a path too long": (2, ("maze", "--size", "7", "--min-path", "31"), ("--min-path 31", "--min-path 30")),
    "nine copies": (2, ("maze", "--augment", "9"), ("augment 9", "0 to 7")),
    "no folder": (2, ("arc", "nowhere"), ("nowhere", "no such folder")),
    "no tasks": (2, ("arc", "EMPTY"), ("empty", "no .json file")),
    "a ragged grid": (5, ("arc", "RAGGED"), ("bad.json, train pair 0, input", "row 1 has 1 cells")),
    "a colour too high": (5, ("arc", "COLOUR"), ("bad.json, test pair 0, output", "contains 10")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_one_message_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    code, words, naming = BAD[name]
    (tmp_path / "empty").mkdir()
    ragged = {"train": [{"input": [[1, 2], [3]], "output": [[1]]}], "test": COUNT["test"]}
    colour = {"train": COUNT["train"], "test": [{"input": [[1]], "output": [[10]]}]}
    places = {
        "EMPTY": tmp_path / "empty",
        "RAGGED": write_tasks(tmp_path / "ragged", bad=ragged),
        "COLOUR": write_tasks(tmp_path / "colour", bad=colour),
    }
    before = sorted(tmp_path.iterdir())
    filled = [places.get(word, word) for word in words]
    refused(code, "data", "build", *filled, "--out", tmp_path / "set", naming=naming)
    assert sorted(tmp_path.iterdir()) == before
