"""Data parallel training: whole weights on every rank, gradients averaged once per weight update."""

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
    """Gradients are averaged by an all-reduce of its own after the last pass, not by torch's DistributedDataParallel.

    The passes contain no collective, so a rank that runs out of memory in one of them leaves no other rank waiting and
    all can repeat the passes with smaller micro-batches. torch's wrapper reduces inside the last backward pass, which
    cannot be left and repeated. Its overlap of communication and backward is worth little here: a step uses the weights
    in many passes and reduces once.
    """

    def prepare(self, objective: AnyObjective, build_optimizer: BuildOptimizer, ema_decay: float | None = None) -> None:
        with torch.no_grad():
            for tensor in (*objective.to(self.world.device).parameters(), *objective.buffers()):
                dist.broadcast(tensor.data, 0)
        super().prepare(objective, build_optimizer, ema_decay)

    def any_rank(self, flag: bool) -> bool:
        raised = torch.tensor(float(flag), device=self.world.device)
        return bool(self.world.sum(raised) > 0)

    def reduce(self) -> None:
        # Every rank has a gradient for the same parameters: the objective touches all of them in every pass.
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        for bucket in buckets(gradients):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                # A large gradient, such as an embedding's, is reduced in place: a copy of it might not fit.
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
