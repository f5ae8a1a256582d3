"""Where tensors rest between the chunks that use them: on the device, or in host memory.

One job: put away and fetch. Copies to and from host memory run beside the computation, and what will be needed next can
be fetched ahead. What rests, and when it is needed, is decided by the chunked objectives.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Rest(Protocol):
    """A tensor at rest."""

    def ahead(self) -> None:
        """Begin to fetch: it will be needed soon."""

    def fetch(self) -> Tensor:
        """The tensor, on the device; it goes on resting too."""


class Keeper(Protocol):
    """A place to rest at."""

    def rest(self, tensor: Tensor) -> Rest:
        """Take a tensor without a graph that nobody will change any more."""


class Here:
    """On the device: nothing is moved."""

    def rest(self, tensor: Tensor) -> Rest:
        return _Here(tensor)


class _Here:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def ahead(self) -> None:
        return None

    def fetch(self) -> Tensor:
        return self._tensor


class Lane(Protocol):
    """Copies between device and host that run beside the device's own work. A mark says when a copy is done."""

    def out(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy into host memory, after the work that makes `tensor`; the copy and its mark."""

    def back(self, host: Tensor, mark: Any) -> tuple[Tensor, Any]:
        """Begin to copy to the device once `mark` is reached; the copy and its mark."""

    def join(self, tensor: Tensor, mark: Any) -> None:
        """Let the device's work from here on wait for `mark`, and keep `tensor` for it."""


class InHostMemory:
    """In host memory, by way of a lane."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    def rest(self, tensor: Tensor) -> Rest:
        return _InHostMemory(tensor, self._lane)


class _InHostMemory:
    def __init__(self, tensor: Tensor, lane: Lane) -> None:
        self._lane = lane
        self._host, self._mark = lane.out(tensor)
        self._coming: tuple[Tensor, Any] | None = None

    def ahead(self) -> None:
        if self._coming is None:
            self._coming = self._lane.back(self._host, self._mark)

    def fetch(self) -> Tensor:
        self.ahead()
        assert self._coming is not None
        (tensor, mark), self._coming = self._coming, None
        self._lane.join(tensor, mark)
        return tensor


class CudaLane:
    """A stream of its own, and pinned memory, without which copies would not run beside anything."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def out(self, tensor: Tensor) -> tuple[Tensor, Any]:
        whole = tensor.contiguous()
        host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(whole, non_blocking=True)
        # Its memory must not be given to others while the copy reads it.
        whole.record_stream(self._stream)
        return host, self._stream.record_event()

    def back(self, host: Tensor, mark: Any) -> tuple[Tensor, Any]:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            tensor = host.to(self._device, non_blocking=True)
        return tensor, self._stream.record_event()

    def join(self, tensor: Tensor, mark: Any) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(mark)
        tensor.record_stream(current)


def keeper_on(device: torch.device, *, offload: bool) -> Keeper:
    """What --cpu-offload means on this device: on the CPU everything is in host memory anyway."""
    return InHostMemory(CudaLane(device)) if offload and device.type == "cuda" else Here()
