"""Data parallel: whole weights on every rank, gradients averaged once per weight update.

One job: make the gradients common after all passes of a step. The passes themselves run without any collective, so
that a rank that runs out of memory in one of them leaves no other rank waiting; PyTorch's own wrapper reduces inside
the last backward pass and cannot be left there. That overlap is worth little here: a step uses the weights in many
passes and reduces once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from hrm_ray.model.objective import AnyObjective
from hrm_ray.train.optimizers import BuildOptimizer
from hrm_ray.train.strategies.single import SingleStrategy

BUCKET_BYTES = 32 * 2**20
"""Gradients that are sent at once: enough to hide latency, little beside the gradients themselves."""


class DdpStrategy(SingleStrategy):
    """Every parameter that one rank has a gradient for, all have: the objective touches them all."""

    def prepare(self, objective: AnyObjective, build_optimizer: BuildOptimizer) -> None:
        super().prepare(objective, build_optimizer)
        with torch.no_grad():
            for tensor in (*self.objective.parameters(), *self.objective.buffers()):
                dist.broadcast(tensor.data, 0)

    def any_rank(self, flag: bool) -> bool:
        raised = torch.tensor(float(flag), device=self.world.device)
        return bool(self.world.sum(raised) > 0)

    def reduce(self) -> None:
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        for bucket in buckets(gradients):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                # A large one, such as a vocabulary's, is sent from where it is: a copy of it might not fit any more.
                dist.all_reduce(bucket[0])
                bucket[0].div_(self.world.size)
                continue
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            flat.div_(self.world.size)
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, together no more than BUCKET_BYTES unless one alone is; the same on every rank."""
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
