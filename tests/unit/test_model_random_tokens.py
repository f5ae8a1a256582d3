"""On tokens that nothing predicts, training must not bring the held-out loss below ln V: who falls below it, peeks.

Every step gets fresh tokens, so there is nothing to memorise either. The noise is measured: a fair reader's loss on N
held-out tokens has mean ln V or more and a standard error of std/sqrt(N); 5 of them are allowed downwards. Upwards
0.05 nats are allowed for what the weights still have of their start and of the last batches' noise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.build import build_model, build_objective
from hrm_ray.model.losses import CROSS_ENTROPIES
from hrm_ray.settings.optimizer import OptimizerSettings
from hrm_ray.train.evaluate import EvalSet, evaluate
from hrm_ray.train.loaders import BatchSize, RolloutLoader, StopCondition
from hrm_ray.train.loop import TrainingLoop, TrainState
from hrm_ray.train.microbatch import to_batch, wanted_columns
from hrm_ray.train.optimizers import builder
from hrm_ray.train.precision import Precision
from hrm_ray.train.schedules import LrSchedule, Schedule
from hrm_ray.train.strategies import SingleStrategy
from hrm_ray.train.world import World
from hrm_ray.types import IGNORE_LABEL, Columns
from tests.support.tiny_models import logits_of_segments, tiny_config

VOCAB, LENGTH, STEPS, BATCH = 8, 16, 80, 32
WORLD = World(0, 1, torch.device("cpu"), False)


class RandomTokens:
    """`count` rows of uniform tokens, half of them cut into two documents, as packed text is."""

    def __init__(self, count: int, seed: int, prompt: bool) -> None:
        rng = np.random.default_rng(seed)
        stream = rng.integers(0, VOCAB, (count, LENGTH + 1), dtype=np.int32)
        cut = np.where(rng.random(count) < 0.5, rng.integers(4, LENGTH, count), LENGTH)[:, None]
        place = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (count, LENGTH))
        inside = np.broadcast_to(place < (3 if prompt else 0), place.shape)
        hidden = (place == cut - 1) | (place < (2 if prompt else 0))
        self.columns: Columns = {
            "inputs": stream[:, :-1],
            "labels": np.where(hidden, IGNORE_LABEL, stream[:, 1:]).astype(np.int32),
            "documents": (place >= cut).astype(np.int32),
            "positions": np.where(place >= cut, place - cut, place).astype(np.int32),
            "prompt": inside.copy(),
            "label_bytes": (~hidden).astype(np.int32),
        }

    def __len__(self) -> int:
        return len(self.columns["inputs"])

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        columns = {name: column[indices] for name, column in self.columns.items()}
        columns["labels"][indices < 0] = IGNORE_LABEL
        return columns | {"active": indices >= 0}


CASES: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned": {"pos_encodings": "learned"},
    "prefix": {"lm_mask": "prefix", "pos_encodings": "learned"},
    "full backward": {"bp_steps": 4, "h_cycles": 2, "l_cycles": 1, "pos_encodings": "learned"},
    "transformer": {
        "arch": "transformer",
        "h_layers": 1,
        "l_layers": 1,
        "halt_max_steps": 1,
        "halt_rule": "none",
        "pos_encodings": "learned",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_random_tokens_stay_at_ln_v(case: str) -> None:
    torch.set_num_threads(1)
    config = tiny_config(
        **(
            {
                "vocab_size": VOCAB,
                "seq_len": LENGTH,
                "hidden_size": 32,
                "intermediate_size": 48,
                "l_cycles": 1,
                "h_cycles": 1,
            }
            | CASES[case]
        )
    )
    model = build_model(config)
    model.initialise(1)
    objective = build_objective(model, "softmax", supervision="rollout", halt_margin=0.01).train()
    settings = OptimizerSettings(optimizer="adamw", lr=5e-3, weight_decay=0.0)
    strategy = SingleStrategy(WORLD, Precision())
    strategy.prepare(objective, builder(settings))
    shape = BatchSize(BATCH, 1, 0, 1)
    loader = RolloutLoader(
        RandomTokens(STEPS * BATCH, 7, config.lm_mask == "prefix"),
        shape,
        seed=0,
        linear=True,
        stop_condition=StopCondition(1),
    )
    loop = TrainingLoop(
        TrainState(
            strategy=strategy,
            objective=objective,
            loader=loader,
            shape=shape,
            lr_schedule=LrSchedule(Schedule("linear", 10, STEPS, 0.0, 0.2), settings.lr, 0.0),
            wanted=wanted_columns(config),
            carried=False,
            grad_clip=1.0,
            max_bad_steps=1,
        )
    )
    steps = 0
    while loop.step() is not None:
        steps += 1
    assert steps == STEPS
    held_out = RandomTokens(256, 8, config.lm_mask == "prefix")
    figures = evaluate(objective, EvalSet(held_out, 64, 10), WORLD)
    batch = to_batch(held_out.rows(np.arange(256)), wanted_columns(config), WORLD.device)
    objective.eval()
    losses = CROSS_ENTROPIES[objective.loss_kind](logits_of_segments(objective, batch)[-1], batch["labels"])
    losses = losses[batch["labels"] != IGNORE_LABEL]
    noise = float(losses.std()) / len(losses) ** 0.5
    assert float(losses.mean()) == pytest.approx(figures["loss"], rel=1e-5)
    assert 0 < noise < 0.02
    assert math.log(VOCAB) - 5 * noise <= figures["loss"] <= math.log(VOCAB) + 0.05
    tokens = figures["tokens"]
    luck = math.sqrt((1 / VOCAB) * (1 - 1 / VOCAB) / tokens)
    assert abs(figures["token_accuracy"] - 1 / VOCAB) <= 5 * luck
    if isinstance(model, ActV1):
        assert figures["adaptive_loss"] >= math.log(VOCAB) - 5 * noise
