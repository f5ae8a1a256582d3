"""A run as a function: everything from settings to how the run ended.

It owns neither the process nor its signals: the caller polls them and says when to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module

from hrm_ray.launch.devices import visible_gpus
from hrm_ray.launch.new_bundle import removed_unless_trained
from hrm_ray.launch.plan import make_plan
from hrm_ray.launch.reading_progress import ReadingProgress
from hrm_ray.launch.resolve import ResolvedRun, resolve
from hrm_ray.launch.run_directory import check_unchanged
from hrm_ray.launch.run_lock import run_lock
from hrm_ray.metrics.fanout import FanOut
from hrm_ray.settings.tree import RunSettings
from hrm_ray.types import MetricSink, RunResult, StopPoll

LAUNCHERS = {
    "local": "hrm_ray.launch.local:run",
    "ray": "hrm_ray.orchestration.worker_group:run",
}
"""--launcher -> module and function `(plan, *, sink, stop) -> RunResult`; imported when it is used."""


def run(
    settings: RunSettings | ResolvedRun,
    *,
    sink: MetricSink | None = None,
    stop: StopPoll | None = None,
    on_start: Callable[[], None] | None = None,
) -> RunResult:
    """Train as the settings say, and return how it ended. Raises HrmRayError, and StopRequested for a stop
    before the first step.

    Records go to `sink` besides the files of the bundle. `stop` is polled about once per step; a reason ends the run in
    order, with a checkpoint. `on_start` is called once everything is prepared, just before training starts.
    """
    sink, stop = sink or FanOut([]), stop or (lambda: None)
    resolved = resolve(settings) if isinstance(settings, RunSettings) else settings
    location, devices = resolved.location, resolved.devices
    with ExitStack() as held:
        held.enter_context(run_lock(location.run_dir))
        # Another run may have used the folder between the first check and the lock.
        check_unchanged(resolved.settings, location)
        held.enter_context(removed_unless_trained(location))
        held.enter_context(visible_gpus(devices))
        plan = make_plan(resolved, ReadingProgress(sink, stop))
        module, _, function = LAUNCHERS[devices.launcher].partition(":")
        launch: Callable[..., RunResult] = vars(import_module(module))[function]
        if on_start is not None:
            on_start()
        return launch(plan, sink=sink, stop=stop)
