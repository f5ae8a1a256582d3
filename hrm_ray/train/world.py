"""Which worker this process is among how many, and on what device.

One job: rank, size, device, threads, and the few collectives that need no model. Strategies build on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hrm_ray.train.host_memory import keep_freed_memory


@dataclass(frozen=True)
class World:
    """One worker's place. `grouped` says whether a process group exists (a group of one counts)."""

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
        """Whether this worker writes the files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` added over all ranks, in place."""
        if self.grouped and self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.grouped and self.size > 1:
            dist.barrier()

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks one after the other, rank by rank; ranks may bring different numbers of rows."""
        if not self.grouped or self.size == 1:
            return tensor
        counts = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([tensor.shape[0]], device=tensor.device))
        most = int(max(int(c) for c in counts))
        padded = tensor.new_zeros((most, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        pieces = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[: int(count)] for piece, count in zip(pieces, counts, strict=True)])


def _local_device(device: str) -> torch.device:
    if device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)
