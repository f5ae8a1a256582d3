"""Reports of a run to Weights & Biases and MLflow (--report-to).

Both libraries read their address and their secrets from their own environment variables and files; none is stored here.
"""

from __future__ import annotations

import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from hrm_ray.errors import DataError, Fault, UnavailableError
from hrm_ray.rundir import RunDir, read_json, write_json
from hrm_ray.types import MetricSink, Record

PROJECT = "hrm-ray"
"""Project of Weights & Biases and experiment of MLflow, where the environment names none."""
OPEN_WAIT_S = 20.0
"""At most so long Weights & Biases tries to reach its service."""
CLOSE_WAIT_S = 60.0
"""At most so long the end of a run waits for reports that are still to be sent."""
LEAST_CLOSE_WAIT_S = 1.0
"""So long it waits also where --max-time is over."""
PARAMS_AT_ONCE = 100
"""Parameters that MLflow takes in one call."""
TEXT_LIMIT = 5000
"""Characters that MLflow takes as the value of a tag or of a parameter."""
_LOGIN = re.compile(r"//[^/\s]+@")
"""User and password in an address."""
_SECRET_PARAMETER = re.compile(
    r"([?&][\w.-]*(?:key|token|secret|password|signature|sig|auth)[\w.-]*=)[^&\s'\")]+", re.I
)
"""A parameter of an address whose name tells that it is a secret."""


class Reporter(Protocol):
    """A run at one service. Its calls may take long and may fail; `ReportSink` calls it in a thread of its own."""

    def write(self, record: Record) -> None:
        """Send one record."""

    def close(self) -> None:
        """Send what is left and end the run."""


OpenReporter = Callable[[], Reporter]


def numbers(record: Record) -> dict[str, float]:
    """The record's numbers as `train/<name>` and `eval/<name>`, the items of a list as `<name>/<index>`."""
    found: dict[str, float] = {}
    for name, value in record.values.items():
        items = (
            {f"{name}/{index}": item for index, item in enumerate(value)} if isinstance(value, list) else {name: value}
        )
        found |= {f"{record.kind}/{one}": float(item) for one, item in items.items() if not isinstance(item, str)}
    return found


def without_secrets(text: str) -> str:
    """`text` without the passwords and tokens in addresses: errors of network libraries quote what they requested."""
    return _SECRET_PARAMETER.sub(r"\1***", _LOGIN.sub("//***@", text))


class WandbReporter:
    """A run of Weights & Biases. A resumed run goes on in the run that `run_id` names."""

    def __init__(self, run_dir: RunDir, config: Mapping[str, Any], run_id: str | None) -> None:
        wandb = import_module("wandb")
        _check_wandb_login(wandb)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.root.name),
            dir=os.environ.get("WANDB_DIR", str(run_dir.root)),
            config=dict(config),
            id=run_id,
            resume="allow" if run_id is not None else None,
            # Without `console` the library would take over the standard streams, which the display uses.
            settings=wandb.Settings(console="off", silent=True, init_timeout=OPEN_WAIT_S),
        )
        self.run_id: str = self._run.id
        # A resumed run may begin before the last step reported, which the library's own counter does not allow.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Send one record; of an event its message."""
        values = {"event": str(record.values.get("message", ""))} if record.kind == "event" else numbers(record)
        self._run.log({**values, "step": record.step})

    def close(self) -> None:
        """Send what is left and end the run."""
        self._run.finish()


class MlflowReporter:
    """A run of MLflow. A resumed run goes on in the run that `run_id` names."""

    def __init__(self, run_dir: RunDir, config: Mapping[str, Any], run_id: str | None) -> None:
        mlflow = import_module("mlflow")
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        if run_id is not None:
            self.run_id = run_id
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(name)
        self.run_id = str(self._client.create_run(experiment, run_name=run_dir.root.name).info.run_id)
        params = [self._entities.Param(key, str(value)[:TEXT_LIMIT]) for key, value in config.items()]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self.run_id, params=params[first : first + PARAMS_AT_ONCE])

    def write(self, record: Record) -> None:
        """Send one record; of events only the latest sample of text, as the tag `sample`."""
        if record.kind == "event":
            if "sample" in record.values:
                self._client.set_tag(self.run_id, "sample", str(record.values["message"])[:TEXT_LIMIT])
            return
        when_ms = round(1000 * record.time_s)
        # Its databases do not take infinity as a number.
        values = {name: value for name, value in numbers(record).items() if not math.isinf(value)}
        metrics = [self._entities.Metric(name, value, when_ms, record.step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self.run_id)


REPORTERS: dict[str, tuple[str, type[WandbReporter] | type[MlflowReporter]]] = {
    "wandb": ("wandb", WandbReporter),
    "mlflow": ("mlflow-skinny", MlflowReporter),
}
"""By the name in --report-to: the package to install, and the class."""


def check_reporters(names: Iterable[str]) -> None:
    """Raise UnavailableError where a package is not installed, or Weights & Biases has no API key."""
    for name in names:
        spec = find_spec(name)
        # A folder of this name, which both libraries make in the working folder, counts as a package without a file.
        if spec is None or spec.origin is None:
            package = REPORTERS[name][0]
            hint = f"Run pip install {package}, or leave --report-to {name} out"
            raise UnavailableError(Fault(f"--report-to {name}", f"the package {package} is not installed", hint))
        if name == "wandb":
            _check_wandb_login(import_module("wandb"))


def _check_wandb_login(wandb: Any) -> None:
    """The library would ask for an API key on the terminal in the midst of training."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    if not wandb.login(prompt=False, verify=False):
        hint = "Run wandb login, or set WANDB_MODE=offline"
        raise UnavailableError(Fault("--report-to wandb", "Weights & Biases has no API key", hint))


def report_sinks(
    names: Iterable[str],
    run_dir: RunDir,
    config: Mapping[str, Any],
    *,
    resumes: bool,
    others: MetricSink,
    stop_by_s: float | None = None,
) -> list[ReportSink]:
    """The sinks of a run for the services `names`. Their failures go to `others`, as warnings. The end waits for
    reports until `stop_by_s` (seconds since the epoch)."""

    stored: dict[str, str] = {}
    with suppress(DataError):
        stored = read_json(run_dir.reports) if resumes else {}
    lock = threading.Lock()

    def opener(name: str) -> OpenReporter:
        def open_reporter() -> Reporter:
            reporter = REPORTERS[name][1](run_dir, config, stored.get(name))
            with lock:
                stored[name] = reporter.run_id
                write_json(run_dir.reports, stored)
            return reporter

        return open_reporter

    return [ReportSink(name, opener(name), others, stop_by_s) for name in names]


class ReportSink:
    """A sink whose thread passes records on to a reporter, so that neither a slow nor a broken service stops training.

    Its first failure is written to `others` as a warning at the next record, and ends the reports.
    """

    def __init__(
        self, name: str, open_reporter: OpenReporter, others: MetricSink, stop_by_s: float | None = None
    ) -> None:
        self.name = name
        self._open = open_reporter
        self._others = others
        self._stop_by_s = stop_by_s
        self._records: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._warned = False
        self._step = 0
        self._thread = threading.Thread(target=self._send, name=f"report-{name}", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Queue one record."""
        self._step = record.step
        if self._failure is None:
            self._records.put(record)
        else:
            self._warn(f"{type(self._failure).__name__}: {self._failure}")

    def close(self) -> None:
        """Wait until all is sent, but for no longer than CLOSE_WAIT_S, and hardly beyond the limit of --max-time."""
        wait_s = CLOSE_WAIT_S
        if self._stop_by_s is not None:
            wait_s = min(wait_s, max(LEAST_CLOSE_WAIT_S, self._stop_by_s - time.time()))
        self._records.put(None)
        self._thread.join(wait_s)
        if self._failure is not None:
            self._warn(f"{type(self._failure).__name__}: {self._failure}")
        elif self._thread.is_alive():
            self._warn(f"the last reports were not sent within {wait_s:.0f} s")

    def _send(self) -> None:
        try:
            reporter = self._open()
            while (record := self._records.get()) is not None:
                reporter.write(record)
            reporter.close()
        except Exception as error:  # noqa: BLE001 - reports must not end a run
            self._failure = error

    def _warn(self, reason: str) -> None:
        if self._warned:
            return
        self._warned = True
        shown = without_secrets(" ".join(reason.split()))[:200]
        message = f"--report-to {self.name}: no more reports ({shown}); training goes on"
        self._others.write(Record("event", self._step, time.time(), {"level": "WARNING", "message": message}))
