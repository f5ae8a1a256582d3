"""Chunks in host memory: nothing is read before its copy has arrived, and numbers do not change.

The copy stream is a fake on the CPU: a copy is made only when it is waited for, so a missing wait reads NaN.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hrm_ray.model import chunked
from hrm_ray.model.chunk_buffer import ChunkBuffer, CopyStream, OffloadedTensor, copy_stream
from hrm_ray.model.transforms.activation_checkpointing import apply_activation_checkpointing
from tests.support.chunked_cases import Shape, assert_same_forward, assert_same_gradients, in_chunks, trained
from tests.support.tiny_models import tiny_config, tiny_model


class FakeCopyStream(CopyStream):
    """Events are numbers of copies; a copy is made when it, or a later one, is waited for."""

    def __init__(self) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.done = 0
        self.hosts = 0

    def _ordered(self, target: Tensor, source: Tensor) -> tuple[Tensor, int]:
        self.copies.append((target, source))
        return target, len(self.copies)

    def to_host(self, tensor: Tensor) -> tuple[Tensor, int]:
        self.hosts += 1
        # The source is taken as it is now: the real stream waits for the work that computes it.
        return self._ordered(torch.full_like(tensor, torch.nan), tensor.clone())

    def to_device(self, host: Tensor, event: int) -> tuple[Tensor, int]:
        return self._ordered(torch.full_like(host, torch.nan), host)

    def wait(self, tensor: Tensor, event: int) -> None:
        for target, source in self.copies[self.done : event]:
            target.copy_(source)
        self.done = max(self.done, event)


def test_an_offloaded_tensor_comes_back() -> None:
    stream = FakeCopyStream()
    first, second = torch.randn(3), torch.randn(3)
    offloaded = [OffloadedTensor(first, stream), OffloadedTensor(second, stream)]
    offloaded[1].prefetch()
    offloaded[0].prefetch()
    offloaded[0].prefetch()
    assert len(stream.copies) == 4 and stream.done == 0, "prefetching waits for nothing, and is done once"
    assert torch.equal(offloaded[0].fetch(), first) and torch.equal(offloaded[1].fetch(), second)
    again = offloaded[0].fetch()
    assert torch.equal(again, first) and len(stream.copies) == 5, "the host keeps it, and it is fetched anew"


def test_a_buffer_on_the_device_moves_nothing() -> None:
    row = torch.randn(2, 6, 3)
    buffer = ChunkBuffer([slice(0, 4), slice(4, 6)])
    for chunk in (0, 1):
        buffer.put(chunk, row[:, buffer.parts[chunk]])
    assert torch.equal(torch.cat((buffer.get(0), buffer.get(1)), dim=1), row)
    assert buffer.get(0).untyped_storage().data_ptr() == buffer.get(1).untyped_storage().data_ptr()
    assert ChunkBuffer.of_row(row, buffer.parts).get(1).data_ptr() == row[:, 4:].data_ptr()


@pytest.mark.parametrize("offload", [True, False])
def test_on_the_cpu_everything_is_in_host_memory(offload: bool) -> None:
    assert copy_stream(torch.device("cpu"), offload=offload) is None


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("arch", ["actv1", "transformer"])
@pytest.mark.parametrize("window", [None, 4])
def test_numbers_do_not_change(arch: str, exact: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    one_pass = {"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none"} if arch == "transformer" else {}
    shape = Shape(((7, 5), (12,)), tiny_config(window_size=window, **one_pass))
    model = tiny_model(shape.config)
    want = trained(in_chunks(model, 5, exact=exact), shape.batch())
    stream = FakeCopyStream()
    monkeypatch.setattr(chunked, "copy_stream", lambda device, offload: stream)
    got = trained(in_chunks(model, 5, exact=exact), shape.batch())
    moved = stream.hosts
    assert moved > 10
    assert_same_forward(got, want)
    assert_same_gradients(got, want)
    apply_activation_checkpointing(model)
    trained(in_chunks(model, 5, exact=exact), shape.batch())
    assert stream.hosts == 2 * moved, "what is computed again is not copied again"
