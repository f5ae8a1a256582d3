"""AdamATan2 and the sparse sign rule against scalar arithmetic; the table of optimizers against its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hrm_ray.model.embedding import PuzzleTable
from hrm_ray.settings.optimizer import OptimizerSettings
from hrm_ray.train.optimizers import OPTIMIZERS, AdamATan2, SparseSignSGD, builder, sum_by_identifier
from hrm_ray.train.world import World

ALONE = World(0, 1, torch.device("cpu"), False)


class BesideAnother(World):
    """A world of two whose other rank used the identifiers 1 and 2."""

    def gather_rows(self, *tensors: Tensor) -> list[Tensor]:
        far = {torch.int64: torch.tensor([1, 2]), torch.float32: torch.tensor([[-3.0], [1.0]])}
        return [torch.cat((tensor, far[tensor.dtype])) for tensor in tensors]


def naive_atan2(p: float, gradients: Sequence[float], lr: float, b1: float, b2: float, w: float) -> float:
    """ACTV1_SPEC section 9, one value, in Python's double."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        p = p * (1 - lr * w)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p -= lr / (1 - b1**t) * math.atan2(m, math.sqrt(v) / math.sqrt(1 - b2**t))
    return p


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    steps=st.integers(1, 6),
    b1=st.sampled_from([0.0, 0.9]),
    b2=st.sampled_from([0.0, 0.95, 0.999]),
    w=st.sampled_from([0.0, 0.1, 1.0]),
    lr=st.sampled_from([1e-1, 1e-3]),
)
def test_atan2_against_scalars(seed: int, steps: int, b1: float, b2: float, w: float, lr: float) -> None:
    """Float32 against double: 1e-6 of the largest weight plus, for b2 = 0.999, 1e-5 of what the updates can move."""
    rng = np.random.default_rng(seed)
    weights = nn.Parameter(torch.from_numpy(rng.normal(size=(3, 2)).astype(np.float32)))
    other = nn.Parameter(torch.from_numpy(rng.normal(size=2).astype(np.float32)))
    start, other_start = weights.detach().clone(), other.detach().clone()
    optimizer = AdamATan2([weights, other], lr=lr, betas=(b1, b2), weight_decay=w)
    # Scales from tiny to huge: the rule is scale-free.
    gradients = (rng.normal(size=(steps, 3, 2)) * 10.0 ** rng.integers(-8, 4)).astype(np.float32)
    for number, gradient in enumerate(gradients):
        weights.grad = torch.from_numpy(gradient)
        # The second parameter joins at the third step: its own age counts.
        other.grad = torch.from_numpy(gradient[0]) if number >= 2 else None
        optimizer.step()
    tolerance = 2e-6 * (1 + float(start.abs().max())) + 1e-5 * lr * steps
    for (i, j), value in np.ndenumerate(start.numpy()):
        want = naive_atan2(float(value), gradients[:, i, j].tolist(), lr, b1, b2, w)
        assert float(weights[i, j].detach()) == pytest.approx(want, abs=tolerance)
    for j, value in enumerate(other_start.tolist()):
        want = naive_atan2(value, gradients[2:, 0, j].tolist(), lr, b1, b2, w)
        assert float(other[j].detach()) == pytest.approx(want, abs=tolerance)


def test_first_update_is_about_the_learning_rate() -> None:
    """At t = 1 with m/(1-b1) = g: lr/(1-b1) atan((1-b1)) = 0.9967 lr at b1 0.9; a correction inside gives 0.785 lr."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = AdamATan2([weight], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    weight.grad = torch.tensor([3.0, -1e-6])
    optimizer.step()
    want = 1e-2 / 0.1 * math.atan(0.1)
    assert want == pytest.approx(0.9967e-2, rel=1e-4)
    assert weight.tolist() == pytest.approx([-want, want], rel=1e-6)


def test_weights_decay_before_the_update() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = AdamATan2([weight], lr=0.5, betas=(0.0, 0.0), weight_decay=0.5)
    weight.grad = torch.tensor([1.0])
    optimizer.step()
    # 2 (1 - 0.25) - 0.5 atan2(1, 1); decay after the update would give (2 - 0.3927) 0.75 = 1.2055.
    assert float(weight.detach()) == pytest.approx(1.5 - 0.5 * math.pi / 4, rel=1e-6)


def test_a_history_of_zero_gradients_moves_nothing() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = AdamATan2([weight], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        weight.grad = torch.zeros(2)
        optimizer.step()
    assert weight.tolist() == [1.0, -2.0]


def test_a_parameter_without_gradient_is_left_alone() -> None:
    """Decay and state included."""
    weight, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamATan2([weight, idle], lr=0.1, betas=(0.9, 0.95), weight_decay=1.0)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert idle.tolist() == [1.0, 1.0] and idle not in optimizer.state
    assert weight.tolist() != [1.0, 1.0]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_settings_reach_the_optimizer(kind: str) -> None:
    chosen = OptimizerSettings(optimizer=kind, lr=0.3, weight_decay=0.7, beta1=0.5, beta2=0.6)  # type: ignore[arg-type]
    (group,) = builder(chosen)([nn.Parameter(torch.ones(1))]).param_groups
    assert group["lr"] == 0.3 and group["weight_decay"] == 0.7
    if kind != "sgd":
        assert group["betas"] == (0.5, 0.6)
    else:
        assert group["momentum"] == 0


def table_of(rows: int, width: int, seed: int = 0) -> PuzzleTable:
    table = PuzzleTable(rows, width)
    table.weights.copy_(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))
    return table.train()


def take(table: PuzzleTable, identifiers: list[int], gradient: Tensor, active: list[bool] | None = None) -> None:
    """One training pass whose loss has `gradient` with respect to the rows looked up."""
    mask = None if active is None else torch.tensor(active)
    rows = table(torch.tensor(identifiers, dtype=torch.int32), mask)
    (rows * gradient).sum().backward()


class Operations(TorchDispatchMode):
    """Names of all operations inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_rows_are_added_in_an_order_of_their_own() -> None:
    """Operations whose order of additions is not fixed on CUDA would give every rank other last bits."""
    table = table_of(6, 4)
    take(table, [3, 1, 3, 3, 1], torch.randn(5, 4))
    with Operations() as operations:
        SparseSignSGD(table, 0.0).gradients(ALONE)
    assert not operations.names & {"index_add", "index_add_", "scatter_add_", "index_reduce_", "cumsum_", "put_"}
    # What lies between the rows of one identifier changes nothing, to the bit.
    identifiers, rows = torch.tensor([1] * 7 + [3] * 9 + [4]), torch.randn(17, 4)
    mixed = torch.tensor([7, 16, 0, 1, 8, 9, 10, 2, 3, 11, 12, 4, 5, 6, 13, 14, 15])
    (want, sums), (got, others) = (
        sum_by_identifier(identifiers, rows),
        sum_by_identifier(identifiers[mixed], rows[mixed]),
    )
    assert want.tolist() == got.tolist() == [1, 3, 4] and torch.equal(sums, others)
    exact = torch.stack([rows[identifiers == one].double().sum(0) for one in (1, 3, 4)])
    assert float((sums - exact).abs().max()) < 1e-6


def update(optimizer: SparseSignSGD, lr: float, world: World) -> None:
    """What the loop does at a step that is applied."""
    optimizer.apply(*optimizer.gradients(world), lr)


@settings(max_examples=30)
@given(
    batches=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    w=st.sampled_from([0.0, 0.5]),
)
def test_sparse_sign_rule(batches: list[list[int]], seed: int, w: float) -> None:
    """Sums over a step (rows, micro-batches) before the sign; rows not used do not change, not even by decay."""
    table, lr = table_of(6, 4, seed), 0.1
    start = table.weights.clone()
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers, so that sums cancel to exactly zero now and then.
    gradients = [torch.randint(-1, 2, (3, 4), generator=generator).float() for _ in batches]
    for identifiers, gradient in zip(batches, gradients, strict=True):
        take(table, identifiers, gradient)
    update(SparseSignSGD(table, w), lr, ALONE)
    for number in range(6):
        sums = [0.0] * 4
        for identifiers, gradient in zip(batches, gradients, strict=True):
            for place, identifier in enumerate(identifiers):
                if identifier == number:
                    sums = [s + float(g) for s, g in zip(sums, gradient[place], strict=True)]
        if not any(number in identifiers for identifiers in batches):
            assert torch.equal(table.weights[number], start[number])
            continue
        for column, total in enumerate(sums):
            sign = (total > 0) - (total < 0)
            want = float(start[number, column]) * (1 - lr * w) - lr * sign
            assert float(table.weights[number, column]) == pytest.approx(want, abs=1e-6)
    assert table.taken == []


def test_opposite_gradients_of_one_identifier_cancel() -> None:
    """The sign of the sum, not the sum of signs; at 0 only the decay is left."""
    table = table_of(2, 3)
    start = table.weights.clone()
    take(table, [1, 1, 1], torch.tensor([[2.0, 1.0, 5.0], [-1.0, -1.0, -3.0], [-0.5, 0.0, -3.0]]))
    update(SparseSignSGD(table, 0.5), 0.1, ALONE)
    want = start[1] * 0.95 - 0.1 * torch.tensor([1.0, 0.0, -1.0])
    torch.testing.assert_close(table.weights[1], want, rtol=1e-6, atol=1e-7)
    assert torch.equal(table.weights[0], start[0])


def test_idle_rows_do_not_decay() -> None:
    table = table_of(3, 2)
    start = table.weights.clone()
    take(table, [1, 0, 2], torch.ones(3, 2), active=[True, False, False])
    update(SparseSignSGD(table, 0.5), 0.1, ALONE)
    assert torch.equal(table.weights[[0, 2]], start[[0, 2]])
    assert not torch.equal(table.weights[1], start[1])


def test_ranks_are_added_before_the_sign() -> None:
    table = table_of(3, 1)
    start = table.weights.clone()
    take(table, [1], torch.tensor([[1.0]]))
    update(SparseSignSGD(table, 0.0), 0.1, BesideAnother(0, 2, torch.device("cpu"), True))
    moved = (table.weights - start).flatten().tolist()
    assert moved == pytest.approx([0.0, 0.1, -0.1], abs=1e-7)


def test_a_step_that_used_nothing_or_is_skipped_changes_nothing() -> None:
    table = table_of(3, 2)
    start = table.weights.clone()
    optimizer = SparseSignSGD(table, 0.5)
    update(optimizer, 0.1, ALONE)
    take(table, [0, 1], torch.ones(2, 2))
    optimizer.gradients(ALONE)
    update(optimizer, 0.1, ALONE)
    assert torch.equal(table.weights, start)


def test_evaluation_takes_nothing() -> None:
    table = table_of(3, 2)
    with torch.no_grad():
        table(torch.tensor([0]), None)
    assert not table.eval()(torch.tensor([0]), None).requires_grad
    assert table.taken == []
