"""A worker's rank, world size and device, and the collectives that need no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hrm_ray.errors import HrmRayError, unreadable_if_away
from hrm_ray.train.host_memory import keep_freed_memory

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One worker of a group. `grouped` says whether a process group exists (a group of one counts)."""

    rank: int
    size: int
    device: torch.device
    grouped: bool

    @classmethod
    def here(cls, device: str, threads: int, *, keep_freed: bool = True) -> World:
        """The world of this process: that of its process group, or a world of one without a group.

        `keep_freed` says whether freed memory of the CPU is kept for the next tensor (host_memory.py).
        """
        torch.set_num_threads(threads)
        if device == "cpu":
            keep_freed_memory(keep_freed)
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), _local_device(device), True)
        return cls(0, 1, _local_device(device), False)

    @property
    def leads(self) -> bool:
        """Whether this worker decides for its group and writes the group's shared files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` added over all ranks, in place."""
        if self.grouped and self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to add `tensor` over all ranks, in place; what is returned waits for the sum and gives it."""
        work = dist.all_reduce(tensor, async_op=True) if self.grouped and self.size > 1 else None

        def summed() -> Tensor:
            if work is not None:
                work.wait()
            return tensor

        return summed

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.grouped and self.size > 1:
            dist.barrier()

    def from_leader(self, make: Callable[[], T]) -> T:
        """Return on every rank what `make` returns on rank 0; an error that it raises is raised on every rank. A
        collective.

        For what must be decided once, such as what a file on the disk says, and for writing that others wait for.
        """
        made: T | None = None
        error: Exception | None = None
        if self.leads:
            try:
                made = make()
            except Exception as raised:  # noqa: BLE001 - the other ranks wait for the answer, whatever it is
                error = raised
        if self.grouped and self.size > 1:
            sent: list[object] = [(made, _portable(error))]
            dist.broadcast_object_list(sent, 0)
            if not self.leads:
                made, error = cast("tuple[T | None, Exception | None]", sent[0])
        if error is not None:
            raise error
        return cast(T, made)

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank the error that any rank has: its own, or that of the lowest rank with one. A collective.

        Called before a barrier, so that a rank that has failed leaves no other waiting there.
        """
        errors: list[Exception | None] = [error]
        if self.grouped and self.size > 1:
            errors = [None] * self.size
            dist.all_gather_object(errors, _portable(error))
        if error is not None:
            raise error
        for other in errors:
            if other is not None:
                raise other

    def to_leader(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all ranks by name, on rank 0 and on the CPU; elsewhere none. A collective.

        Ranks bring different names.
        """
        own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        layouts: list[Any] = [{name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}]
        if self.grouped and self.size > 1:
            layouts *= self.size
            dist.all_gather_object(layouts, layouts[0])
        if not self.leads:
            for tensor in own.values():
                # Counters of optimizers lie on the CPU; a group of GPUs sends from the device.
                dist.send(tensor.to(self.device), 0)
            return {}
        gathered = {name: tensor.cpu() for name, tensor in own.items()}
        for rank, layout in enumerate(layouts[1:], 1):
            for name, (shape, dtype) in layout.items():
                received = torch.empty(shape, dtype=dtype, device=self.device)
                dist.recv(received, rank)
                gathered[name] = received.cpu()
        return gathered

    def gather_rows(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor's rows of all ranks one after the other, rank by rank. All tensors of a rank have the same number
        of rows; ranks may have different ones."""
        if not self.grouped or self.size == 1:
            return list(tensors)
        own = torch.tensor([tensors[0].shape[0]], device=tensors[0].device)
        counts = [torch.zeros_like(own) for _ in range(self.size)]
        dist.all_gather(counts, own)
        numbers = [int(count) for count in counts]
        gathered = []
        for tensor in tensors:
            padded = tensor.new_zeros((max(numbers), *tensor.shape[1:]))
            padded[: tensor.shape[0]] = tensor
            pieces = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(pieces, padded)
            gathered.append(torch.cat([piece[:count] for piece, count in zip(pieces, numbers, strict=True)]))
        return gathered


def collectives_begun() -> int | None:
    """Collectives that this rank has begun in the default group; None without a group, or where its backend does not
    count them. Any thread may ask."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    try:
        group = dist.distributed_c10d._get_default_group()
        return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined] # its stub lacks the name
    except (RuntimeError, ValueError):
        return None


def _portable(error: Exception | None) -> Exception | None:
    """An error that other ranks can unpickle; libraries have some that they cannot.

    Its kind says what it came from, which is not sent: all ranks report the same cause.
    """
    if error is None or type(error) is MemoryError:
        return error
    if isinstance(error, HrmRayError):
        return unreadable_if_away(error)
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    return RuntimeError(f"{type(error).__name__}: {error}")


def _local_device(device: str) -> torch.device:
    if device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)
