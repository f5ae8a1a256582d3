"""Mazes: carved as they should be, shortest paths against brute force, and a built set whose halves share no walls."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.builders import maze as builder
from hrm_ray.data.builders.maze import GOAL, OPEN, START, SYMBOLS, WALL, WAY, build_maze
from hrm_ray.data.puzzles import dihedral, mazes
from hrm_ray.data.puzzles.samples import open_puzzles
from hrm_ray.errors import SettingsError

Grid = tuple[tuple[int, ...], ...]


def paths(free: np.ndarray, start: tuple[int, int], goal: tuple[int, int], most: int) -> list[list[tuple[int, int]]]:
    """Every path without repetition of at most `most` moves, by trying all."""
    found, unfinished = [], [[start]]
    while unfinished:
        path = unfinished.pop()
        if path[-1] == goal:
            found.append(path)
        elif len(path) <= most:
            r, c = path[-1]
            for cell in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                if min(cell) >= 0 and max(cell) < len(free) and free[cell] and cell not in path:
                    unfinished.append([*path, cell])
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(5, 14), openings=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_a_carved_maze_is_one_whole_and_a_tree_without_openings(seed: int, size: int, openings: float) -> None:
    free = mazes.carve(size, random.Random(seed), openings)
    cells = np.flatnonzero(free)
    found = mazes.distances(free, int(cells[0]))
    assert all(found.moves[cell] >= 0 for cell in cells.tolist()), "every open cell can be reached"
    joins = int((free[1:] & free[:-1]).sum() + (free[:, 1:] & free[:, :-1]).sum())
    rooms = (size + 1) // 2
    if openings == 0.0:
        assert joins == len(cells) - 1 and len(cells) == 2 * rooms**2 - 1, "a tree over all rooms"
    if openings == 1.0:
        assert len(cells) == rooms**2 + 2 * rooms * (rooms - 1), "no wall is left between rooms"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(5, 7), share=st.floats(0.4, 0.8))
def test_distances_and_shortest_paths_are_those_of_brute_force(seed: int, size: int, share: float) -> None:
    """On cells opened at random too, where several shortest paths are common."""
    rng = np.random.default_rng(seed)
    free = rng.random((size, size)) < share
    free[0, 0] = True
    found = mazes.distances(free, 0)
    for cell in rng.choice(np.flatnonzero(free), 5).tolist():
        tried = paths(free, (0, 0), divmod(cell, size), 8)
        shortest = min(map(len, tried), default=0) - 1
        if shortest < 0:
            assert found.moves[cell] < 0 or found.moves[cell] > 8
            continue
        best = [path for path in tried if len(path) == shortest + 1]
        assert (found.moves[cell], found.ways[cell]) == (shortest, len(best))
        if len(best) == 1:
            assert [divmod(step, size) for step in mazes.shortest_path(free, 0, cell)] == best[0]
        else:
            with pytest.raises(ValueError, match=f"{len(best)} shortest paths"):
                mazes.shortest_path(free, 0, cell)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(5, 12), min_path=st.integers(1, 30))
def test_ends_have_one_shortest_path_that_is_long_enough(seed: int, size: int, min_path: int) -> None:
    rng = random.Random(seed)
    free = mazes.carve(size, rng, 0.2)
    ends = mazes.draw_endpoints(free, rng, min_path)
    if ends is not None:
        path = mazes.shortest_path(free, *ends)
        assert min_path <= len(path) - 1 <= mazes.most_moves(size) and (path[0], path[-1]) == ends


def test_no_path_is_longer_than_the_bound() -> None:
    """3 x 3 rooms: the longest shortest path of any maze drawn meets the bound and never passes it."""
    rng = random.Random(0)
    longest = 0
    for _ in range(400):
        free = mazes.carve(5, rng, rng.choice([0.0, 0.0, 0.1]))
        for start in np.flatnonzero(free).tolist():
            longest = max(longest, *mazes.distances(free, start).moves)
    assert longest == mazes.most_moves(5) == 16


def test_the_eight_symmetries_are_eight_and_share_their_canonical_form() -> None:
    grid = np.arange(9).reshape(3, 3)
    copies = {dihedral.turned(grid, number).tobytes() for number in range(dihedral.COUNT)}
    assert len(copies) == 8 and dihedral.turned(grid, 0).tolist() == grid.tolist()
    forms = {dihedral.canonical(dihedral.turned(grid, number)) for number in range(8)}
    assert len(forms) == 1 and dihedral.canonical(np.arange(9)[::-1].reshape(3, 3) * 2) not in forms
    wide = np.arange(6).reshape(2, 3)
    assert [dihedral.turned(wide, number).shape for number in range(8)] == [(2, 3), (3, 2)] * 4


def split_of(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    samples = open_puzzles(folder, split)
    rows = samples.rows(np.arange(len(samples)))
    side = (-1, *samples.facts.grid) if samples.facts.grid else (-1,)
    return rows["inputs"].reshape(side), rows["labels"].reshape(side)


@pytest.mark.parametrize(("size", "openings"), [(5, 0.0), (10, 0.05), (30, 0.05)])
def test_mazes_are_right_and_held_out(tmp_path: Path, size: int, openings: float) -> None:
    base = 300 if size == 5 else 20
    summary = build_maze(tmp_path / "set", size=size, train=base, test=8, openings=openings, augment=7, seed=3)
    layouts: dict[str, set[bytes]] = {}
    for split, count in (("train", summary.train), ("test", 8)):
        inputs, labels = split_of(tmp_path / "set", split)
        assert len(inputs) == count
        for maze, answer in zip(inputs, labels, strict=True):
            free = maze != WALL
            (start,), (goal,) = (np.flatnonzero(maze == token).tolist() for token in (START, GOAL))
            path = mazes.shortest_path(free, start, goal)
            marked = maze.copy()
            marked.ravel()[path[1:-1]] = WAY
            assert np.array_equal(marked, answer) and len(path) - 1 >= size
            assert set(np.unique(maze).tolist()) <= {WALL, OPEN, START, GOAL}
            layouts.setdefault(split, set()).add(dihedral.canonical(free))
    assert not layouts["train"] & layouts["test"], "not even turned or mirrored"
    inputs, _ = split_of(tmp_path / "set", "train")
    assert len({maze.tobytes() for maze in inputs}) == summary.train
    assert len({dihedral.canonical(maze) for maze in inputs[:base]}) == base == summary.base_puzzles
    assert {dihedral.canonical(maze) for maze in inputs} == {dihedral.canonical(maze) for maze in inputs[:base]}
    assert base * 7 <= summary.train <= base * 8
    assert summary.moves[0] >= size


def test_a_copy_that_is_the_same_is_left_out() -> None:
    """A straight corridor in the middle is its own mirror image: four of the eight copies are different."""
    maze = np.full((5, 5), WALL, dtype=np.uint8)
    maze[2] = START, WAY, WAY, WAY, GOAL
    copies = builder._augmented(maze[None], 7, seed=0)
    assert len(copies) == 4 == len({copy.tobytes() for copy in copies}) and np.array_equal(copies[0], maze)


def test_the_signs_are_those_of_the_public_sets(tmp_path: Path) -> None:
    build_maze(tmp_path / "set", size=5, train=2, test=1)
    facts = open_puzzles(tmp_path / "set").facts
    assert "".join(SYMBOLS[1:]) == "# SGo" and (facts.vocab_size, facts.pad_id, facts.seq_len) == (6, 0, 25)
    inputs, labels = split_of(tmp_path / "set", "train")
    shown = facts.render(labels[0])
    assert [len(line) for line in shown.split("\n")] == [5] * 5 and {"S", "G", "o"} <= set(shown)
    assert np.array_equal(facts.parse(shown), labels[0].ravel()) and np.array_equal(
        facts.parse(facts.render(inputs[0])), inputs[0].ravel()
    )


def test_the_seed_decides_and_a_longer_set_begins_as_a_shorter_one(tmp_path: Path) -> None:
    for name, train, seed in (("a", 6, 1), ("b", 6, 1), ("c", 6, 2), ("d", 9, 1)):
        build_maze(tmp_path / name, size=7, train=train, test=4, augment=2, seed=seed)
    for file in ("dataset.json", "train.safetensors", "test.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    a, c, d = (split_of(tmp_path / name, "train")[1] for name in "acd")
    assert not np.array_equal(a, c) and np.array_equal(a[:6], d[:6])
    assert np.array_equal(split_of(tmp_path / "a", "test")[0], split_of(tmp_path / "d", "test")[0])
    built = json.loads((tmp_path / "a" / "dataset.json").read_text())["built"]
    assert built == {"min_path": 7, "openings": 0.05, "augment": 2, "seed": 1, "base_puzzles": 6}


def test_what_cannot_be_built_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as caught:
        build_maze(tmp_path / "set", size=31, train=0, test=0, openings=1.5, augment=8)
    assert len(caught.value.faults) == 5
    assert all(fault.value.startswith("--") for fault in caught.value.faults)
    for size in (4, 0, -3):
        with pytest.raises(SettingsError, match="5 to 30"):
            build_maze(tmp_path / "set", size=size)
    for min_path in (0, 17):
        with pytest.raises(SettingsError, match="^--min-path.*1 to 16 moves.*--min-path 16"):
            build_maze(tmp_path / "set", size=5, min_path=min_path)
    monkeypatch.setattr(builder, "_PATIENCE", 20)
    with pytest.raises(SettingsError, match="of the last 20 draws 0 gave a new one.*--min-path"):
        build_maze(tmp_path / "set", size=30, min_path=440, train=5, test=5)
    assert not any(tmp_path.iterdir())
