"""DistributedDataParallel: whole weights on every rank, gradients averaged once per weight update.

One job: wrap the objective so that the last backward pass of a step averages over ranks, and no other does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hrm_ray.model.objective import AnyObjective
from hrm_ray.train.strategies.single import SingleStrategy


class DdpStrategy(SingleStrategy):
    """Default DDP settings: no unused parameters (the objective touches them all) and never a static graph.

    Buffers are constants or updated alike on every rank, so they are not broadcast at each pass.
    """

    def _wrap(self, objective: AnyObjective) -> nn.Module:
        device_ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids=device_ids, broadcast_buffers=False)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        if last:
            return nullcontext()
        return cast(AbstractContextManager[None], cast(Any, self.wrapped).no_sync())
