"""Built data sets: held-out data stays held out, and a build is whole or absent."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from hrm_ray.data import build
from hrm_ray.data.build import build_sudoku, build_text
from hrm_ray.data.parts import TextSource
from hrm_ray.data.puzzles import sudoku, symmetry
from hrm_ray.data.puzzles.samples import open_puzzles
from hrm_ray.data.readers import read_documents
from hrm_ray.errors import SettingsError


def split_of(folder: Path, split: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Puzzles and solutions as digits."""
    samples = open_puzzles(folder, split)
    rows = samples.rows(np.arange(len(samples)))
    return (
        [tuple(row) for row in (rows["inputs"] - 1).tolist()],
        [tuple(row) for row in (rows["labels"] - 1).tolist()],
    )


@pytest.mark.parametrize(("size", "train", "augment"), [(4, 300, 6), (9, 12, 3)])
def test_sudoku_sets_are_right_and_held_out(tmp_path: Path, size: int, train: int, augment: int) -> None:
    out = tmp_path / "set"
    summary = build_sudoku(out, size=size, train=train, test=10, augment=augment, seed=3)
    puzzles, grids = split_of(out, "train")
    test_puzzles, test_grids = split_of(out, "test")
    assert len(puzzles) == summary.train == train * (1 + augment) and len(set(puzzles[:train])) == train
    assert len(set(test_puzzles)) == summary.test == 10
    for puzzle, grid in [*zip(puzzles, grids, strict=True), *zip(test_puzzles, test_grids, strict=True)]:
        assert list(sudoku.solutions(size, puzzle)) == [grid]
    assert not set(grids) & set(test_grids)
    classes = {sudoku.grid_class(size, grid) for grid in grids}
    held_out = {sudoku.grid_class(size, grid) for grid in test_grids}
    assert size == 4 or not classes & held_out, "no symmetry carries a training grid to a held-out one"
    assert sum(summary.grades.values()) == sum(summary.clues.values()) == train
    assert open_puzzles(out).facts.render(np.array([0, 1] + [2] * (size * size - 2))).startswith("# . 1 1")


def test_training_keeps_clear_of_symmetric_copies_of_held_out_grids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With only two essentially different grids to draw from, training gets those of the one that is not held out."""
    rng = random.Random(0)
    bases = [sudoku.random_grid(9, rng), sudoku.random_grid(9, rng)]
    copies = symmetry.draw(40, 9, np.random.default_rng(0)).apply(np.array(bases * 20, dtype=np.uint8))
    monkeypatch.setattr(sudoku, "random_grid", lambda size, rng: tuple(copies[rng.randrange(40)].tolist()))
    build_sudoku(tmp_path / "set", size=9, train=12, test=1, augment=1)
    classes = {sudoku.grid_class(9, grid) for grid in split_of(tmp_path / "set", "train")[1]}
    held_out = {sudoku.grid_class(9, grid) for grid in split_of(tmp_path / "set", "test")[1]}
    assert len(classes) == 1 and not classes & held_out


def test_4x4_holds_out_a_quarter_of_the_grids(tmp_path: Path) -> None:
    summary = build_sudoku(tmp_path / "set", size=4, train=3000, test=600, augment=2)
    assert (summary.train_grids, summary.test_grids) == (216, 72)


def test_the_seed_decides_and_the_held_out_set_does_not_depend_on_train(tmp_path: Path) -> None:
    for name, train, seed in (("a", 30, 1), ("b", 30, 1), ("c", 30, 2), ("d", 50, 1)):
        build_sudoku(tmp_path / name, size=4, train=train, test=20, augment=1, seed=seed)
    for file in ("dataset.json", "train.safetensors", "test.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert split_of(tmp_path / "a", "train") != split_of(tmp_path / "c", "train")
    assert split_of(tmp_path / "a", "test") == split_of(tmp_path / "d", "test")


@pytest.mark.parametrize(("difficulty", "low", "high"), [("easy", 1, 2), ("medium", 3, 5), ("hard", 6, 10**9)])
def test_difficulty_is_kept(tmp_path: Path, difficulty: build.Difficulty, low: int, high: int) -> None:
    summary = build_sudoku(tmp_path / "set", size=9, train=4, test=2, difficulty=difficulty)
    assert all(low <= grade <= high for grade in summary.grades)
    for puzzle in split_of(tmp_path / "set", "test")[0]:
        assert low <= sudoku.grade(9, puzzle) <= high


def test_clues_are_kept(tmp_path: Path) -> None:
    assert build_sudoku(tmp_path / "set", size=9, train=5, test=2, clues=32).clues == {32: 5}


def test_what_cannot_be_built_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as caught:
        build_sudoku(tmp_path / "set", size=6, train=0, test=-1, difficulty="cruel", augment=-1)  # type: ignore[arg-type]
    assert len(caught.value.faults) == 5
    with pytest.raises(SettingsError, match="17 to 80"):
        build_sudoku(tmp_path / "set", clues=12)
    monkeypatch.setattr(build, "_PATIENCE", {4: 8, 9: 3})
    for impossible in ({"difficulty": "hard"}, {"test": 10**6}):
        with pytest.raises(SettingsError, match="draws in a row"):
            build_sudoku(tmp_path / "set", size=4, train=10, **impossible)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_files_of_others_are_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "set"
    build_sudoku(out, size=4, train=5, test=5)
    before = (out / "dataset.json").read_bytes()
    with pytest.raises(SettingsError, match="not empty.*--overwrite"):
        build_sudoku(out, size=4, train=6, test=5)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(SettingsError, match=r"thesis\.txt"):
        build_sudoku(out, size=4, train=6, test=5, overwrite=True)
    assert (out / "dataset.json").read_bytes() == before
    (out / "thesis.txt").unlink()
    build_sudoku(out, size=4, train=6, test=5, overwrite=True)
    assert len(open_puzzles(out)) == 6
    with pytest.raises(SettingsError, match="file of this name"):
        build_sudoku(out / "dataset.json", size=4, train=6, test=5)
    (tmp_path / "empty").mkdir()
    build_sudoku(tmp_path / "empty", size=4, train=6, test=5)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "set"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    build_sudoku(tmp_path / "old", size=4, train=5, test=5)

    def fail(*_: object) -> None:
        raise kind

    monkeypatch.setattr(build, "write_description", fail)
    for name in ("new", "old"):
        with pytest.raises(kind):
            build_sudoku(tmp_path / name, size=4, train=7, test=5, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]
    assert len(open_puzzles(tmp_path / "old")) == 5


def test_the_text_corpus_is_large_and_held_out(tmp_path: Path) -> None:
    summary = build_text(tmp_path / "text")
    train = list(read_documents(TextSource(tmp_path / "text", "train")))
    test = list(read_documents(TextSource(tmp_path / "text", "test")))
    assert (len(train), len(test)) == (summary.train_documents, summary.test_documents)
    assert summary.train_bytes == sum(len(document.text.encode()) for document in train) > 500_000
    assert 0.005 < len(test) / (len(train) + len(test)) < 0.05
    texts = [document.text for document in train + test]
    assert len(set(texts)) == len(texts), "no document twice, so none held out occurs in training"
    assert not {document.text for document in train} & {document.text for document in test}
    assert any("JSONDecoder" in text for text in texts)
    with (tmp_path / "text" / "train.jsonl").open(encoding="utf-8") as file:
        assert set(json.loads(next(file))) == {"text", "source"}


def test_the_text_corpus_stops_at_its_size_and_follows_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [(f"d{number}", f"text number {number}\n") for number in range(400)] + [("again", "text number 7\n")]
    monkeypatch.setattr(build, "python_documents", lambda: iter(documents))
    whole = build_text(tmp_path / "whole")
    assert whole.duplicates == 1 and whole.train_documents + whole.test_documents == 400
    small = build_text(tmp_path / "small", max_bytes=4000)
    assert 3980 < small.train_bytes + small.test_bytes <= 4000
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_text(tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert a == b != c
    with pytest.raises(SettingsError, match="--max-bytes"):
        build_text(tmp_path / "none", max_bytes=10)
    assert not (tmp_path / "none").exists()
