"""The first updates of a run, measured: what memory they take, and how fast they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from hrm_ray.launch.devices import choose_devices
from hrm_ray.launch.run import run
from hrm_ray.metrics.meters import GIGABYTE, peak_resident_bytes
from hrm_ray.settings.tree import RunSettings
from hrm_ray.types import Record, StopReason

FEWEST_STEPS, MOST_STEPS = 2, 12
TIMED_S = 1.0
"""Updates that are timed: so many at least, then until they took so long, or the most of them. One more follows: a stop
is heard at the beginning of an update."""
SLOW_S = 5.0
"""Where the first update takes longer, the second is the last."""
SAVED_EVERY = 2
"""Updates between saves and evaluations in a trial: after the second update, the first that finds optimizer state."""
LONGEST_RUN = 1000
"""--steps of a trial, which is stopped long before."""

Say: TypeAlias = Callable[..., None]


def shortened(settings: RunSettings, folder: Path) -> RunSettings:
    """The settings (resolved) of a trial of them: the same run, which saves and evaluates early, into `folder`."""
    run_changes: dict[str, Any] = {
        "steps": LONGEST_RUN,
        "epochs": None,
        "iterate": False,
        "stop_after_epoch": False,
        "stop_after_block": False,
        "bundle_dir": folder,
        "brain_name": None,
        "eval_every": SAVED_EVERY,
        "save_every": SAVED_EVERY,
        "keep": 1,
        "log_every": 1,
        "report_to": None,
        "log_file": None,
        "stop_file": None,
        "max_time": None,
        "sample_prompt": None,
    }
    return settings.model_copy(
        update={
            "run": settings.run.model_copy(update=run_changes),
            "data": settings.data.model_copy(update={"eval_batches": 1}),
            "cluster": settings.cluster.model_copy(update={"max_failures": 0, "strict": False}),
            "given": frozenset(),
            "overridden": (),
            "complete": True,
        }
    )


class _Watch:
    """A sink that says what each record tells of memory, and when enough was measured."""

    def __init__(self, batch_size: int, say: Say) -> None:
        self._batch_size, self._say = batch_size, say
        self._begun_s = time.time()
        self._finished_s: list[float] = []
        self._enough = False

    def write(self, record: Record) -> None:
        if record.kind == "progress":
            self._finished_s.append(record.time_s)
            self._enough = self._enough or self._timed_enough()
        if record.kind != "train":
            return
        values = record.values
        peak = max(float(str(values[name])) for name in ("peak_gb", "reserved_gb") if name in values)
        self._say(step=record.step, peak_bytes=round(peak * GIGABYTE))
        if int(str(values["physical_batch_size"])) < self._batch_size:
            # The run would go on; what was to be tried did not fit.
            self._say(halved=True)
            self._enough = True

    def close(self) -> None:
        pass

    def begin(self) -> None:
        self._begun_s = time.time()

    def stop(self) -> StopReason | None:
        return StopReason.STOP_FILE if self._enough else None

    def update_s(self) -> float | None:
        """The median time of an update, without the first and those that follow a save or an evaluation."""
        timed = self._timed()
        return statistics.median(timed) if timed else None

    def _timed(self) -> list[float]:
        between = zip(self._finished_s, self._finished_s[1:], strict=False)
        return [after - before for step, (before, after) in enumerate(between, start=1) if step % SAVED_EVERY]

    def _timed_enough(self) -> bool:
        done = len(self._finished_s)
        if done == 1 and self._finished_s[0] - self._begun_s > SLOW_S:
            return True
        return done >= MOST_STEPS or (done >= FEWEST_STEPS and sum(self._timed()) >= TIMED_S)


def first_updates(settings: RunSettings, say: Say) -> None:
    """Do the first updates of a run with these settings (`shortened`). `say` receives, as keywords: `step` and
    `peak_bytes` after each, `halved` where a micro-batch did not fit, at the end `update_s` and `peak_bytes`.

    Raises HrmRayError, as a run does.
    """
    watch = _Watch(settings.optimizer.batch_size, say)
    run(settings, sink=watch, stop=watch.stop, on_start=watch.begin)
    devices = choose_devices(settings.cluster)
    if devices.launcher == "local" and devices.device == "cpu":
        say(peak_bytes=peak_resident_bytes())  # the last save is in it
    say(update_s=watch.update_s())
