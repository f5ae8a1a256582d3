"""Tensors of a text row that are written and read a chunk of positions at a time, on the device or in host memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from hrm_ray.model.layers import KeysValues


class CopyStream:
    """Copies between a CUDA device and pinned host memory, on a stream of their own beside the computation.

    Each copy comes with an event that says when it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def to_host(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy into host memory, after the work that computes `tensor`."""
        source = tensor.contiguous()
        # Only copies from and to pinned memory run beside the computation.
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(source, non_blocking=True)
        # The allocator must not reuse the memory while the copy reads it.
        source.record_stream(self._stream)
        return host, self._stream.record_event()

    def to_device(self, host: Tensor, event: Any) -> tuple[Tensor, Any]:
        """Begin to copy to the device, after `event`."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(event)
            tensor = host.to(self._device, non_blocking=True)
        return tensor, self._stream.record_event()

    def wait(self, tensor: Tensor, event: Any) -> None:
        """Let the computation from here on wait for `event`, and keep `tensor` alive for it."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        tensor.record_stream(current)


@cache
def _stream_of(device: torch.device) -> CopyStream:
    return CopyStream(device)


def copy_stream(device: torch.device, *, offload: bool) -> CopyStream | None:
    """The stream that --cpu-offload copies on; None where nothing is moved (a CPU's tensors are in host memory)."""
    return _stream_of(device) if offload and device.type == "cuda" else None


class OffloadedTensor:
    """A tensor without a graph, kept in host memory."""

    def __init__(self, tensor: Tensor, stream: CopyStream) -> None:
        self._stream = stream
        self._host, self._event = stream.to_host(tensor)
        self._coming: tuple[Tensor, Any] | None = None

    def prefetch(self) -> None:
        """Begin to copy to the device."""
        if self._coming is None:
            self._coming = self._stream.to_device(self._host, self._event)

    def fetch(self) -> Tensor:
        """The tensor on the device. The host's copy stays."""
        tensor, event = self._coming or self._stream.to_device(self._host, self._event)
        self._coming = None
        self._stream.wait(tensor, event)
        return tensor


def first_seen(position: int, window: int | None) -> int:
    """The first position that the one at `position` sees."""
    return 0 if window is None else max(position - window + 1, 0)


class ChunkBuffer:
    """One tensor for each chunk of a row cut into `parts`; its positions are dimension `dim`.

    With a `stream` each chunk is kept in host memory. Without one all lie side by side in one tensor on the device,
    since many small tensors that live long would fragment the memory between the large ones of each pass.
    With a `window` chunks are written in order, and what no later chunk can see is dropped.
    """

    def __init__(
        self, parts: list[slice], stream: CopyStream | None = None, *, dim: int = 1, window: int | None = None
    ) -> None:
        self.parts = parts
        self._stream = stream
        self._dim = dim
        self._window = window
        self._offloaded: dict[int, OffloadedTensor] = {}
        self._row: Tensor | None = None
        # The position of the row that the tensor begins with, once a window slides.
        self._origin = 0

    @classmethod
    def of_row(cls, row: Tensor, parts: list[slice]) -> ChunkBuffer:
        """A view of `row` [B, T, ...], for reading only."""
        buffer = cls(parts)
        buffer._row = row
        return buffer

    def put(self, chunk: int, tensor: Tensor) -> None:
        """Store a chunk's tensor, which has no graph."""
        part = self.parts[chunk]
        if self._stream is not None:
            unseen = first_seen(part.start, self._window)
            for earlier in [number for number in self._offloaded if self.parts[number].stop <= unseen]:
                del self._offloaded[earlier]
            self._offloaded[chunk] = OffloadedTensor(tensor, self._stream)
            return
        if self._row is None:
            shape = list(tensor.shape)
            shape[self._dim] = self.parts[-1].stop
            if self._window is not None:
                # The positions of a window and a chunk.
                longest = max(each.stop - each.start for each in self.parts)
                shape[self._dim] = min(self.parts[-1].stop, self._window - 1 + longest)
            self._row = tensor.new_empty(shape)
        # Under mixed precision the starting states are narrower than the states that replace them.
        self._row = self._row.to(torch.promote_types(self._row.dtype, tensor.dtype))
        if part.stop - self._origin > self._row.shape[self._dim]:
            # What this chunk still sees moves to the beginning of the tensor.
            first = first_seen(part.start, self._window)
            kept = self._span(first, part.start).clone()
            self._origin = first
            self._span(first, part.start).copy_(kept)
        self._span(part.start, part.stop).copy_(tensor)

    def _span(self, first: int, stop: int) -> Tensor:
        if self._row is None:
            raise RuntimeError("no chunk has been stored")
        return self._row.narrow(self._dim, first - self._origin, stop - first)

    def get(self, chunk: int) -> Tensor:
        """A chunk's tensor. On the device it is a view, which a later `put` changes."""
        if self._stream is not None:
            return self._offloaded[chunk].fetch()
        return self._span(self.parts[chunk].start, self.parts[chunk].stop)

    def up_to(self, chunk: int, first: int, own: Tensor) -> Tensor:
        """Positions `first` to the end of `chunk`, which is stored; `own` is the chunk's tensor on the device."""
        stop = self.parts[chunk].stop
        if self._stream is None:
            return self._span(first, stop)
        earlier = [self.get(number) for number in self._since(first, chunk)]
        if not earlier:
            return own
        joined = torch.cat((*earlier, own), self._dim)
        return joined.narrow(self._dim, joined.shape[self._dim] - (stop - first), stop - first)

    def _since(self, first: int, chunk: int) -> list[int]:
        """The chunks before `chunk` that have positions from `first` on."""
        return [number for number in range(chunk) if self.parts[number].stop > first]

    def prefetch(self, chunk: int, first: int | None = None) -> None:
        """Begin to copy a chunk to the device, if there is one; with `first` instead what `up_to` will need."""
        for number in [chunk] if first is None else self._since(first, chunk):
            if number in self._offloaded:
                self._offloaded[number].prefetch()

    def copy(self, stream: CopyStream | None) -> ChunkBuffer:
        """A buffer with the same tensors, which may then be changed."""
        made = ChunkBuffer(self.parts, stream, dim=self._dim)
        for chunk in range(len(self.parts)):
            self.prefetch(chunk + 1)
            made.put(chunk, self.get(chunk))
        return made


class KVBuffer:
    """One attention's keys and values for rows in chunks. With `drop` those that no later chunk sees are dropped."""

    def __init__(
        self, parts: list[slice], window: int | None, stream: CopyStream | None = None, *, drop: bool = True
    ) -> None:
        self._first = [first_seen(part.start, window) for part in parts]
        dropped = window if drop else None
        self._pair = [ChunkBuffer(parts, stream, dim=2, window=dropped) for _ in ("keys", "values")]
        self._recorded = 0

    def update(self, chunk: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Store a chunk's own keys and values, which have no graph, and return all that the chunk sees.

        Chunks come in order; one that is computed again is not stored again.
        """
        own = (keys, values)
        if chunk == self._recorded:
            for buffer, tensor in zip(self._pair, own, strict=True):
                buffer.put(chunk, tensor)
            self._recorded += 1
        seen = [buffer.up_to(chunk, self._first[chunk], each) for buffer, each in zip(self._pair, own, strict=True)]
        return seen[0], seen[1]

    def prefetch(self, chunk: int) -> None:
        """Begin to copy what `chunk` sees of earlier ones to the device."""
        for buffer in self._pair:
            buffer.prefetch(chunk, self._first[chunk])
