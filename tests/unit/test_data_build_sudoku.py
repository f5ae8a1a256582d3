"""Built Sudoku sets: held-out puzzles stay held out, and a build is whole or absent."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from hrm_ray.cli.build_data import _BuildProgress
from hrm_ray.data.builders import sudoku as builder
from hrm_ray.data.builders.sudoku import Difficulty, build_sudoku
from hrm_ray.data.puzzles import sudoku
from hrm_ray.data.puzzles.samples import open_puzzles
from hrm_ray.errors import SettingsError

SPLITS = ("train", "test")


def split_of(folder: Path, split: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Puzzles and solutions as digits."""
    samples = open_puzzles(folder, split)
    rows = samples.rows(np.arange(len(samples)))
    return (
        [tuple(row) for row in (rows["inputs"] - 1).tolist()],
        [tuple(row) for row in (rows["labels"] - 1).tolist()],
    )


@pytest.mark.parametrize(("size", "train", "augment"), [(4, 300, 6), (6, 100, 3), (9, 12, 3)])
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
    copies = sudoku.draw_symmetries(40, 9, np.random.default_rng(0)).apply(np.array(bases * 20, dtype=np.uint8))
    monkeypatch.setattr(sudoku, "random_grid", lambda size, rng: tuple(copies[rng.randrange(40)].tolist()))
    build_sudoku(tmp_path / "set", size=9, train=12, test=1, augment=1)
    classes = {sudoku.grid_class(9, grid) for grid in split_of(tmp_path / "set", "train")[1]}
    held_out = {sudoku.grid_class(9, grid) for grid in split_of(tmp_path / "set", "test")[1]}
    assert len(classes) == 1 and not classes & held_out


def test_4x4_holds_out_a_quarter_of_the_grids(tmp_path: Path) -> None:
    summary = build_sudoku(tmp_path / "set", size=4, train=3000, test=600, augment=2)
    assert (summary.train_grids, summary.test_grids) == (216, 72)


def test_6x6_holds_out_a_fifth_of_the_grids_whatever_is_drawn(tmp_path: Path) -> None:
    """The classes are shared out beforehand: even many held-out puzzles leave classes to train on."""
    build_sudoku(tmp_path / "set", size=6, train=250, test=250)
    train, test = ({sudoku.grid_class(6, grid) for grid in split_of(tmp_path / "set", split)[1]} for split in SPLITS)
    assert not train & test and len(train) > 20 and len(test) > 3
    counted = sudoku.classes_6x6()
    for seed in range(20):
        held_out = set(builder._held_out_classes_6x6(seed))
        assert 0.2 <= sum(counted[kind] for kind in held_out) / counted.total() < 0.3
    assert {kind for kind in counted if kind in set(builder._held_out_classes_6x6(0))} >= test


def test_the_seed_decides_and_the_held_out_set_does_not_depend_on_train(tmp_path: Path) -> None:
    for name, train, seed in (("a", 30, 1), ("b", 30, 1), ("c", 30, 2), ("d", 50, 1)):
        build_sudoku(tmp_path / name, size=4, train=train, test=20, augment=1, seed=seed)
    for file in ("dataset.json", "train.safetensors", "test.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert split_of(tmp_path / "a", "train") != split_of(tmp_path / "c", "train")
    assert split_of(tmp_path / "a", "test") == split_of(tmp_path / "d", "test")


@pytest.mark.parametrize(("difficulty", "low", "high"), [("easy", 1, 2), ("medium", 3, 5), ("hard", 6, 10**9)])
def test_difficulty_is_kept(tmp_path: Path, difficulty: Difficulty, low: int, high: int) -> None:
    summary = build_sudoku(tmp_path / "set", size=9, train=4, test=2, difficulty=difficulty)
    assert all(low <= grade <= high for grade in summary.grades)
    for puzzle in split_of(tmp_path / "set", "test")[0]:
        assert low <= sudoku.grade(9, puzzle) <= high


def test_clues_are_kept(tmp_path: Path) -> None:
    assert build_sudoku(tmp_path / "set", size=9, train=5, test=2, clues=32).clues == {32: 5}


def test_what_cannot_be_built_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as caught:
        build_sudoku(tmp_path / "set", size=8, train=0, test=-1, difficulty="cruel", augment=-1)  # type: ignore[arg-type]
    assert len(caught.value.faults) == 5
    assert all(fault.value.startswith("--") for fault in caught.value.faults)
    with pytest.raises(SettingsError, match="17 to 80"):
        build_sudoku(tmp_path / "set", clues=12)
    with pytest.raises(SettingsError, match="8 to 35"):
        build_sudoku(tmp_path / "set", size=6, clues=7)
    monkeypatch.setattr(builder, "_PATIENCE", {4: 8, 6: 8, 9: 3})
    with pytest.raises(SettingsError, match="^--t.* of difficulty hard .*of the last 8 draws 0 gave a new one"):
        build_sudoku(tmp_path / "set", size=4, train=10, difficulty="hard")
    assert not any(tmp_path.iterdir())


def test_more_4x4_puzzles_than_exist_are_refused_with_their_number(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="only 64244 different 4x4 puzzles that are minimal exist on the 216 grids"):
        build_sudoku(tmp_path / "set", size=4, train=100_000, test=1)
    assert not any(tmp_path.iterdir())


def test_nearly_all_4x4_puzzles_are_found(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def progress(what: str, made: int, wanted: int) -> None:
        seen.append((what, made, wanted))

    build_sudoku(tmp_path / "set", size=4, train=300, test=21_000, progress=progress)
    puzzles, _ = split_of(tmp_path / "set", "test")
    assert len(set(puzzles)) == 21_000
    assert seen[0] == ("train", 0, 300) and all(made < 300 for _, made, _ in seen) and len(seen) > 2
    rng = random.Random(0)
    for grid in rng.sample(sudoku.all_grids_4x4(), 3):
        minimal = {tuple(puzzle) for puzzle in sudoku.puzzles_4x4(grid, None).tolist()}
        assert {sudoku.reduce_clues(4, grid, rng, None) for _ in range(50)} <= minimal
        assert all(list(sudoku.solutions(4, puzzle)) == [grid] for puzzle in list(minimal)[:20])


def test_progress_is_a_line_every_ten_seconds_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 5.0, 11.0, 12.0, 21.5])
    progress = _BuildProgress(clock=lambda: next(times))
    for made in (1, 2, 3, 4):
        progress("train", made, 9)
    assert capsys.readouterr().err == "train: 2 of 9\ntrain: 4 of 9\n"


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
    with pytest.raises(SettingsError, match="a file has this name"):
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

    monkeypatch.setattr(builder, "write_description", fail)
    for name in ("new", "old"):
        with pytest.raises(kind):
            build_sudoku(tmp_path / name, size=4, train=7, test=5, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]
    assert len(open_puzzles(tmp_path / "old")) == 5
