"""The configurations that are timed, and training loops on random rows for them, built as a run builds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hrm_ray.model.config import model_config
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.world import World
from hrm_ray.types import Columns

ROWS = 4096
"""Number of different random rows, which repeat."""


@dataclass(frozen=True)
class Case:
    """One model, one batch, one task; `parameters` is checked against the model that is built."""

    about: str
    model: Mapping[str, Any]
    vocab_size: int
    seq_len: int
    batch_size: int
    parameters: int
    optimizer: str = "adam-atan2"
    reference: tuple[str, str] | None = None
    """Section (without the number of threads) and entry of the reference figures to compare it with."""
    differs: str = ""
    """How that entry's step differs from this one."""


_PUZZLE = {
    "task": "puzzle",
    "use_moe": False,
    "num_heads": 4,
    "expansion": 4.0,
    "halt_max_steps": 8,
    "halt_exploration_prob": 0.1,
    "supervision": "segment",
    "loss": "stablemax",
}
_TEXT = {
    "task": "lm",
    "use_moe": False,
    "hidden_size": 256,
    "num_heads": 4,
    "expansion": 4.0,
    "halt_exploration_prob": 0.0,
    "supervision": "rollout",
    "loss": "softmax",
}
_SAME_PUZZLE = "the same step: one segment, its look-ahead, losses, adam-atan2"
CASES: dict[str, Case] = {
    "puzzle_h128": Case(
        "ACTv1 on puzzles, hidden 128, 32 x 81 cells, carried supervision",
        _PUZZLE | {"hidden_size": 128},
        *(11, 81, 32, 1_051_650),
        reference=("puzzle", "ref_hrm_puzzle_h128_float32"),
        differs=_SAME_PUZZLE,
    ),
    "puzzle_h256": Case(
        "ACTv1 on puzzles, hidden 256, 32 x 81 cells, carried supervision",
        _PUZZLE | {"hidden_size": 256},
        *(11, 81, 32, 3_414_018),
        reference=("puzzle", "ref_hrm_puzzle_h256_float32"),
        differs=_SAME_PUZZLE,
    ),
    "puzzle_demo": Case(
        "the demonstration's Sudoku model: hidden 64, 1+1 layers, 64 x 16 cells",
        _PUZZLE
        | {
            "hidden_size": 64,
            "num_heads": 2,
            "h_layers": 1,
            "l_layers": 1,
            "pos_encodings": "learned",
            "loss": "softmax",
        },
        *(6, 16, 64, 132_994),
    ),
    "text_m2": Case(
        "ACTv1 on text, hidden 256, vocabulary 8192, 8 x 128 tokens, 2 segments",
        _TEXT | {"halt_max_steps": 2},
        *(8192, 128, 8, 7_602_690),
        reference=("text", "aios_actv1_dense"),
        differs="also 2 segments, but it keeps one graph over all updates of both and differentiates them all",
    ),
    "text_m1": Case(
        "ACTv1 on text, as above, 1 segment",
        _TEXT | {"halt_max_steps": 1},
        *(8192, 128, 8, 7_602_690),
        reference=("text", "original_hrm_1_act_step"),
        differs="also 1 segment with the last two updates differentiated, but it adds a look-ahead segment without "
        "gradient for its Q target, which the `gain` rule needs not",
    ),
    "transformer": Case(
        "the baseline transformer of 4 layers, 8 x 128 tokens",
        _TEXT | {"arch": "transformer", "halt_max_steps": 1},
        *(8192, 128, 8, 7_602_176),
        reference=("text", "plain_causal_transformer_4L"),
        differs="the same: 4 causal layers, one pass",
    ),
}


class RandomRows:
    """A SampleSet of random tokens; text labels are the next token of the row."""

    def __init__(self, case: Case) -> None:
        draw = np.random.default_rng(0)
        shape = (ROWS, case.seq_len)
        self.puzzles = case.model["task"] == "puzzle"
        self.inputs = draw.integers(1, case.vocab_size, shape).astype(np.int32)
        other = draw.integers(1, case.vocab_size, shape).astype(np.int32)
        self.labels = other if self.puzzles else np.roll(self.inputs, -1, axis=1)

    def __len__(self) -> int:
        return 10**6

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        at = np.maximum(indices, 0) % ROWS
        columns: Columns = {"inputs": self.inputs[at], "labels": self.labels[at], "active": indices >= 0}
        if self.puzzles:
            columns["puzzle_identifiers"] = np.zeros(len(indices), dtype=np.int32)
        return columns


def build_loop(case: Case, threads: int, **model_changes: Any) -> TrainingLoop:
    """A loop on the CPU for the case, its model's settings changed as named."""
    settings = RunSettings.model_validate(
        {
            "model": {**case.model, **model_changes},
            "optimizer": {"batch_size": case.batch_size, "optimizer": case.optimizer},
            # The floor and the reference are float32 and keep what the backward pass needs.
            "memory": {"amp": False, "gradient_checkpointing": False},
        }
    )
    config = model_config(settings, case.vocab_size, seq_len=case.seq_len)
    loop = assemble(settings, config, RandomRows(case), World.here("cpu", threads), 1000)
    count = sum(parameter.numel() for parameter in loop.parts.objective.parameters())
    if count != case.parameters:
        raise RuntimeError(f"{case.about}: {count:,} parameters, not the {case.parameters:,} that are meant")
    return loop
