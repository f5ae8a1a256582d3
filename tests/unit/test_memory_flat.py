"""Memory for the backward pass does not grow with the segments of a step, nor with its micro-batches.

Counted exactly: the bytes that autograd keeps, as its own hooks see them saved and let go, at their highest in a step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hrm_ray.model.build import build_objective
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.world import World
from tests.support.splits import STEPS, Cut, Rows, config_for, settings_for
from tests.support.tiny_models import text_batch, tiny_config, tiny_model


class Kept:
    """One tensor that autograd keeps; counted from when it is saved until autograd lets go of it."""

    def __init__(self, tensor: Tensor, count: KeptBytes) -> None:
        self.tensor = tensor
        self.count = count
        count.now += tensor.nbytes
        count.most = max(count.most, count.now)

    def __del__(self) -> None:
        self.count.now -= self.tensor.nbytes


class KeptBytes:
    """Bytes kept at present, and the most at any time."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0

    def counting(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(lambda tensor: Kept(tensor, self), lambda kept: kept.tensor)


def loop_for(scenario: str, segments: int, *, accumulation: int = 1, batch: int = 4) -> TrainingLoop:
    settings = settings_for(scenario, "adam-atan2", Cut(1, accumulation, batch))
    model = settings.model.model_copy(update={"halt_max_steps": segments})
    settings = settings.model_copy(update={"model": model})
    config = config_for(settings)
    return assemble(settings, config, Rows(config.task), World.here("cpu", 1), STEPS)


def most_kept_bytes(*args: Any, **kwargs: Any) -> int:
    """The most that is kept at once in the second of two steps; what the loop keeps between steps must be nothing."""
    loop = loop_for(*args, **kwargs)
    loop.step()
    count = KeptBytes()
    with count.counting():
        loop.step()
    assert count.now == 0
    return count.most


@pytest.mark.parametrize("scenario", ["text", "puzzle-rollout", "puzzle-carried"])
def test_flat_in_the_segments(scenario: str) -> None:
    two = most_kept_bytes(scenario, 2)
    assert two > 0
    assert most_kept_bytes(scenario, 8) == two


@pytest.mark.parametrize("scenario", ["text", "transformer", "puzzle-rollout", "puzzle-carried"])
def test_flat_in_the_accumulation(scenario: str) -> None:
    segments = 1 if scenario == "transformer" else 2
    assert most_kept_bytes(scenario, segments, accumulation=4) == most_kept_bytes(scenario, segments)


def test_the_count_sees_a_larger_batch_and_a_graph_that_is_kept() -> None:
    """The control: what must cost more is seen to cost more."""
    assert most_kept_bytes("text", 2, batch=8) > 1.5 * most_kept_bytes("text", 2)
    config = tiny_config(halt_max_steps=4)
    objective = build_objective(tiny_model(config), "softmax", supervision="rollout", halt_margin=0.01).train()
    batch = text_batch(5, [[7, 3, 2], [12], [4, 8]])
    kept = []
    for segments in (2, 4):
        count, carry, total = KeptBytes(), objective.initial_carry(batch), torch.zeros(())
        with count.counting():
            for _ in range(segments):
                output = objective(batch, carry)
                carry = output.carry
                total = total + sum((term.total for term in output.terms), torch.zeros(()))
            total.backward()
        kept.append(count.most)
    assert kept[1] > 1.9 * kept[0]
