"""What becomes of independent trainers that fail, hang, find no room, or make merges worse."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from hrm_ray.errors import DivergedError, Fault, HrmRayError, NoRoomError
from hrm_ray.independent.anchor_files import remove_unreported
from hrm_ray.independent.coordinator import LedgerCoordinator, Merged
from hrm_ray.independent.decisions import MOST_REJECTIONS, Watched, hung, makes_worse
from hrm_ray.independent.workers import TrainerHandle, Workers
from hrm_ray.launch.restarts import LASTING, Cause, cause_of
from hrm_ray.rundir import RunDir
from hrm_ray.train.activity import Phase
from hrm_ray.train.plan import RunPlan
from hrm_ray.types import RestartRecord, StopReason

UNPLACED_S = 60.0
"""After so long without room on the cluster a trainer is reported."""
NO_ROOM_S = 600.0
"""A run none of whose trainers has found room for so long ends, or for --wait-for-resources where that is longer."""


class TrainerWatch:
    """Looks after the trainers of a run: ends those that hang, and starts again what has ended."""

    def __init__(
        self,
        plan: RunPlan,
        workers: Workers,
        coordinator: LedgerCoordinator,
        write: Callable[[Any, dict[str, Any]], None],
    ) -> None:
        """`write` takes a record's kind and values."""
        self._workers, self._coordinator, self._write = workers, coordinator, write
        self._settings, self._run_dir = plan.settings, RunDir(plan.bundle)
        self.fatal: HrmRayError | None = None
        """With what the run ends once all is saved."""
        self.failure: HrmRayError | None = None
        """The first error of a trainer that was not started again. The run fails with it if no trainer is left."""
        self.restarts: list[RestartRecord] = []
        self._named_worse: set[str] = set()
        self._watched = Watched(time.monotonic())
        self._placed_s = time.monotonic()
        """When a trainer was last seen in its place."""
        self._unplaced_s: dict[Hashable, float] = {}
        """When it is said of a trainer that it has found no room yet; infinite once it was said."""

    def look(self) -> None:
        """See to trainers that are silent, hang, find no room or have ended, and to expired leases."""
        for name in self._coordinator.tick():
            self._event("WARNING", f"{name} was silent for the length of a lease; what it had not reported goes back")
            child = self._workers.trainers.get(name)
            if child is not None:
                child.kill()  # it is frozen; its end is seen below, and it is started again
        self._end_hung()
        self._end_without_room()
        for child in self._workers.take_ended():
            self._take_end(child)

    def judge(self, merged: Merged, trainers: Mapping[str, str]) -> None:
        """After a merge: name trainers that make merges worse, and end those whose reports are rejected again and
        again. `trainers` are those of the reports."""
        self._name_worse(merged, trainers)
        self._end_rejected(merged)

    def end_without_trainers(self) -> None:
        """End the run, of which no trainer is left: what they had reported is merged and saved."""
        self.fatal = self.failure or HrmRayError(
            Fault("all trainers", "have ended and are not started again", "Use --resume, or see the messages")
        )
        self._coordinator.stop = StopReason.FINISHED

    def _end_hung(self) -> None:
        """End trainers that make no progress, though a thread of theirs answers; also those that never joined."""
        done: dict[str, tuple[object, Phase]] = {}
        for name, child in self._workers.trainers.items():
            if not child.placed:
                self._tell_unplaced(child)
                continue
            state = self._coordinator.trainers.get(name)
            if state is None or state.progress is None:
                done[name] = (child.identity, state is None), "starting"
            else:
                done[name] = (child.identity, state.generation, state.progress.marks), state.progress.phase
        self._watched, hangs = hung(self._watched, done, time.monotonic(), self._settings.cluster.hang_after_s)
        for name, stood_s in hangs.items():
            self._event("WARNING", f"{name} has made no progress for {stood_s:.0f} s ({done[name][1]}) and is ended")
            self._workers.trainers[name].kill()

    def _end_without_room(self) -> None:
        """End the run where no trainer is left that has its place: the cluster may never have room again."""
        now_s, trainers = time.monotonic(), self._workers.trainers
        if not trainers or any(child.placed for child in trainers.values()):
            self._placed_s = now_s
            return
        longest_s = max(NO_ROOM_S, self._settings.cluster.wait_s or 0)
        if now_s - self._placed_s >= longest_s and self._coordinator.stop is None:
            reason = f"no trainer has found room on the cluster for {longest_s:.0f} s"
            hint = "Look at `ray status`, and continue with --resume when there is room"
            self.fatal = NoRoomError(Fault(f"--world-size {len(trainers)}", reason, hint))
            self._coordinator.stop = StopReason.FINISHED  # what was reported is merged and saved

    def _tell_unplaced(self, child: TrainerHandle) -> None:
        """Say once that a trainer finds no room on the cluster: no failure of it, and it may come yet."""
        now_s = time.monotonic()
        if now_s >= self._unplaced_s.setdefault(child.identity, now_s + UNPLACED_S):
            self._unplaced_s[child.identity] = math.inf
            self._event(
                "WARNING",
                f"{child.name} has not started yet: no room on the cluster, or slow libraries; the run goes on",
            )

    def _take_end(self, child: TrainerHandle) -> None:
        """A trainer's process has ended: in order, or it is started again, or the run goes on without it."""
        coordinator, left = self._coordinator, child.name not in self._coordinator.trainers
        error = child.failure
        if left and error is None and child.code == 0:
            if coordinator.stop is None and not coordinator.finished:
                self._start_again(child)
            return
        told = str(error.faults[0]) if error is not None else f"its process ended with code {child.code}"
        coordinator.lost(child.name, told)
        remove_unreported(self._run_dir, self._coordinator.ledger, child.name)
        if coordinator.stop is not None or coordinator.finished:
            self._event("WARNING", f"{child.name} has failed at the end of the run: {told}")
            return
        lasting = error is not None and cause_of(error) in LASTING
        if lasting or len(self.restarts) >= self._settings.cluster.max_failures:
            self.failure = self.failure or error
            without = "; the run goes on without it" if self._workers.trainers else ""
            self._event("WARNING", f"{child.name} has failed ({told}){without}")
            return
        step = coordinator.anchor.round
        cause = Cause.WORKER_LOST if error is None else cause_of(error)
        restart = RestartRecord(len(self.restarts) + 1, cause.value, step, step, 0.0)
        self.restarts.append(restart)
        message = f"{child.name} has failed ({told}) and is started again; only what it had not reported is lost"
        self._write("event", {"level": "WARNING", "message": message, **restart.values()})
        self._start_again(child)

    def _start_again(self, child: TrainerHandle) -> None:
        self._workers.start_trainer(child.name, child.number)
        self._workers.serve(self._coordinator)

    def _name_worse(self, merged: Merged, trainers: Mapping[str, str]) -> None:
        """Say once of a trainer that its reports make merges worse, with the figures."""
        reasons = {trainers[report]: reason for report, reason in merged.rejected.items()}
        for name, reason in reasons.items():
            state, child = self._coordinator.trainers.get(name), self._workers.trainers.get(name)
            if state is None or child is None or name in self._named_worse:
                continue
            if makes_worse(state.reports, state.rejected_by_guard):
                self._named_worse.add(name)
                told = (
                    f"{state.rejected_by_guard} of its {state.reports} reports were rejected, the last because {reason}"
                )
                hint = "run without its device, or with a lower --lr"
                self._event("WARNING", f"{name} on {child.device} makes merges worse: {told}; {hint}")

    def _end_rejected(self, merged: Merged) -> None:
        """End trainers whose reports are rejected again and again: their device or their settings are to blame."""
        for name, state in list(self._coordinator.trainers.items()):
            child = self._workers.trainers.get(name)
            if child is None or state.rejected_in_row < MOST_REJECTIONS:
                continue
            reason = f"had {state.rejected_in_row} reports in a row rejected; the run goes on without it"
            self._event("WARNING", f"{name} {reason}")
            self._workers.end(child)
            self._coordinator.lost(name, reason)
            remove_unreported(self._run_dir, self._coordinator.ledger, name)
            if self.failure is None:
                why = next(iter(merged.rejected.values()))
                hint = "Give a lower --lr, or see whether its device is sound"
                self.failure = DivergedError(Fault(name, f"had its reports rejected: {why}", hint))

    def _event(self, level: str, message: str) -> None:
        self._write("event", {"level": level, "message": message})
