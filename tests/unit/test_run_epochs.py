"""Epochs: how many steps they take, and that every sample is trained once in each."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.puzzles.samples import PuzzleSamples
from hrm_ray.train import session
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loaders import BatchSize, RolloutLoader, SlotLoader, StopCondition, exploration
from hrm_ray.types import Columns
from tests.support.runs import PUZZLE, TEXT, puzzle_file, records, text_file, train


class Recording:
    """A sample set that remembers what was asked for."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.taken: list[int] = []

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        self.taken += [int(index) for index in indices if index >= 0]
        return {"active": indices >= 0, "index": indices}


shapes = st.fixed_dictionaries(
    {
        "count": st.integers(1, 40),
        "batch": st.integers(1, 7),
        "accumulation": st.integers(1, 3),
        "ranks": st.integers(1, 3),
        "epochs": st.integers(1, 3),
        "linear": st.booleans(),
        "seed": st.integers(0, 2**63 - 1),
    }
)


@given(shapes)
def test_rollout(case: dict[str, Any]) -> None:
    """ceil(n / B) steps an epoch, each with the next samples of the order, whatever the split over ranks."""
    effective = case["batch"] * case["accumulation"] * case["ranks"]
    per_epoch = -(-case["count"] // effective)
    seen: list[list[int]] = [[] for _ in range(case["epochs"] * per_epoch)]
    for rank in range(case["ranks"]):
        samples = Recording(case["count"])
        shape = BatchSize(case["batch"], case["accumulation"], rank, case["ranks"])
        loader = RolloutLoader(
            samples, shape, seed=case["seed"], linear=case["linear"], stop_condition=StopCondition(case["epochs"])
        )
        for epoch in range(case["epochs"]):
            assert loader.epoch == epoch
            for step in range(per_epoch):
                samples.taken.clear()
                micro = loader.next_batch([], step)
                assert [len(columns["active"]) for columns in micro] == [case["batch"]] * case["accumulation"]
                seen[epoch * per_epoch + step] += samples.taken
            assert not any(columns["active"].any() for columns in loader.next_batch([], 0))
            place = loader.state_dict()["taken"].copy()
            assert loader.start_epoch(True) == (epoch + 1 < case["epochs"])
        assert (loader.state_dict()["taken"] == place).all(), "past the last epoch the place stays"
    for epoch in range(case["epochs"]):
        steps = seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        whole = [index for step in steps for index in step]
        assert sorted(whole) == list(range(case["count"]))
        assert not case["linear"] or whole == list(range(case["count"]))
        assert all(len(step) == effective for step in steps[:-1])


@settings(max_examples=25)
@given(shapes, st.integers(1, 4), st.floats(0, 1), st.integers(0, 2**32))
def test_carried(case: dict[str, Any], halt_max_steps: int, chance: float, draw: int) -> None:
    """Rows halt when they like: over an epoch the ranks together take every sample once, and a slot its own ones."""
    rng = np.random.default_rng(draw)
    effective = case["batch"] * case["accumulation"] * case["ranks"]
    explore = exploration(case["seed"], chance, halt_max_steps)
    taken: list[Counter[int]] = [Counter() for _ in range(case["epochs"])]
    for rank in range(case["ranks"]):
        samples = Recording(case["count"])
        shape = BatchSize(case["batch"], case["accumulation"], rank, case["ranks"])
        loader = SlotLoader(
            samples,
            shape,
            seed=case["seed"],
            linear=case["linear"],
            stop_condition=StopCondition(case["epochs"]),
            explore=explore,
        )
        halted = [np.ones(case["batch"], dtype=np.bool_) for _ in range(case["accumulation"])]
        for epoch in range(case["epochs"]):
            samples.taken.clear()
            idle = 0
            for step in range(10_000):
                micro = loader.next_batch(halted, step)
                for number, columns in enumerate(micro):
                    offered = columns["active"] & halted[number]
                    if case["linear"]:
                        slots = shape.slots()[number]
                        assert (columns["index"][offered] % effective == slots[offered]).all()
                    assert not (columns["active"] & ~halted[number]).any()
                idle = 0 if any(columns["active"].any() for columns in micro) else idle + 1
                halted = [rng.random(case["batch"]) < 0.6 for _ in halted]
                if idle > 15:  # a slot that was offered nothing in so many steps has halted meanwhile
                    break
            taken[epoch] += Counter(samples.taken)
            halted = [np.ones(case["batch"], dtype=np.bool_) for _ in range(case["accumulation"])]
            assert loader.start_epoch(True) == (epoch + 1 < case["epochs"])
    for counted in taken:
        assert counted == Counter(range(case["count"]))


@given(st.integers(0, 2**63 - 1), st.integers(1, 10**6), st.integers(2, 16), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=25)
def test_exploration_is_of_the_slot(seed: int, step: int, longest: int, rows: int, ranks: int) -> None:
    """Whoever holds a slot draws the same for it, and within the bounds."""
    draw = exploration(seed, 0.5, longest)
    whole = draw(step, np.arange(rows * ranks))
    parts = [draw(step, np.arange(rank * rows, (rank + 1) * rows)) for rank in range(ranks)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert ((whole == 0) | ((whole >= 2) & (whole <= longest))).all()


@pytest.mark.parametrize("words", [(), ("--no-linear-dataset",), ("--gradient-accumulation-steps", "3")])
def test_steps_of_text_epochs(words: tuple[str, ...], tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    train(text_file(tmp_path), bundle, *TEXT, "--epochs", "2", *words)
    logged = records(bundle)
    effective = logged[0]["effective_batch_size"]
    assert effective == (12 if len(words) == 2 else 4)
    rows = int(json.loads((bundle / "training_args.json").read_text())["data"]["rows"])
    assert rows % effective, "an epoch should end with a smaller step here"
    per_epoch = -(-rows // effective)
    assert [record["epoch"] for record in logged] == [0] * per_epoch + [1] * per_epoch


@pytest.mark.parametrize("words", [(), ("--no-linear-dataset",), ("--gradient-accumulation-steps", "2")])
@pytest.mark.parametrize("count", [3, 14])
def test_puzzles_of_carried_epochs(
    count: int, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real halting: two epochs ask for each puzzle twice."""
    asked: Counter[int] = Counter()
    real = PuzzleSamples.rows
    trained: list[bool] = []

    def counting(samples: PuzzleSamples, indices: npt.NDArray[np.int64]) -> Columns:
        if trained:
            asked.update(int(index) for index in indices if index >= 0)
        return real(samples, indices)

    def assembled(*parts: Any, **named: Any) -> Any:
        trained.append(True)
        return assemble(*parts, **named)

    monkeypatch.setattr(PuzzleSamples, "rows", counting)
    monkeypatch.setattr(session, "assemble", assembled)
    train(puzzle_file(tmp_path, count=count), tmp_path / "b", *PUZZLE, "--epochs", "2", *words)
    assert asked == Counter({number: 2 for number in range(count)})
    assert [record["epoch"] for record in records(tmp_path / "b")][-1] == 1
