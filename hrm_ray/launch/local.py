"""The local launcher: the session of a worker runs in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hrm_ray.data.chunk_source import ChunkPipeline, ChunkSource, EpochOrder, LocalChunks
from hrm_ray.model.transforms.compile import recompile_limit_restored
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
        return LocalChunks(pipeline(True), order, self.stop)

    def stop_requested(self) -> StopReason | None:
        return self.stop()


def run(plan: RunPlan, *, sink: MetricSink, stop: StopPoll) -> RunResult:
    """Train as the plan says, with a world size of 1.

    PyTorch's threads, random numbers and limit of recompilations are as before afterwards.
    """
    threads = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if plan.device == "cuda" else []
    try:
        with torch.random.fork_rng(devices), recompile_limit_restored(plan.settings, torch.device(plan.device)):
            return train(plan, LocalLink(sink, stop))
    finally:
        torch.set_num_threads(threads)
