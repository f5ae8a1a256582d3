"""Parameters divided among ranks, and a moving average of which each rank keeps its part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from hrm_ray.bundle.weights_file import read_tensors
from hrm_ray.train.strategies.ddp import buckets
from hrm_ray.train.strategies.single import AVERAGE, Ema
from hrm_ray.train.world import World


class Ownership:
    """Which rank owns which trained parameter of a module, the same on every rank; all ranks hold all values.

    From the largest parameter on, each goes to the rank that owns the fewest values so far.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        self.world = world
        self.by_rank: list[dict[str, nn.Parameter]] = [{} for _ in range(world.size)]
        values = [0] * world.size
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        for name, parameter in sorted(trained, key=lambda item: -item[1].numel()):
            owner = values.index(min(values))
            self.by_rank[owner][name] = parameter
            values[owner] += parameter.numel()

    @property
    def own(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by name."""
        return self.by_rank[self.world.rank]

    @property
    def others(self) -> Iterator[nn.Parameter]:
        """The other ranks' parameters."""
        for rank, parameters in enumerate(self.by_rank):
            if rank != self.world.rank:
                yield from parameters.values()

    @torch.no_grad()
    def send_values(self) -> None:
        """Every owner sends the values of its parameters to all ranks; a collective."""
        for owner, parameters in enumerate(self.by_rank):
            for bucket in buckets([parameter.data for parameter in parameters.values()]):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                dist.broadcast(flat, owner)
                if owner != self.world.rank:
                    parts = flat.split([tensor.numel() for tensor in bucket])
                    for tensor, part in zip(bucket, parts, strict=True):
                        tensor.copy_(part.view_as(tensor))


class OwnedAverage(Ema):
    """The moving average of the parameters that this rank owns."""

    def __init__(self, ownership: Ownership, decay: float) -> None:
        super().__init__(ownership.own, decay)
        self.ownership = ownership

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with super().in_place():
            self.ownership.send_values()
            yield
        # Where the block raised, ranks do not meet again.
        self.ownership.send_values()

    def load_own(self, folder: Path) -> None:
        """Restore this rank's part of a checkpoint's average."""
        average = read_tensors(folder / AVERAGE)
        self.load({name: average[name] for name in self.average})
