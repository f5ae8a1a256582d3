"""Where tensors rest between the chunks that use them: on the device, or in host memory.

One job: put away and fetch. Copies to and from host memory run beside the computation, and what will be needed next can
be fetched ahead. What rests, and when it is needed, is decided by the chunked objectives.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Handle(Protocol):
    """A tensor at rest."""

    def ahead(self) -> None:
        """Begin to fetch: it will be needed soon."""

    def fetch(self) -> Tensor:
        """The tensor, on the device; it goes on resting too."""


class OffloadPolicy(Protocol):
    """A place to rest at. `away` says that it is not the device."""

    away: bool

    def rest(self, tensor: Tensor) -> Handle:
        """Take a tensor without a graph that nobody will change any more."""


class NoOffload:
    """On the device: nothing is moved."""

    away = False

    def rest(self, tensor: Tensor) -> Handle:
        return _OnDevice(tensor)


class _OnDevice:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def ahead(self) -> None:
        return None

    def fetch(self) -> Tensor:
        return self._tensor


class CopyStream(Protocol):
    """Copies between device and host that run beside the device's own work. A mark says when a copy is done."""

    def out(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy into host memory, after the work that makes `tensor`; the copy and its mark."""

    def back(self, host: Tensor, mark: Any) -> tuple[Tensor, Any]:
        """Begin to copy to the device once `mark` is reached; the copy and its mark."""

    def join(self, tensor: Tensor, mark: Any) -> None:
        """Let the device's work from here on wait for `mark`, and keep `tensor` for it."""


class OffloadToHost:
    """In host memory, by way of a lane."""

    away = True

    def __init__(self, copy_stream: CopyStream) -> None:
        self._copy_stream = copy_stream

    def rest(self, tensor: Tensor) -> Handle:
        return _InHostMemory(tensor, self._copy_stream)


class _InHostMemory:
    def __init__(self, tensor: Tensor, copy_stream: CopyStream) -> None:
        self._copy_stream = copy_stream
        self._host, self._mark = copy_stream.out(tensor)
        self._coming: tuple[Tensor, Any] | None = None

    def ahead(self) -> None:
        if self._coming is None:
            self._coming = self._copy_stream.back(self._host, self._mark)

    def fetch(self) -> Tensor:
        self.ahead()
        assert self._coming is not None
        (tensor, mark), self._coming = self._coming, None
        self._copy_stream.join(tensor, mark)
        return tensor


class CudaCopyStream:
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


def offload_policy(device: torch.device, *, offload: bool) -> OffloadPolicy:
    """What --cpu-offload means on this device: on the CPU everything is in host memory anyway."""
    return OffloadToHost(CudaCopyStream(device)) if offload and device.type == "cuda" else NoOffload()


class ChunkBuffer(Protocol):
    """One tensor per chunk of a row, at rest between uses."""

    def put(self, chunk: int, tensor: Tensor) -> None:
        """Lay a tensor without a graph [B, chunk, ...] in the chunk's place."""

    def get(self, chunk: int) -> Tensor:
        """What lies there; a later `put` may change it in place."""

    def ahead(self, chunk: int) -> None:
        """Begin to fetch what lies there, if there is such a chunk."""


class RowBuffer:
    """On the device, chunks side by side in one tensor of the whole row.

    Many small tensors that live long would lie scattered between the large ones that come and go with each chunk, and
    keep their room from being used again.
    """

    def __init__(self, parts: list[slice]) -> None:
        self._parts = parts
        self._row: Tensor | None = None

    def put(self, chunk: int, tensor: Tensor) -> None:
        if self._row is None:
            self._row = tensor.new_empty(tensor.shape[0], self._parts[-1].stop, *tensor.shape[2:])
        # Starting states may be narrower than what is made of them under mixed precision.
        self._row = self._row.to(torch.promote_types(self._row.dtype, tensor.dtype))
        self._row[:, self._parts[chunk]] = tensor

    def get(self, chunk: int) -> Tensor:
        assert self._row is not None
        return self._row[:, self._parts[chunk]]

    def ahead(self, chunk: int) -> None:
        return None


class HandleBuffer:
    """Each chunk's tensor by itself, with a keeper."""

    def __init__(self, policy: OffloadPolicy, count: int) -> None:
        self._keeper = policy
        self._rests: list[Handle | None] = [None] * count

    def put(self, chunk: int, tensor: Tensor) -> None:
        self._rests[chunk] = self._keeper.rest(tensor)

    def get(self, chunk: int) -> Tensor:
        rest = self._rests[chunk]
        assert rest is not None
        return rest.fetch()

    def ahead(self, chunk: int) -> None:
        rest = self._rests[chunk] if 0 <= chunk < len(self._rests) else None
        if rest is not None:
            rest.ahead()


def empty_buffer(policy: OffloadPolicy, parts: list[slice]) -> ChunkBuffer:
    """A shelf for rows cut into `parts`, where the keeper is."""
    return HandleBuffer(policy, len(parts)) if policy.away else RowBuffer(parts)
