"""The local launcher: the session of a worker runs in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hrm_ray.data.chunk_source import ChunkPipeline, ChunkSource, EpochOrder, LocalChunks
from hrm_ray.train.plan import RunPlan
from hrm_ray.train.session import train
from hrm_ray.types import MetricSink, RunResult, StopPoll, StopReason


@dataclass(frozen=True)
class LocalLink:
    """The driver is this process: records go straight to its display, and stops are read from it."""

    display: MetricSink
    stop: StopPoll

    def sink(self) -> MetricSink:
        return self.display

    def chunks(self, pipeline: Callable[[bool], ChunkPipeline], order: EpochOrder) -> ChunkSource:
        return LocalChunks(pipeline(True), order)

    def stop_requested(self) -> StopReason | None:
        return self.stop()


def run(plan: RunPlan, *, sink: MetricSink, stop: StopPoll) -> RunResult:
    """Train as the plan says, here and now; the plan's world size is 1."""
    return train(plan, LocalLink(sink, stop))
