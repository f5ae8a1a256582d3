"""The driver's side of a distributed run: starts Ray Train workers, and passes on records and stop requests until they
end.

How a run ends (launch/supervisor runs its attempts):
  * every rank returns: the RunResult of rank 0, whose reason may be a stop;
  * a rank raises, or dies without a report: the attempt has failed, and the next one begins in the same session, or
    the run ends with an error of the same kind with the same faults, or WorkerCrash (exit code 1) that names the rank;
  * an exception in the driver itself (a second Ctrl-C): everything is ended at once and it is raised again.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hrm_ray.bundle.folder_watch import missing
from hrm_ray.errors import DiskError, Fault, HrmRayError, NoRoomError, ResourceError, UnavailableError
from hrm_ray.launch.hangs import Timeouts
from hrm_ray.launch.resources import spare_cpus
from hrm_ray.launch.restarts import Cause, Ending
from hrm_ray.launch.supervisor import Failed, WatchedSink, supervise
from hrm_ray.orchestration.attempts import Attempts, reads_text, request_of
from hrm_ray.orchestration.chunk_server import ChunkServer
from hrm_ray.orchestration.cluster_look import cluster_nodes, node_reports
from hrm_ray.orchestration.cluster_room import StartTurn, reserve_cpus
from hrm_ray.orchestration.datasets import TASK_CPUS, ChunkTaskContext
from hrm_ray.orchestration.failures import (
    RESUME_HINT,
    Failure,
    WorkerCrash,
    actor_lost,
    cause_of,
    death_reason,
    first_cause,
    shortage,
)
from hrm_ray.orchestration.hang_watch import HangWatch, kill_worker, kill_workers
from hrm_ray.orchestration.run_monitor import RunMonitor, StatusUpdate
from hrm_ray.orchestration.session import (
    POLL_INTERVAL_S,
    Session,
    attached,
    worker_environment,
)
from hrm_ray.rundir import DRIVER_MARKER, RunDir
from hrm_ray.train.plan import RunPlan, TextData
from hrm_ray.types import MetricSink, Record, RunResult, StopPoll, StopReason, StopRequested

if TYPE_CHECKING:
    # It loads ray.train, and with it torch, which the session loads while the cluster starts.
    from hrm_ray.orchestration.worker import Body

__all__ = ["attached", "cluster_nodes", "node_reports", "run"]

GROWTH_POLL_S = 2.0
"""How often a run looks for room for more workers."""
END_WAIT_S = 15.0
"""How long Ray Train may take to notice that all ranks have ended, before the session is closed."""


def is_served(plan: RunPlan) -> bool:
    """Whether one process reads text for the workers: where it is tokenised while they train, and where several would
    each read all of the cache."""
    streams = isinstance(plan.data, TextData) and plan.data.text.chunking_config.streaming
    return reads_text(plan) or (streams and plan.world_size > 1)


def run(plan: RunPlan, *, sink: MetricSink, stop: StopPoll, body: Body | None = None) -> RunResult:
    """Train on the plan's number of Ray workers and return how it ended; after a failure again, as `launch/restarts`
    decides.

    Records of rank 0 reach `sink` in order and completely before this returns. `stop` is called several times a second.
    Each worker runs `body`: `train.session.train`, unless another is given. In a program that is connected to Ray
    already, the workers run on its cluster.

    Raises ResourceError or UnavailableError before anything has started, StopRequested, the error of the
    worker that failed first, or WorkerCrash.
    """
    attempts = Attempts(plan, stop, partial(WorkerGroupRun, body))
    keep_logs = False
    try:
        return supervise(plan, attempts.run, sink=sink, stop=stop, room=attempts.room)
    except (WorkerCrash, UnavailableError) as error:
        # Kept where the message names them: after a crash, and when the cluster did not start.
        keep_logs = isinstance(error, WorkerCrash) or not attempts.opened
        raise
    finally:
        attempts.close(keep_logs)


def _event(message: str, level: str = "WARNING", step: int = 0) -> Record:
    return Record("event", step, time.time(), {"message": message, "level": level})


class WorkerGroupRun:
    """One attempt of a worker group, as its driver."""

    def __init__(
        self,
        body: Body | None,
        session: Session,
        plan: RunPlan,
        sink: WatchedSink,
        stop: StopPoll,
        number: int,
        turn: StartTurn,
    ) -> None:
        """`turn` is closed once the workers have their resources."""
        self._session = session
        self._turn = turn
        self._data_cpus: PlacementGroup | None = None
        self._request = request_of(plan)
        self._plan = plan
        self._sink = sink
        self._stop = stop
        self._number = number
        # By it each worker knows that its node has this bundle, not another folder of the same name.
        self._token = secrets.token_hex(16)
        self._marker = plan.bundle / f"{DRIVER_MARKER}{secrets.token_hex(8)}"
        self._monitor: Any = self._on_this_node(RunMonitor).remote()
        self._config = {
            "body": body,
            "plan": plan.to_plain(),
            "marker": str(self._marker),
            "token": self._token,
            "monitor": self._monitor,
            "chunk_server": self._chunk_server(),
        }
        # In the main thread `fit` would install a SIGINT handler that kills the workers without a checkpoint; and the
        # command line's own handlers run in the main thread, which therefore never waits for long.
        self._fit = threading.Thread(target=self._run_fit, name="ray-train-fit", daemon=True)
        self._fit_error: BaseException | None = None
        self._leave_fit = threading.Event()
        self._stop_sent: StopReason | None = None
        self.has_more_room: Callable[[], bool] | None = None
        self._look_s = 0.0
        self._status = StatusUpdate()
        self._forced: HrmRayError | None = None
        hang_after_s = plan.settings.cluster.hang_after_s
        self._timeouts = Timeouts.of(hang_after_s)
        self._hang_watch = HangWatch(
            self._monitor, plan.world_size, RunDir(plan.bundle), hang_after_s, self._runtime_env(), self._report
        )

    def end(self, error: HrmRayError) -> None:
        """End this attempt with `error`, whatever its workers do: their processes are ended."""
        self._forced = self._forced or error

    def run(self) -> RunResult | Failed:
        """Pass on records and stop requests until the worker group has ended; return how.

        Nothing of the attempt lives on then. Raises StopRequested for a stop before a worker has begun.
        """
        try:
            result = self._run()
            if result.reason is StopReason.RESIZE:
                # The chunk server may still make a chunk ahead, while the next attempt's does.
                self._end_actors()
            return result
        except HrmRayError as error:
            self._end_actors()
            return self._failed(error)
        except BaseException:
            if self._session.attached:  # The program's cluster stays; any other ends with the session.
                self._end_actors()
            raise
        finally:
            self._leave_fit.set()
            if self._fit.ident is not None:
                self._fit.join(END_WAIT_S)  # No thread may wait for Ray when it is shut down.

    def _failed(self, error: HrmRayError) -> Failed:
        plan = self._plan
        batch_size = plan.settings.optimizer.batch_size
        step = self._sink.step
        with suppress(OSError):  # The disk may be what failed.
            # The last records may not have arrived.
            step = max([step, *RunDir(plan.bundle).checkpoint_steps()])
        ending = Ending(cause_of(error), error, step, plan.attempt, plan.world_size, batch_size)
        return Failed(ending, self._status.begun)

    def _end_actors(self) -> None:
        """End the attempt's actors and workers."""
        if self._session.lost():
            # They end with the cluster; what trains is ended now, so that it writes nothing into the bundle any more.
            for worker in self._status.workers.values():
                kill_worker(worker)
            return
        for actor in (self._monitor, self._config["chunk_server"]):
            if actor is not None:
                with suppress(ray.exceptions.RayError):
                    ray.kill(actor)
        # Without it workers that still live are killed; a killed controller leaves it behind.
        for group in [each.placement_group for each in self._status.workers.values() if each.placement_group][:1]:
            with suppress(ray.exceptions.RayError):
                remove_placement_group(group)
        if self._fit.ident is None:
            return  # It was not started.
        self._fit.join(END_WAIT_S)
        if self._fit.is_alive() and self._status.workers:
            # They wait for a rank that is gone, or are stopped.
            kill_workers(self._status.workers.values(), self._runtime_env())
            self._fit.join(END_WAIT_S)

    def _run(self) -> RunResult:
        try:
            try:
                self._marker.write_text(self._token, encoding="utf-8")
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise DiskError(missing(self._plan.bundle)) from error
                hint = "Check its free space and permissions"
                raise DiskError(Fault(str(self._plan.bundle), f"cannot be written ({error})", hint)) from error
            self._fit.start()
            deadline_s: float | None = None
            while self._fit.is_alive() and (deadline_s is None or time.monotonic() < deadline_s):
                self._update()
                if self._forced is not None or self._session.lost():
                    break
                ended = bool(self._status.failures) or len(self._status.finished) == self._request.world_size
                if ended and deadline_s is None:
                    deadline_s = time.monotonic() + END_WAIT_S
                hang = None if ended else self._hang_watch.look(self._status)
                if hang is not None:
                    self.end(hang)
                    break
                self._fit.join(POLL_INTERVAL_S)
            if self._session.lost():
                raise WorkerCrash(Fault("the Ray cluster", "is lost", RESUME_HINT), cause=Cause.CLUSTER_LOST)
            self._update()
            if self._forced is not None:
                raise self._forced
        finally:
            with suppress(OSError):
                self._marker.unlink(missing_ok=True)
            if self._data_cpus is not None:
                with suppress(ray.exceptions.RayError):
                    remove_placement_group(self._data_cpus)
        return self._conclude()

    def _report(self, level: str, message: str) -> None:
        step = max((beat.step for beat in self._status.heartbeats), default=0)
        self._sink.write(_event(message, level, step))

    def _on_this_node(self, actor: type[Any], **options: Any) -> Any:
        """An actor class whose actor takes no CPU and runs on the driver's node."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        environment = self._runtime_env()
        return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here, runtime_env=environment, **options)

    def _runtime_env(self) -> dict[str, Any]:
        """Of actors and tasks: a cluster that was there before has another PYTHONPATH than this program."""
        if self._session.private:
            return {}
        return {"env_vars": {"PYTHONPATH": worker_environment(1)["PYTHONPATH"]}}

    def _chunk_server(self) -> Any:
        """The actor that reads text for all ranks; None where each reads for itself, also because no CPU is free.

        Tasks that tokenise need CPUs beside the workers', or they would never start.
        """
        if not isinstance(self._plan.data, TextData) or not is_served(self._plan):
            return None
        if reads_text(self._plan) and not self._session.private and not self._reserve_data_cpus():
            reason = f"the cluster has less than {TASK_CPUS:g} CPU left besides those of the workers"
            if self._plan.settings.cluster.strict and self._number == 1:
                hint = "Free a CPU, or leave --strict out"
                raise ResourceError(Fault("--strict", f"no CPU for Ray Data: {reason}", hint))
            self._sink.write(_event(f"{reason}: each worker reads and tokenises all of the data"))
            return None
        world_size = self._request.world_size
        server = self._on_this_node(ChunkServer, max_concurrency=4 * world_size)
        context = ChunkTaskContext(self._plan.bundle, self._plan.data.text, self._marker.name, self._data_cpus)
        return server.remote(context, world_size)

    def _reserve_data_cpus(self) -> bool:
        """Whether CPUs for Ray Data are reserved beside the workers': one for each worker at most."""
        nodes = self._session.free_nodes()
        spare = spare_cpus(self._request, nodes, self._request.world_size)
        if spare:
            self._data_cpus = reserve_cpus([nodes[index] for index in spare])
        return self._data_cpus is not None

    def _run_fit(self) -> None:
        request = self._request
        try:
            # Imported here: torch takes seconds, and the session loads it while the cluster starts.
            from ray.train import FailureConfig, RunConfig, ScalingConfig
            from ray.train.torch import TorchConfig

            from hrm_ray.orchestration import worker
            from hrm_ray.orchestration.worker_group_trainer import WorkerGroupTrainer

            WorkerGroupTrainer(
                worker.main,
                private_cluster=self._session.private,
                leave=self._leave_fit,
                train_loop_config=self._config,
                torch_config=TorchConfig(
                    backend="nccl" if self._plan.device == "cuda" else "gloo",
                    timeout_s=int(self._timeouts.process_group_s),
                ),
                scaling_config=ScalingConfig(
                    num_workers=request.world_size,
                    use_gpu=bool(request.gpus),
                    resources_per_worker=request.per_worker(),
                ),
                run_config=RunConfig(
                    name=f"{self._plan.bundle.name}-{self._number}",  # Ray resumes a run of the same name
                    storage_path=str(self._session.folder / "train"),
                    failure_config=FailureConfig(  # by default the last two retry without end
                        max_failures=0,
                        controller_failure_limit=0,  # type: ignore[call-arg] # mypy reads Train V1's class
                        max_preemption_failures=0,
                    ),
                    worker_runtime_env={"env_vars": worker_environment(request.threads)},
                ),
            ).fit()
        except BaseException as error:  # noqa: BLE001 - the main thread reads it
            self._fit_error = error

    def _new_stop(self) -> StopReason | None:
        """What the workers are to be asked now."""
        if self._stop_sent not in (None, StopReason.RESIZE):
            return None
        reason = self._stop()
        # Before the workers train, what they take may still count as free.
        if reason is not None or self.has_more_room is None or self._stop_sent or not self._status.begun:
            return reason
        now_s = time.monotonic()
        if now_s < self._look_s:
            return None
        self._look_s = now_s + GROWTH_POLL_S
        return StopReason.RESIZE if self.has_more_room() else None

    def _update(self) -> None:
        """Send a stop request if there is one, and write new records to the sink."""
        reason = self._new_stop()
        try:
            if reason is not None:
                self._stop_sent = reason
                if not ray.get(self._monitor.ask_stop.remote(reason), timeout=self._timeouts.monitor_s):
                    raise StopRequested(reason)
            self._status = ray.get(self._monitor.take.remote(), timeout=self._timeouts.monitor_s)
        except ray.exceptions.RayError as error:
            silent_s = self._timeouts.monitor_s if isinstance(error, ray.exceptions.GetTimeoutError) else None
            lost = actor_lost("the actor that collects the workers' records", death_reason(str(error)), silent_s)
            raise shortage(error) or lost from error
        if len(self._status.workers) == self._request.world_size:
            self._turn.close()
        for record in self._status.records:
            self._sink.write(record)

    def _conclude(self) -> RunResult:
        reports, lost = list(self._status.failures), {}
        for rank, error in self._unreported().items():
            from_ray = type(error).__module__.partition(".")[0] == "ray"
            if from_ray and shortage(error) is None:  # the process is gone
                lost[rank] = death_reason(str(error))
            else:  # memory, or a failure around the body: its package cannot be imported there, for example
                reports.append(Failure.of(rank, error))
        failed = first_cause(reports, lost, self._logs(lost))
        if failed is not None:
            raise failed
        if self._status.result is None or len(self._status.finished) < self._request.world_size:
            raise self._without_result()
        return self._status.result

    def _without_result(self) -> HrmRayError:
        """The error where Ray Train itself gave up: the workers found no room after all, or another reason."""
        from ray.train import ControllerError

        error = self._fit_error
        cause = error.controller_failure if isinstance(error, ControllerError) else error
        if type(cause).__name__ == "WorkerGroupStartupTimeoutError":  # a private class of Ray Train
            reason = f"the workers found no room on {self._session.where} in time; another run may have taken it"
            hint = "Wait until it is free (`ray status` shows who uses it) or use fewer workers"
            return NoRoomError(Fault(f"--world-size {self._request.world_size}", reason, hint))
        if isinstance(cause, ray.exceptions.RayActorError):
            return shortage(cause) or actor_lost(
                "Ray Train's controller", f"{death_reason(str(cause))}\n{self._logs()}"
            )
        fault = Fault("Ray Train", f"ended without a result ({type(cause).__name__})", RESUME_HINT)
        crash = WorkerCrash(fault, f"{error}\n{self._logs()}")
        return crash if cause is None else shortage(cause) or crash

    def _unreported(self) -> dict[int, BaseException]:
        """Ray Train's errors of ranks that did not report one themselves, by rank."""
        from ray.train import WorkerGroupError

        from hrm_ray.orchestration.worker import WorkerEnded

        if not isinstance(self._fit_error, WorkerGroupError):
            return {}
        failures = self._fit_error.worker_failures
        return {rank: error for rank, error in failures.items() if not isinstance(error, WorkerEnded)}

    def _logs(self, lost: Collection[int] = ()) -> str:
        """Where the workers' output is, with the last lines of the `lost` ranks' where they can be read."""
        if not self._session.private:
            workers = self._status.workers.values()
            places = ", ".join(f"rank {worker.rank} on {worker.node_ip} pid {worker.pid}" for worker in workers)
            return f"Output of the workers: in the logs of the Ray session on each node ({places})."
        parts = [f"Logs of the workers: {self._session.folder / 'session_latest' / 'logs'}"]
        for rank in sorted(set(lost) & set(self._status.workers)):
            tail = self._session.stderr_tail(self._status.workers[rank].pid)
            if tail:
                parts.append(f"Last lines of worker {rank}'s stderr:\n{tail}")
        return "\n".join(parts)
