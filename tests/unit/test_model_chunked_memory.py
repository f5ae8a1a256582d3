"""Memory of training in chunks: activations follow the chunk; what follows the row is counted in hidden states.

Counted exactly, as the growth of the most bytes alive at once in a step from 1024 to 1536 positions, in float32 vectors
of the model's width per position.
"""

from __future__ import annotations

from functools import cache

import pytest

from hrm_ray.model.build import build_objective
from hrm_ray.model.chunked import Chunking
from hrm_ray.model.transforms.activation_checkpointing import apply_activation_checkpointing
from hrm_ray.train.loop import weighted_loss
from hrm_ray.train.storage_tracker import StorageTracker
from tests.support.tiny_models import text_batch, tiny_actv1, tiny_config

WIDTH = 32


@cache
def most_bytes(length: int, chunking: Chunking | None, window: int | None, inner: int) -> int:
    """The most bytes alive at once, beside the model and its data, in one step on one row."""
    config = tiny_config(
        hidden_size=WIDTH, num_heads=2, seq_len=length, window_size=window, intermediate_size=inner, l_cycles=1
    )
    model = tiny_actv1(config)
    apply_activation_checkpointing(model)
    batch = text_batch(3, [[length]])
    del batch["documents"]
    objective = build_objective(model, "softmax", supervision="rollout", halt_margin=0.01, chunking=chunking).train()
    count = StorageTracker()
    count.name("there", [*objective.parameters(), *objective.buffers(), *batch.values()])
    with count:
        carry = objective.initial_carry(batch)
        totals = {name: float(weight) for name, weight in objective.weights(batch, carry).items()}
        for _ in range(objective.passes_per_step):
            output = objective(batch, carry)
            weighted_loss(output, totals).backward()
            carry = output.carry
            del output
    return count.peak_bytes(beside=["there"])


def vectors_per_position(chunking: Chunking | None, window: int | None, inner: int = 64) -> float:
    long, short = (most_bytes(length, chunking, window, inner) for length in (1536, 1024))
    return (long - short) / (512 * 4 * WIDTH)


TRUNCATED, EXACT = Chunking(128, exact=False), Chunking(128, exact=True)


def test_whole_rows_cost_their_activations() -> None:
    """The control: an FFN eight times as wide costs more at every position."""
    assert vectors_per_position(None, None) > 20
    assert vectors_per_position(None, None, inner=512) > 60


def test_with_a_window_only_states_follow_the_row() -> None:
    """The state that is judged, and the two that enter and are reached."""
    assert vectors_per_position(TRUNCATED, 48) < 3.5


def test_exact_gradients_keep_keys_and_values_too() -> None:
    """Two attentions carry gradient: their keys and values are recorded once."""
    assert vectors_per_position(EXACT, 48) < 3.5 + 4


@pytest.mark.parametrize(("chunking", "most"), [(TRUNCATED, 16), (EXACT, 20)])
def test_without_a_window_caches_follow_the_row(chunking: Chunking, most: float) -> None:
    """Keys and values of two attentions, the gradients of one at a time, and a mask of a block of queries, which is as
    large as four vectors here. Exact gradients are added up in vectors of their own."""
    assert vectors_per_position(chunking, None) < most


@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("chunking", [TRUNCATED, EXACT])
def test_activations_follow_the_chunk(chunking: Chunking, window: int | None) -> None:
    """An FFN eight times as wide costs nothing per position, and per position of a chunk what it is wider by."""
    assert vectors_per_position(chunking, window, inner=512) < vectors_per_position(chunking, window) + 0.5
    wider = most_bytes(1024, chunking, window, 512) - most_bytes(1024, chunking, window, 64)
    one_layer = 4 * 128 * (512 - 64)
    gradients = 4 * 2 * 3 * WIDTH * (512 - 64)
    assert wider < 8 * one_layer + gradients


def test_larger_chunks_cost_more() -> None:
    larger = most_bytes(1024, Chunking(512, exact=False), 48, 512) - most_bytes(1024, TRUNCATED, 48, 512)
    assert larger > 384 * 4 * 512


def test_nothing_is_kept_after_a_step() -> None:
    """A step's caches go with it."""
    config = tiny_config(seq_len=64, halt_max_steps=2)
    objective = build_objective(
        tiny_actv1(config), "softmax", supervision="rollout", halt_margin=0.01, chunking=Chunking(10, exact=True)
    ).train()
    batch = text_batch(3, [[64]])
    left = []
    with StorageTracker() as count:
        for _ in range(3):
            objective.zero_grad(set_to_none=True)
            carry = objective.initial_carry(batch)
            for _ in range(objective.passes_per_step):
                output = objective(batch, carry)
                weighted_loss(output, {"tokens": 10.0, "halt_tokens": 10.0}).backward()
                carry = output.carry
            del output, carry
            left.append(count.live_bytes() - 4 * sum(p.numel() for p in objective.parameters() if p.grad is not None))
    assert left == [left[0]] * 3
