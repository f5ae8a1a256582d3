"""Runs a training run as attempts: after a failure the next attempt continues from the newest checkpoint.

What follows on a failure is decided in `restarts`; how one attempt runs is the launcher's affair.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from hrm_ray.bundle.progress import STATE
from hrm_ray.errors import DataError, HrmRayError
from hrm_ray.launch.restarts import Ending, GiveUp, RestartPolicy, counted, decide
from hrm_ray.rundir import RunDir, read_json
from hrm_ray.train.plan import EndedAttempt, RunPlan, effective_batch, largest_divisor, resized
from hrm_ray.types import MetricSink, Record, RestartRecord, RunResult, StopPoll, StopReason, StopRequested

POLL_INTERVAL_S = 0.2


@dataclass(frozen=True)
class Failed:
    """An attempt that failed: its ending, and whether its workers had opened the files of the run."""

    ending: Ending
    begun: bool = True


Attempt: TypeAlias = Callable[[RunPlan, "WatchedSink"], "RunResult | Failed"]
"""Runs one attempt to its end. When it returns, nothing of the attempt lives on. Records go to the given sink."""


class WatchedSink:
    """A MetricSink that passes records on, and knows the last step trained and the restarts so far."""

    def __init__(self, sink: MetricSink) -> None:
        self._sink = sink
        self.step = 0
        self.restarts: list[RestartRecord] = []

    def write(self, record: Record) -> None:
        if record.kind != "event":
            self.step = record.step
        restart = RestartRecord.of(record)
        if restart is not None and restart.resumed_step is not None:
            self.step = restart.resumed_step
            self.restarts.append(restart)
        self._sink.write(record)

    def close(self) -> None:
        """The sink belongs to the caller."""

    def warn(self, message: str) -> None:
        """Show a message that no worker can write into the files of the run."""
        self._sink.write(Record("event", self.step, time.time(), {"level": "WARNING", "message": message}))


def supervise(
    plan: RunPlan,
    attempt: Attempt,
    *,
    sink: MetricSink,
    stop: StopPoll,
    room: Callable[[RunPlan], int] | None = None,
    wait: Callable[[float, StopPoll], None] | None = None,
) -> RunResult:
    """Run attempts until one returns a result, or a failure ends the run. Raises the error of that failure.

    `room` says how many workers there is room for after an attempt with this plan (without it: as many as the plan
    has), and `wait` waits so many seconds, or until a stop is asked for.
    """
    first = plan = replace(plan, begun_s=time.time())
    cluster, rows = first.settings.cluster, first.settings.optimizer.batch_size
    least, most = cluster.min_workers or first.world_size, cluster.max_workers or first.world_size
    policy = RestartPolicy(cluster.max_failures, least, most)
    watched, endings = WatchedSink(sink), list[Ending]()

    def workers() -> int:
        found = plan.world_size if room is None or least == most else room(plan)
        if not found or first.settings.cluster.parallel_independent:
            return min(found, most)
        return largest_divisor(effective_batch(first), min(found, most))

    while True:
        try:
            outcome = attempt(plan, watched)
        except StopRequested as stopped:
            return _stopped(plan, stopped.reason, watched)
        if isinstance(outcome, RunResult):
            if outcome.reason is StopReason.RESIZE:
                reason = stop()
                if reason is not None:
                    _write_bundle(plan, reason, watched)
                    return replace(outcome, reason=reason, restarts=_restarts(watched, endings))
                plan = _after_growth(plan, resized(first, max(workers(), plan.world_size), rows))
                continue
            return replace(outcome, restarts=_restarts(watched, endings))
        ending = outcome.ending
        reason = stop()
        if reason is not None:
            watched.warn(f"{_described(ending)}; the run was asked to stop, so it is not restarted")
            return _stopped(plan, reason, watched, ending)
        decision = decide(ending, endings, policy, workers())
        if isinstance(decision, GiveUp):
            reason = stop()
            if reason is not None:  # It came while a replacement was waited for.
                return _stopped(plan, reason, watched, ending)
            if decision.why and policy.max_failures:
                watched.warn(f"no restart: {decision.why}")
            raise decision.error
        endings.append(ending)
        waits = f" in {decision.wait_s:.0f} s" if decision.wait_s else ""
        limit = policy.max_failures + len(endings) - counted(endings)
        smaller = f" with micro-batches of {decision.batch_size}" if decision.batch_size < ending.batch_size else ""
        watched.warn(f"{_described(ending)}; restart {len(endings)} of at most {limit}{smaller}{waits}")
        (wait or wait_for)(decision.wait_s, stop)
        reason = stop()
        if reason is not None:
            return _stopped(plan, reason, watched, ending)
        if decision.batch_size < ending.batch_size:
            rows = decision.batch_size
        plan = next_plan(plan, outcome, resized(first, decision.world_size, rows))


def _restarts(watched: WatchedSink, endings: Sequence[Ending]) -> tuple[RestartRecord, ...]:
    """All restarts: also those of whose workers nothing came."""
    received = {restart.number: restart for restart in watched.restarts}
    known = [RestartRecord(number, each.cause.value, each.step) for number, each in enumerate(endings, 1)]
    return tuple(received.get(restart.number, restart) for restart in known)


def next_plan(plan: RunPlan, failed: Failed, sizes: RunPlan) -> RunPlan:
    """The plan of the attempt after one that failed, with the workers and micro-batches of `sizes`."""
    # A run that continues its own bundle may find later checkpoints there until an attempt has set them aside.
    attempt = plan.attempt + 1 if failed.begun or not plan.continues else plan.attempt
    ending = failed.ending
    ended = (*plan.ended, EndedAttempt(ending.cause.value, ending.step, _described(ending)))
    return replace(sizes, attempt=attempt, ended=ended, grown_from=0)


def _after_growth(plan: RunPlan, sizes: RunPlan) -> RunPlan:
    """The plan of the attempt after one that has ended for more workers."""
    return replace(sizes, attempt=plan.attempt + 1, ended=plan.ended, grown_from=plan.world_size)


def wait_for(wait_s: float, stop: StopPoll) -> None:
    """Wait so many seconds, or until a stop is asked for."""
    deadline_s = time.monotonic() + wait_s
    while time.monotonic() < deadline_s and stop() is None:
        threading.Event().wait(POLL_INTERVAL_S)


def _described(ending: Ending) -> str:
    """The failure in one sentence, without what to do about it."""
    fault = ending.error.faults[0]
    return f"{ending.cause.value} at step {ending.step} ({fault.value}: {fault.reason})"


def _write_bundle(plan: RunPlan, reason: StopReason, watched: WatchedSink) -> None:
    """Write the final bundle of a run that is stopped while it has no workers, from its newest checkpoint. Where that
    is not possible, say so."""
    why, run_dir = "only workers merge adapters into them", RunDir(plan.bundle)
    if not plan.settings.adapt.use_peft:
        from hrm_ray.train.checkpoint import save_bundle_of  # It loads torch.

        try:
            newest = run_dir.newest_checkpoint()
            if newest is not None:
                save_bundle_of(newest, run_dir, reason, plan.config, plan.settings.memory.model_dtype)
                return
            why = "there is no checkpoint"
        except HrmRayError as error:
            why = f"{error.faults[0].value}: {error.faults[0].reason}"
        except OSError as error:
            why = str(error)
    watched.warn(f"no final weights are written ({why}); --resume continues from the newest checkpoint")


def _stopped(plan: RunPlan, reason: StopReason, watched: WatchedSink, ending: Ending | None = None) -> RunResult:
    """The result of a run that was asked to stop between attempts: that of its newest checkpoint, with the final bundle
    made of it. Raises the failure, or StopRequested, where it has none."""
    state: dict[str, Any] | None = None
    if plan.attempt or plan.ended or ending is not None:
        with suppress(OSError, DataError):  # The disk may still be unreachable.
            newest = RunDir(plan.bundle).newest_checkpoint()
            state = None if newest is None else read_json(newest / STATE)
    if state is None:
        if ending is not None:
            raise ending.error
        raise StopRequested(reason)
    _write_bundle(plan, reason, watched)
    return RunResult(
        reason, state["progress"]["step"], state["epoch"], str(plan.bundle), restarts=tuple(watched.restarts)
    )
