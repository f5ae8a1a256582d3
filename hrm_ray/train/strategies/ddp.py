"""Data parallel training: whole weights on every rank, gradients averaged once per weight update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from hrm_ray.model.objective import AnyObjective
from hrm_ray.train.optimizers import BuildOptimizer
from hrm_ray.train.strategies.single import SingleStrategy
from hrm_ray.train.world import World

BUCKET_BYTES = 32 * 2**20
"""Gradients that are sent at once: enough to hide latency, little beside the gradients themselves."""
SMALL_BYTES = 4 * 2**20
"""Gradients up to this size go in one collective with the word whether memory ran out: the latency of one for itself
would show beside them, and a rank that has just run out of memory has room for as much."""


class DdpStrategy(SingleStrategy):
    """Gradients are averaged by an all-reduce of its own after the last pass, not by torch's DistributedDataParallel.

    The passes contain no collective, so a rank that runs out of memory in one of them leaves no other rank waiting and
    all can repeat the passes with smaller micro-batches. torch's wrapper reduces inside the last backward pass, which
    cannot be left and repeated. Its overlap of communication and backward is worth little here: a step uses the weights
    in many passes and reduces once.
    """

    _small: tuple[int, torch.dtype] | None = None
    """Number and type of all gradients where they are small; known from the first step that no rank failed in."""

    def prepare(self, objective: AnyObjective, build_optimizer: BuildOptimizer, ema_decay: float | None = None) -> None:
        with torch.no_grad():
            for tensor in (*objective.to(self.world.device).parameters(), *objective.buffers()):
                dist.broadcast(tensor.data, 0)
        super().prepare(objective, build_optimizer, ema_decay)

    def reduce(self, failed: bool) -> bool:
        # Every rank has a gradient for the same parameters: the objective touches all of them in every pass.
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        if self._small is not None:
            return self._reduce_small(gradients, failed, self._small)
        if any_rank(self.world, failed):
            return True
        if sum(gradient.nbytes for gradient in gradients) <= SMALL_BYTES and len({g.dtype for g in gradients}) == 1:
            self._small = sum(gradient.numel() for gradient in gradients), gradients[0].dtype
            # As in every later step: the order in which a ring adds depends on the length of what is sent, and a
            # resumed run has its first step where another run has a later one.
            return self._reduce_small(gradients, False, self._small)
        for bucket in buckets(gradients):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                # A large gradient, such as an embedding's, is reduced in place: a copy of it might not fit.
                dist.all_reduce(bucket[0])
                bucket[0].div_(self.world.size)
                continue
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            _fill(bucket, flat.div_(self.world.size))
        return False

    def _reduce_small(self, gradients: list[Tensor], failed: bool, layout: tuple[int, torch.dtype]) -> bool:
        """All gradients, and whether a rank has failed, in one collective."""
        count, dtype = layout
        flat = torch.zeros(count + 1, dtype=dtype, device=self.world.device)
        if failed:
            flat[-1] = 1
        else:
            torch.cat([gradient.reshape(-1) for gradient in gradients], out=flat[:-1])
        dist.all_reduce(flat)
        if bool(flat[-1] > 0):
            return True
        _fill(gradients, flat[:-1].div_(self.world.size))
        return False


def any_rank(world: World, flag: bool) -> bool:
    """Whether `flag` holds on any rank; a collective."""
    return bool(world.sum(torch.tensor(float(flag), device=world.device)) > 0)


def _fill(gradients: list[Tensor], flat: Tensor) -> None:
    """Copy the parts of `flat` into the gradients."""
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one dtype, up to BUCKET_BYTES together unless a single one is larger."""
    bucket: list[Tensor] = []
    size_bytes = 0
    for gradient in gradients:
        own_bytes = gradient.numel() * gradient.element_size()
        if bucket and (gradient.dtype != bucket[0].dtype or size_bytes + own_bytes > BUCKET_BYTES):
            yield bucket
            bucket, size_bytes = [], 0
        bucket.append(gradient)
        size_bytes += own_bytes
    if bucket:
        yield bucket
