"""Evaluating long rows a chunk at a time: the figures of whole rows, without their activations and scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from hrm_ray.model import scoring
from hrm_ray.model.build import build_objective
from hrm_ray.model.chunked import Chunking
from hrm_ray.train import evaluate_text
from hrm_ray.train.evaluate import EvalSet, evaluate
from hrm_ray.train.storage_tracker import StorageTracker
from hrm_ray.train.world import World
from hrm_ray.types import Columns
from tests.support.tiny_models import text_batch, tiny_config, tiny_model

HERE = World.here("cpu", 1)
CASES: dict[str, dict[str, Any]] = {
    "actv1": {"halt_max_steps": 3},
    "without halting": {"halt_max_steps": 2, "halt_rule": "none"},
    "window": {"halt_max_steps": 3, "window_size": 4},
    "learned positions": {"pos_encodings": "learned"},
    "experts": {"num_experts": 4, "moe_capacity_factor": 0.5},
    "transformer": {"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none", "h_layers": 2},
}


class Rows:
    """A sample set of one batch."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.columns = {name: column.numpy() for name, column in text_batch(3, rows).items()}

    def __len__(self) -> int:
        return len(self.columns["inputs"])

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        return {name: column[indices] for name, column in self.columns.items()}


def figures(case: dict[str, Any], rows: list[list[int]], chunking: Chunking | None) -> dict[str, float]:
    model = tiny_model(tiny_config(seq_len=sum(rows[0]), **case))
    objective = build_objective(model, "softmax", supervision="rollout", halt_margin=0.01, chunking=chunking)
    return evaluate(objective, EvalSet(Rows(rows), len(rows), 1), HERE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [3, 5])
def test_the_figures_of_whole_rows(case: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 sums in another order: 2e-6. Long rows are read in chunks although the model is trained whole."""
    rows = [[7, 5], [4, 8], [12]]
    want = figures(CASES[case], rows, None)
    assert figures(CASES[case], rows, Chunking(size, exact=False)) == pytest.approx(want, rel=2e-6)
    monkeypatch.setattr(evaluate_text, "POSITIONS_AT_ONCE", size)
    assert figures(CASES[case], rows, None) == pytest.approx(want, rel=2e-6)


@pytest.mark.parametrize("case", ["actv1", "transformer"])
def test_no_tensor_of_a_whole_row_beside_states(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 positions, an FFN of 256 and a vocabulary of 500, read 64 positions at a time."""
    monkeypatch.setattr(evaluate_text, "POSITIONS_AT_ONCE", 64)
    monkeypatch.setattr(scoring, "SCORES_BYTES", 2**14)
    with StorageTracker() as count:
        figures(CASES[case] | {"intermediate_size": 256, "vocab_size": 500}, [[512]], None)
    assert count.largest_bytes() <= 4 * max(512 * 16, 64 * 500, 64 * 512)


def test_rows_with_a_prompt_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt sees itself fully; to cut it would change the figures."""
    monkeypatch.setattr(evaluate_text, "POSITIONS_AT_ONCE", 5)
    model = tiny_model(tiny_config(lm_mask="prefix"))
    objective = build_objective(model, "softmax", supervision="rollout", halt_margin=0.01)
    batch = text_batch(3, [[12], [7, 5]], prompts=[6, 3])
    with torch.no_grad():
        sums = evaluate_text.text_sums(objective, batch)  # type: ignore[arg-type]
        monkeypatch.setattr(evaluate_text, "POSITIONS_AT_ONCE", 12)
        again = evaluate_text.text_sums(objective, batch)  # type: ignore[arg-type]
    assert {name: float(value) for name, value in sums.items()} == {n: float(v) for n, v in again.items()}
