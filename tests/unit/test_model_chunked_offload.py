"""Resting in host memory: nothing is read before its copy has come, and numbers do not change.

The lane is played on the CPU: copies are done only when someone waits for them, so a missing wait reads rubbish.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hrm_ray.model import chunked
from hrm_ray.model.chunked_offload import NoOffload, OffloadToHost, offload_policy
from hrm_ray.model.transforms.activation_checkpointing import apply_activation_checkpointing
from tests.support.chunked_cases import Shape, assert_same_forward, assert_same_gradients, in_chunks, trained
from tests.support.tiny_models import tiny_config, tiny_model


class PlayedLane:
    """Marks are numbers of orders; an order is carried out when it, or one behind it, is waited for."""

    def __init__(self) -> None:
        self.orders: list[tuple[Tensor, Tensor]] = []
        self.done = 0
        self.hosts = 0

    def _ordered(self, target: Tensor, source: Tensor) -> tuple[Tensor, int]:
        self.orders.append((target, source))
        return target, len(self.orders)

    def out(self, tensor: Tensor) -> tuple[Tensor, Any]:
        self.hosts += 1
        # The source is taken as it is now: the real lane is told of the stream that makes it.
        return self._ordered(torch.full_like(tensor, torch.nan), tensor.clone())

    def back(self, host: Tensor, mark: Any) -> tuple[Tensor, Any]:
        return self._ordered(torch.full_like(host, torch.nan), host)

    def join(self, tensor: Tensor, mark: int) -> None:
        for target, source in self.orders[self.done : mark]:
            target.copy_(source)
        self.done = max(self.done, mark)


def test_what_rests_comes_back() -> None:
    copy_stream = PlayedLane()
    policy = OffloadToHost(copy_stream)
    first, second = torch.randn(3), torch.randn(3)
    rests = [policy.rest(first), policy.rest(second)]
    rests[1].ahead()
    rests[0].ahead()
    rests[0].ahead()
    assert len(copy_stream.orders) == 4 and copy_stream.done == 0, "fetching ahead waits for nothing, and is done once"
    assert torch.equal(rests[0].fetch(), first) and torch.equal(rests[1].fetch(), second)
    again = rests[0].fetch()
    assert torch.equal(again, first) and len(copy_stream.orders) == 5, "it goes on resting, and is fetched anew"


def test_here_moves_nothing() -> None:
    tensor = torch.randn(3)
    rest = NoOffload().rest(tensor)
    rest.ahead()
    assert rest.fetch() is tensor


@pytest.mark.parametrize("offload", [True, False])
def test_on_the_cpu_everything_is_in_host_memory(offload: bool) -> None:
    assert isinstance(offload_policy(torch.device("cpu"), offload=offload), NoOffload)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("arch", ["actv1", "transformer"])
@pytest.mark.parametrize("window", [None, 4])
def test_numbers_do_not_change(arch: str, exact: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    one_pass = {"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none"} if arch == "transformer" else {}
    shape = Shape(((7, 5), (12,)), tiny_config(window_size=window, **one_pass))
    model = tiny_model(shape.config)
    want = trained(in_chunks(model, 5, exact=exact), shape.batch())
    copy_stream = PlayedLane()
    monkeypatch.setattr(chunked, "offload_policy", lambda device, offload: OffloadToHost(copy_stream))
    got = trained(in_chunks(model, 5, exact=exact), shape.batch())
    moved = copy_stream.hosts
    assert moved > 10
    assert_same_forward(got, want)
    assert_same_gradients(got, want)
    apply_activation_checkpointing(model)
    trained(in_chunks(model, 5, exact=exact), shape.batch())
    assert copy_stream.hosts == 2 * moved, "what is computed again is not put away again"
