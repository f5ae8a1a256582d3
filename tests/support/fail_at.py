"""Scripted failures: where a pass of a step is to fail, and how.

One job: wrap a loop's strategy so that named passes raise. Nothing in the product knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hrm_ray.model.objective import Batch, SegmentOutput
from hrm_ray.train.loop import TrainingLoop


@dataclass(frozen=True)
class FailAt:
    """Memory runs out on `rank` in step `step` (from 1) as long as micro-batches have more than `fits` rows.

    `in_backward` lets the pass's forward succeed; `passes` is how many passes of the attempt succeed before.
    """

    rank: int
    step: int
    fits: int
    in_backward: bool = False
    passes: int = 0


def script(loop: TrainingLoop, failures: Sequence[FailAt]) -> None:
    """Let `loop` fail as the script says."""
    strategy = loop.parts.strategy
    segment, backward = strategy.segment, strategy.backward
    begun = 0
    attempted: tuple[int, int] | None = None

    def due(rows: int, in_backward: bool) -> bool:
        step = loop.progress.step + 1
        return any(
            (at.rank, at.step, at.in_backward) == (loop.world.rank, step, in_backward)
            and rows > at.fits
            and begun > at.passes
            for at in failures
        )

    def failing_segment(batch: Batch, carry: Any) -> SegmentOutput[Any]:
        nonlocal begun, attempted
        rows = loop.parts.shape.batch_size
        attempt = (loop.progress.step, rows)
        begun = begun + 1 if attempt == attempted else 1
        attempted = attempt
        if due(rows, in_backward=False):
            raise torch.OutOfMemoryError("scripted")
        return segment(batch, carry)

    def failing_backward(loss: torch.Tensor) -> None:
        if due(loop.parts.shape.batch_size, in_backward=True):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: scripted")
        backward(loss)

    strategy.segment = failing_segment  # type: ignore[method-assign]
    strategy.backward = failing_backward  # type: ignore[method-assign]
