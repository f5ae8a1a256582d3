"""ARC tasks: read and checked, laid out as in the public sets, copied under symmetries, test pairs held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.builders.arc import BLANK, build_arc
from hrm_ray.data.puzzles import arc
from hrm_ray.data.puzzles.samples import open_puzzles
from hrm_ray.errors import DataError, SettingsError
from hrm_ray.types import IGNORE_LABEL
from tests.support.arc_tasks import COUNT, FILL, MIRROR, pair, write_tasks


def grid_of(tokens: np.ndarray) -> list[list[int]]:
    """Written apart from the layout: the colours before the first cell that is none, row by row."""
    rows = []
    for row in tokens.reshape(30, 30).tolist():
        colours = []
        for token in row:
            if token < 2:
                break
            colours.append(token - 2)
        if not colours:
            break
        rows.append(colours)
    return rows


@given(height=st.integers(1, 30), width=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_layout_is_that_of_the_public_sets(height: int, width: int, seed: int) -> None:
    grid = np.random.default_rng(seed).integers(0, 10, (height, width)).astype(np.uint8)
    tokens = arc.tokens(grid)
    cells = tokens.reshape(30, 30)
    assert tokens.dtype == np.uint8 and grid_of(tokens) == grid.tolist()
    ends = int(height < 30) * width + int(width < 30) * height
    assert (cells == 1).sum() == ends and (cells == 0).sum() == 900 - height * width - ends
    assert (cells[height : height + 1, :width] == 1).all() and (cells[:height, width : width + 1] == 1).all()


def columns(folder: Path, split: str) -> dict[str, Any]:
    samples = open_puzzles(folder, split)
    return dict(samples.rows(np.arange(len(samples))))


def labels_as_tokens(labels: np.ndarray) -> np.ndarray:
    return np.where(labels == IGNORE_LABEL, 0, labels)


def test_train_pairs_are_trained_on_and_test_pairs_held_out(tmp_path: Path) -> None:
    made = build_arc(write_tasks(tmp_path / "tasks"), tmp_path / "set")
    assert (made.tasks, made.copies, made.train, made.test) == (3, 0, 5, 4)
    names = json.loads((tmp_path / "set" / "identifiers.json").read_text())
    assert names == [BLANK, "deep/count", "fill", "mirror"]
    facts = open_puzzles(tmp_path / "set").facts
    assert (facts.seq_len, facts.vocab_size, facts.num_puzzle_identifiers, facts.pad_id) == (900, 12, 4, 0)
    of_name = {"deep/count": COUNT, "fill": FILL, "mirror": MIRROR}
    for split in ("train", "test"):
        rows = columns(tmp_path / "set", split)
        wanted = [(name, each) for name in names[1:] for each in of_name[name][split]]
        assert len(rows["inputs"]) == len(wanted)
        for shown, label, identifier, (name, each) in zip(
            rows["inputs"], rows["labels"], rows["puzzle_identifiers"], wanted, strict=True
        ):
            assert names[identifier] == name
            assert grid_of(shown) == each["input"] and grid_of(labels_as_tokens(label)) == each["output"]


def test_copies_are_turned_and_recoloured_and_have_identifiers_of_their_own(tmp_path: Path) -> None:
    made = build_arc(write_tasks(tmp_path / "tasks"), tmp_path / "set", augment=6)
    names = json.loads((tmp_path / "set" / "identifiers.json").read_text())
    assert made.copies == 18 and len(names) == 1 + 3 + 18 and len(set(names)) == len(names)
    train, test = columns(tmp_path / "set", "train"), columns(tmp_path / "set", "test")
    assert made.train == len(train["inputs"]) == 5 * 7 and made.test == 4
    assert {names[identifier] for identifier in test["puzzle_identifiers"]} == {"deep/count", "fill", "mirror"}
    bases = {"mirror": MIRROR, "fill": FILL, "deep/count": COUNT}
    seen: dict[str, list[tuple[Any, Any]]] = {}
    for shown, label, identifier in zip(train["inputs"], train["labels"], train["puzzle_identifiers"], strict=True):
        seen.setdefault(names[identifier], []).append((grid_of(shown), grid_of(labels_as_tokens(label))))
    assert set(seen) == set(names[1:])
    for name, pairs in seen.items():
        if name in bases:
            continue
        base, symmetry, colours = name.rsplit("_", 2)
        assert colours[0] == "0" and sorted(colours) == list("0123456789") and symmetry[1:] in "01234567"
        for (shown, wanted), each in zip(pairs, bases[base]["train"], strict=True):
            for copied, original in ((shown, each["input"]), (wanted, each["output"])):
                assert copied == by_hand(original, int(symmetry[1:]), colours)
    assert len({json.dumps(pairs) for pairs in seen.values()}) == len(seen), "no copy shows the same as another"


def by_hand(grid: list[list[int]], symmetry: int, colours: str) -> list[list[int]]:
    """A copy made with lists: mirrored, then turned to the left so often, recoloured."""
    copied = [[int(colours[cell]) for cell in (row[::-1] if symmetry >= 4 else row)] for row in grid]
    for _ in range(symmetry % 4):
        copied = [list(column) for column in zip(*copied, strict=True)][::-1]
    return copied


def test_a_task_with_few_different_copies_has_no_more(tmp_path: Path) -> None:
    """Only black and one cell: no turn and no colour changes it."""
    black = {"train": [pair([[0]], [[0]])], "test": [pair([[0, 0]], [[0]])]}
    made = build_arc(write_tasks(tmp_path / "tasks", black=black, mirror=MIRROR), tmp_path / "set", augment=5)
    assert made.copies == 5 and made.train == 1 + 2 * 6


def test_a_training_pair_that_is_held_out_is_left_out(tmp_path: Path) -> None:
    """In its own task, in another one, and as a copy."""
    twice = {"train": [*MIRROR["train"], *MIRROR["test"]], "test": MIRROR["test"]}
    other = {"train": [COUNT["train"][0], MIRROR["test"][0]], "test": COUNT["test"]}
    made = build_arc(write_tasks(tmp_path / "tasks", twice=twice, other=other), tmp_path / "set")
    assert made.also_held_out == 2 and made.train == 3
    keys = {
        split: {(a.tobytes(), b.tobytes()) for a, b in zip(rows["inputs"], rows["labels"], strict=True)}
        for split, rows in ((split, columns(tmp_path / "set", split)) for split in ("train", "test"))
    }
    assert not keys["train"] & keys["test"]
    bar = {"train": [pair([[1, 0]], [[1]])], "test": [pair([[0, 1]], [[1]])]}
    copies = build_arc(write_tasks(tmp_path / "bars", bar=bar), tmp_path / "bar", augment=99)
    assert copies.also_held_out == 1 and copies.train == copies.copies == 9 * 4 - 1


def test_outputs_that_are_kept_back_are_counted(tmp_path: Path) -> None:
    hidden = {"train": COUNT["train"], "test": [{"input": [[1]]}, *COUNT["test"]]}
    made = build_arc(write_tasks(tmp_path / "tasks", hidden=hidden), tmp_path / "set")
    assert (made.kept_back, made.test) == (1, 1)
    all_hidden = {"train": COUNT["train"], "test": [{"input": [[1]]}]}
    with pytest.raises(SettingsError, match="no test pair has an output"):
        build_arc(write_tasks(tmp_path / "more", hidden=all_hidden), tmp_path / "none")
    with pytest.raises(SettingsError, match="none is left"):
        same = {"train": COUNT["test"], "test": COUNT["test"]}
        build_arc(write_tasks(tmp_path / "same", same=same), tmp_path / "none")
    assert not (tmp_path / "none").exists()


BAD: dict[str, tuple[Any, str]] = {
    "ragged": (pair([[1, 2], [3]], [[1]]), r"input: row 1 has 1 cells, the first row 2"),
    "tall": (pair([[1]] * 31, [[1]]), "31 rows of 1 cells"),
    "wide": (pair([[1]], [[1] * 31]), "output: the grid has 1 rows of 31 cells"),
    "colour 10": (pair([[10]], [[1]]), "row 0 contains 10"),
    "below 0": (pair([[-1]], [[1]]), "contains -1"),
    "a word": (pair([["red"]], [[1]]), 'contains "red"'),  # type: ignore[list-item]
    "a fraction": (pair([[1.0]], [[1]]), "contains 1.0"),  # type: ignore[list-item]
    "true": (pair([[True]], [[1]]), "contains true"),
    "empty": (pair([], [[1]]), "not a list of rows"),
    "empty row": (pair([[]], [[1]]), "not a list of rows"),
    "a number": ({"input": 3, "output": [[1]]}, "not a list of rows"),
    "no input": ({"output": [[1]]}, "no `input`"),
    "no output": ({"input": [[1]]}, "output: is not a list of rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_is_told_with_its_place(tmp_path: Path, name: str) -> None:
    bad, reason = BAD[name]
    task = {"train": [MIRROR["train"][0], bad], "test": MIRROR["test"]}
    write_tasks(tmp_path / "tasks", good=FILL, task=task)
    with pytest.raises(DataError, match=rf"task\.json, train pair 1.*{reason}"):
        build_arc(tmp_path / "tasks", tmp_path / "set")
    assert not (tmp_path / "set").exists() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"train": []}', '{"train": [{}], "test": 3}', '{"a": 1}', "\xff", "3"])
def test_a_file_that_is_no_task_is_told(tmp_path: Path, content: str) -> None:
    write_tasks(tmp_path / "tasks")
    (tmp_path / "tasks" / "other.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"other\.json"):
        build_arc(tmp_path / "tasks", tmp_path / "set")


def test_folders_without_tasks_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text("{}")
    for path, reason in (
        ("empty", "no .json file"),
        ("nothing", "no such folder"),
        ("file.json", "is a file"),
    ):
        with pytest.raises(SettingsError, match=reason):
            build_arc(tmp_path / path, tmp_path / "set")
    tasks = write_tasks(tmp_path / "tasks")
    with pytest.raises(SettingsError, match="would be read as a task"):
        build_arc(tasks, tasks / "set")
    with pytest.raises(SettingsError, match="^--augment -.*--augment 0 or more"):
        build_arc(tasks, tmp_path / "set", augment=-1)


def test_the_seed_decides_and_a_set_can_be_built_anew(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_arc(tasks, tmp_path / name, augment=4, seed=seed)
    for file in ("dataset.json", "identifiers.json", "train.safetensors", "test.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a" / "identifiers.json").read_text() != (tmp_path / "c" / "identifiers.json").read_text()
    with pytest.raises(SettingsError, match="not empty"):
        build_arc(tasks, tmp_path / "a")
    build_arc(tasks, tmp_path / "a", overwrite=True)
    assert len(json.loads((tmp_path / "a" / "identifiers.json").read_text())) == 4


def test_a_grid_is_shown_up_to_where_it_is_closed(tmp_path: Path) -> None:
    build_arc(write_tasks(tmp_path / "tasks", mirror=MIRROR), tmp_path / "set")
    facts = open_puzzles(tmp_path / "set").facts
    tokens = arc.tokens(np.array([[7, 0], [0, 8], [9, 9]], dtype=np.uint8))
    assert facts.render(tokens) == "7 0\n0 8\n9 9"
    answer = np.where(tokens == 0, 4, tokens)  # a model's answer holds anything where no label is
    assert facts.render(answer) == "7 0\n0 8\n9 9"
    whole = facts.render(np.full(900, 3))
    assert whole.count("\n") == 29 and set(whole) == {"1", " ", "\n"}
    assert facts.render(np.full(900, 1)).count("|") == 900 and facts.render(np.zeros(900, dtype=int)) == "_"
