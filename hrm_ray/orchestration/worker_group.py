"""Runs a plan on Ray Train workers and gives back how it ended: the driver's side of a distributed run.

Start the worker group, pass records to the display and stops to the workers, and turn every end into
one RunResult or one error. What the workers do is the body's business; what resources are needed is checked in
`resources`; how Ray is opened and closed is `session`'s.

`TorchTrainer.fit` runs in a thread: called from the main thread it installs a SIGINT handler of its own, which
kills the workers without a checkpoint. This way the handlers that the command line has installed stay in force,
and the main thread, where Python runs them, never waits longer than a fraction of a second. The same holds for
`ray.init` (see `session`), except for a native SIGTERM handler, which `_put_handlers_back` undoes.

How it ends:
  * every rank returns: the RunResult of rank 0, whose reason may be a stop;
  * a rank raises: the driver raises one error of the same kind with the same faults, or WorkerCrash with the
    traceback of the first cause;
  * a rank dies without a word: WorkerCrash (exit code 1) that names the rank. Nothing is retried;
  * an exception in the driver itself (a second Ctrl-C): everything is ended at once and it is raised again.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hrm_ray.errors import Fault, HrmRayError, ResourceError, UnavailableError
from hrm_ray.launch import resources
from hrm_ray.launch.cluster_address import check_address
from hrm_ray.launch.resources import ResourceRequest, usable_cpus
from hrm_ray.orchestration.chunk_server import ChunkServer
from hrm_ray.orchestration.datasets import TASK_CPUS, ChunkTaskContext
from hrm_ray.orchestration.failures import (
    RESUME_HINT,
    Failure,
    StoppedBeforeStart,
    WorkerCrash,
    death_in_words,
    first_cause,
)
from hrm_ray.orchestration.run_monitor import RunMonitor, StatusUpdate
from hrm_ray.orchestration.session import Session, worker_environment
from hrm_ray.train.plan import RunPlan, TextData
from hrm_ray.types import MetricSink, Record, RunResult, StopPoll, StopReason

if TYPE_CHECKING:
    # It loads ray.train, and with it torch, which the session loads while the cluster starts.
    from hrm_ray.orchestration.worker import Body

POLL_INTERVAL_S = 0.2
HUB_TIMEOUT_S = 60.0
FREE_WAIT_S = 10.0
"""A run that ended a moment ago may not have given back its resources yet."""
END_WAIT_S = 15.0
"""How long Ray Train may take to notice that all ranks have ended, before it is ended from here."""


def reads_text(plan: RunPlan) -> bool:
    """Whether the run has text to tokenise as it goes."""
    return isinstance(plan.data, TextData) and plan.data.text.cut.streaming and not plan.data.text.kept


@dataclass(frozen=True)
class Request:
    """What of a plan matters here."""

    demand: ResourceRequest
    device: str
    address: str | None
    name: str

    @classmethod
    def of(cls, plan: RunPlan) -> Request:
        return cls(
            demand=ResourceRequest(plan.world_size, plan.threads, 1 if plan.device == "cuda" else 0),
            device=plan.device,
            address=plan.ray_address,
            name=plan.bundle.name,
        )


def run(plan: RunPlan, *, sink: MetricSink, stop: StopPoll, body: Body | None = None) -> RunResult:
    """Train on the plan's number of Ray workers and return how it ended.

    Records of rank 0 reach `sink` in order and completely before this returns. `stop` is asked several times a second.
    Each worker runs `body`: `train.session.train`, unless another is given.

    Raises ResourceError or UnavailableError before anything has started, StoppedBeforeStart, the error of the
    worker that failed first, or WorkerCrash.
    """
    request = Request.of(plan)
    if request.address is None:
        resources.check_machine(request.demand, usable_cpus(), resources.available_memory_bytes())
    else:
        check_address(request.address)
    session = Session(request.address, request.demand, data=reads_text(plan))
    keep_logs = False
    opened = False
    try:
        _open(session, stop)
        opened = True
        _put_handlers_back()
        _check_cluster(session, request, sink)
        return WorkerGroupRun(session, request, plan, sink, stop, body).run()
    except (WorkerCrash, UnavailableError) as error:
        # Kept where the message names them: after a crash, and when the cluster did not start.
        keep_logs = session.is_local and (isinstance(error, WorkerCrash) or not opened)
        raise
    finally:
        session.close(keep_logs)


def _open(session: Session, stop: StopPoll) -> None:
    session.start()
    deadline_s = time.monotonic() + session.timeout_s
    while not session.ready(POLL_INTERVAL_S):
        reason = stop()
        if reason is not None:
            raise StoppedBeforeStart(reason)
        if time.monotonic() > deadline_s:
            raise session.timed_out()


def _put_handlers_back() -> None:
    """Install the command line's signal handlers again where Ray has put its own over them.

    Ray's native library takes SIGTERM below Python's table of handlers: it prints a stack trace before it passes
    the signal on. Setting the same handler again takes the signal back.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not None:  # None: it was not installed from Python
            signal.signal(number, handler)


def _check_cluster(session: Session, request: Request, sink: MetricSink) -> None:
    """Refuse what the cluster can never hold; wait a little for what is only busy, then refuse too."""
    if session.is_local:
        if request.demand.gpus:
            import torch

            resources.check_local_gpus(request.demand, torch.cuda.device_count())
        return
    resources.check_cluster(request.demand, session.nodes(), session.where)
    deadline_s = time.monotonic() + FREE_WAIT_S
    told = False
    while True:
        try:
            resources.check_free(request.demand, ray.available_resources(), ray.cluster_resources(), session.where)
            return
        except HrmRayError as busy:
            if time.monotonic() > deadline_s:
                raise
            if not told:
                sink.write(_event(f"{busy.faults[0].reason}; waiting up to {FREE_WAIT_S:.0f} s"))
                told = True
        threading.Event().wait(POLL_INTERVAL_S)


def _event(message: str) -> Record:
    return Record("event", 0, time.time(), {"message": message, "level": "WARNING"})


def _chunk_server(
    session: Session,
    request: Request,
    plan: RunPlan,
    sink: MetricSink,
    here: NodeAffinitySchedulingStrategy,
    environment: dict[str, Any],
) -> Any:
    """The actor that makes chunks of text for all ranks, None where nothing is left to make.

    Its tasks need CPUs that the workers leave free. Where there are none they would wait for ever, so each worker reads
    for itself then.
    """
    if not isinstance(plan.data, TextData) or not reads_text(plan):
        return None
    if not session.is_local and ray.available_resources().get("CPU", 0.0) < request.demand.cpus + TASK_CPUS:
        reason = f"the cluster has less than {TASK_CPUS:g} CPU beside the workers'"
        if plan.settings.cluster.strict:
            raise ResourceError(
                Fault("--strict", f"no CPU for Ray Data: {reason}", "Leave --strict out, or free a CPU")
            )
        sink.write(_event(f"{reason}: each worker reads and tokenises all of the data for itself"))
        return None
    server = ray.remote(ChunkServer).options(
        num_cpus=0,
        max_concurrency=4 * request.demand.world_size,
        scheduling_strategy=here,
        runtime_env=environment,
    )
    return server.remote(ChunkTaskContext(plan.bundle, plan.data.text), request.demand.world_size)


class _Fit(threading.Thread):
    """`TorchTrainer.fit` in a thread; `error` is what it raised."""

    def __init__(self, request: Request, config: dict[str, Any], storage: str) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        self._request = request
        self._config = config
        self._storage = storage
        self.error: BaseException | None = None

    def run(self) -> None:
        demand = self._request.demand
        try:
            # Loaded here, not at the top: torch takes seconds, and the session loads it while the cluster starts.
            from ray.train import FailureConfig, RunConfig, ScalingConfig
            from ray.train.torch import TorchConfig

            from hrm_ray.orchestration import worker
            from hrm_ray.orchestration.worker_group_trainer import WorkerGroupTrainer

            WorkerGroupTrainer(
                worker.main,
                private_cluster=self._request.address is None,
                train_loop_config=self._config,
                torch_config=TorchConfig(backend="nccl" if self._request.device == "cuda" else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=demand.world_size,
                    use_gpu=bool(demand.gpus),
                    resources_per_worker=demand.per_worker(),
                ),
                run_config=RunConfig(
                    name=self._request.name,
                    storage_path=self._storage,
                    failure_config=FailureConfig(  # Ray's own defaults for the last two are: again, without end
                        max_failures=0,
                        controller_failure_limit=0,  # type: ignore[call-arg] # mypy reads Train V1's class
                        max_preemption_failures=0,
                    ),
                    worker_runtime_env={"env_vars": worker_environment(demand.threads)},
                ),
            ).fit()
        except BaseException as error:  # noqa: BLE001 - the main thread looks at it
            self.error = error


class WorkerGroupRun:
    """One run's driver loop."""

    def __init__(
        self,
        session: Session,
        request: Request,
        plan: RunPlan,
        sink: MetricSink,
        stop: StopPoll,
        body: Body | None,
    ) -> None:
        self._session = session
        self._sink = sink
        self._stop = stop
        self._world_size = request.demand.world_size
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        environment = {} if session.is_local else {"env_vars": {"PYTHONPATH": worker_environment(1)["PYTHONPATH"]}}
        monitor_class = ray.remote(RunMonitor).options(num_cpus=0, scheduling_strategy=here, runtime_env=environment)
        self._monitor: Any = monitor_class.remote()
        server = _chunk_server(session, request, plan, sink, here, environment)
        config = {"body": body, "plan": plan.to_plain(), "monitor": self._monitor, "chunk_server": server}
        self._fit = _Fit(request, config, str(session.folder / "train"))
        self._seen = 0
        self._asked = False
        self._news = StatusUpdate()

    def run(self) -> RunResult:
        """Pass news on until the worker group has ended, then say how."""
        self._fit.start()
        deadline_s: float | None = None
        while self._fit.is_alive() and (deadline_s is None or time.monotonic() < deadline_s):
            self._pass_on()
            ended = bool(self._news.failures) or len(self._news.finished) == self._world_size
            if ended and deadline_s is None:
                deadline_s = time.monotonic() + END_WAIT_S
            self._fit.join(POLL_INTERVAL_S)
        self._pass_on()
        return self._conclude()

    def _pass_on(self) -> None:
        """Ask for a stop if there is one, and hand new records to the display."""
        reason = None if self._asked else self._stop()
        if reason is not None:
            self._asked = True
            self._ask_stop(reason)
        try:
            self._news = ray.get(self._monitor.take.remote(self._seen), timeout=HUB_TIMEOUT_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise WorkerCrash(
                Fault("the channel to the workers", f"does not answer ({type(error).__name__})", RESUME_HINT),
                self._logs(),
            ) from error
        for record in self._news.records:
            self._sink.write(record)
        self._seen += len(self._news.records)

    def _ask_stop(self, reason: StopReason) -> None:
        if not ray.get(self._monitor.ask_stop.remote(reason), timeout=HUB_TIMEOUT_S):
            raise StoppedBeforeStart(reason)

    def _conclude(self) -> RunResult:
        reports, lost = list(self._news.failures), {}
        for rank, error in self._unreported().items():
            if type(error).__module__.partition(".")[0] == "ray":  # Ray's own words: the process is gone
                lost[rank] = death_in_words(str(error))
            else:  # it failed around the body: the body's package cannot be loaded there, for example
                reports.append(Failure.of(rank, error))
        failed = first_cause(reports, lost, self._logs(lost))
        if failed is not None:
            raise failed
        if self._news.outcome is None or len(self._news.finished) < self._world_size:
            raise self._without_result()
        return self._news.outcome

    def _without_result(self) -> HrmRayError:
        """Ray Train itself gave up: because the workers found no room after all, or for reasons of its own."""
        from ray.train import ControllerError

        error = self._fit.error
        cause = error.controller_failure if isinstance(error, ControllerError) else error
        if type(cause).__name__ == "WorkerGroupStartupTimeoutError":  # a private class of Ray Train
            return ResourceError(
                Fault(
                    f"world_size {self._world_size}",
                    f"the workers found no room on {self._session.where} in time; others may have taken it meanwhile",
                    "Wait until it is free (`ray status` shows who uses it) or use fewer workers",
                )
            )
        fault = Fault("Ray Train", f"ended without a result ({type(cause).__name__})", RESUME_HINT)
        return WorkerCrash(fault, f"{error}\n{self._logs()}")

    def _unreported(self) -> dict[int, BaseException]:
        """What Ray Train says of ranks that did not fail in the body, by rank."""
        from ray.train import WorkerGroupError

        from hrm_ray.orchestration.worker import WorkerEnded

        if not isinstance(self._fit.error, WorkerGroupError):
            return {}
        failures = self._fit.error.worker_failures
        return {rank: error for rank, error in failures.items() if not isinstance(error, WorkerEnded)}

    def _logs(self, lost: Collection[int] = ()) -> str:
        """Where the workers' output is; with the last lines of the lost ones where they can be read."""
        if not self._session.is_local:
            places = ", ".join(f"rank {p.rank} on {p.node_ip} pid {p.pid}" for p in self._news.workers.values())
            return f"Output of the workers: in the logs of the Ray session on each node ({places})."
        parts = [f"Logs of the workers: {self._session.folder / 'session_latest' / 'logs'}"]
        for rank in sorted(set(lost) & set(self._news.workers)):
            tail = self._session.stderr_tail(self._news.workers[rank].pid)
            if tail:
                parts.append(f"Last lines of worker {rank}'s error stream:\n{tail}")
        return "\n".join(parts)
