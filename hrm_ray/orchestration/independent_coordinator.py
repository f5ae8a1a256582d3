"""The coordinator of a run of independent trainers as an actor, which has the bundle's files, and what it holds of the
actors that it starts (independent_actors)."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hrm_ray.errors import Fault, HostMemoryError, HrmRayError
from hrm_ray.independent.bundle_files import FileServer
from hrm_ray.independent.calls import Coordinator
from hrm_ray.independent.sent_rows import RowServer
from hrm_ray.independent.wire import Disconnected, answered, expected, methods_of, packed, unpacked, value_of
from hrm_ray.launch.independent_run import run_with
from hrm_ray.launch.restarts import NodeLostError
from hrm_ray.orchestration.failures import MEMORY_DEATH, NODE_DEATH, death_reason
from hrm_ray.orchestration.hang_watch import kill_worker
from hrm_ray.orchestration.independent_actors import ActorTask, KeeperActor, Packed, TrainerActor
from hrm_ray.orchestration.run_monitor import WorkerInfo
from hrm_ray.orchestration.session import worker_environment
from hrm_ray.orchestration.session_folder import remove_abandoned_folders
from hrm_ray.rundir import RunDir
from hrm_ray.train.plan import RunPlan, as_restarted
from hrm_ray.types import Record, RunResult, StopReason, StopRequested

POLL_S = 0.05
"""Seconds between two looks while an answer is waited for."""
START_S = 600.0
"""The keeper of anchors must be there within that time; it imports PyTorch, on a busy machine."""
SILENT_S = 60.0
"""A keeper whose process does not answer for so long is ended, and started again. Merges answer meanwhile."""
PING_EVERY_S = 1.0
CLEAN_UP_S = 10.0
"""How long the machines of a run may take to remove what ended trainers have left there."""


class ActorTrainer:
    """A trainer's actor (independent.workers.TrainerHandle)."""

    def __init__(self, name: str, number: int, actor: Any, kind: str = "cpu") -> None:
        """`kind`: of its device."""
        self.name, self.number, self.actor, self._kind = name, number, actor, kind
        self.started = actor.worker_info.remote()
        """Answered when its process is there, before it imports anything large."""
        actor.load.remote()
        self.failure: HrmRayError | None = None
        self._training: Any = None
        self._ended: int | None = None
        self._killed = False
        self.killing: Any = None
        """The call that ends its process on another node."""

    @property
    def identity(self) -> Hashable:
        """Another one when it is started again."""
        return self.actor._actor_id.hex()

    @property
    def device(self) -> str:
        """See TrainerHandle: Ray chooses which GPU of the node."""
        process = self.info
        return self._kind if process is None else f"{self._kind} of node {process.node_ip}"

    @property
    def placed(self) -> bool:
        """Whether its process was started; without room on the cluster it is not."""
        return bool(ray.wait([self.started], timeout=0)[0])

    @property
    def served(self) -> bool:
        """Whether it was told to begin."""
        return self._training is not None

    def serve(self) -> None:
        """Let it begin."""
        self._training = self.actor.train.remote()

    @property
    def code(self) -> int | None:
        """0 where it has left in order, 1 after an error that it told, -9 where its process is gone; None while it
        lives."""
        waited = self._training if self._training is not None else self.started
        if self._killed:
            self._ended = -9
        elif self._ended is None and ray.wait([waited], timeout=0)[0]:
            try:
                told: Packed | None = ray.get(waited) if self.served else None
            except ray.exceptions.RayError as error:
                self._ended = -9
                self.failure = _death(self.name, death_reason(str(error)))
            else:
                self.failure = None if told is None else unpacked(told)
                self._ended = None if not self.served else 0 if told is None else 1
        return self._ended

    @property
    def info(self) -> WorkerInfo | None:
        """Its process; None where it is not there yet."""
        if not ray.wait([self.started], timeout=0)[0]:
            return None
        try:
            found: WorkerInfo = ray.get(self.started)
        except ray.exceptions.RayError:
            return None
        return found

    def kill(self) -> None:
        """End it at once, also where it is stopped and answers nothing."""
        self._killed = True
        process = self.info
        with suppress(ray.exceptions.RayError):
            ray.kill(self.actor)
        if process is None:
            return
        if process.node_id == ray.get_runtime_context().get_node_id():
            kill_worker(process)
            return
        there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
        environment = {"env_vars": worker_environment(1)}
        killed = ray.remote(kill_worker).options(
            num_cpus=0, max_retries=0, scheduling_strategy=there, runtime_env=environment
        )
        self.killing = killed.remote(process)  # not waited for: the machine may be gone


def _death(name: str, reason: str) -> HrmRayError | None:
    """What is known of a lost process beyond that it was killed."""
    if MEMORY_DEATH in reason:
        hint = "Use a smaller --batch-size or fewer workers"
        return HostMemoryError(Fault(name, "was killed because its machine was nearly out of memory", hint))
    if NODE_DEATH in reason:
        return NodeLostError(Fault(name, "its machine is lost", "See whether it is there"))
    return None


class _Silence:
    """How long the keeper's process has not answered, while a call of it is waited for."""

    def __init__(self, keeper: Any, started: Any) -> None:
        """`started` is answered by a keeper that has started."""
        self._keeper, self._started = keeper, started
        self._asked = keeper.ping.remote()
        self._since_s = time.monotonic()

    def too_long(self) -> bool:
        """Whether it must be ended. Called far more often than once in SILENT_S."""
        now_s = time.monotonic()
        if ray.wait([self._asked], timeout=0)[0]:
            if now_s - self._since_s >= PING_EVERY_S:
                self._asked, self._since_s = self._keeper.ping.remote(), now_s
            return False
        longest_s = SILENT_S if ray.wait([self._started], timeout=0)[0] else START_S
        return now_s - self._since_s >= longest_s


class ActorWorkers:
    """independent.workers.Workers: trainers and keeper are actors of the coordinator's process."""

    def __init__(self, task: ActorTask, files: FileServer, rows: RowServer, plan: RunPlan) -> None:
        self._task, self._plan = replace(task, plan=plan.to_plain()), plan
        context = ray.get_runtime_context()
        self._coordinator, self._node = context.current_actor, context.get_node_id()
        self._handles: dict[str, ActorTrainer] = {}
        self._keeper: Any = None
        self._keeper_started: Any = None
        self._rows = rows
        self._other_nodes: set[str] = set()
        self.methods: dict[str, Callable[..., Any]] = {**files.methods, **rows.methods}
        """The calls that trainers may make."""

    @property
    def trainers(self) -> Mapping[str, ActorTrainer]:
        """See Workers."""
        return self._handles

    @property
    def processes(self) -> list[WorkerInfo]:
        """Those of all actors that are there."""
        found = [handle.info for handle in list(self._handles.values())]
        started = self._keeper_started
        if started is not None and ray.wait([started], timeout=0)[0]:
            with suppress(ray.exceptions.RayError):
                found.append(ray.get(started))
        return [each for each in found if each is not None]

    def answer_call(self, caller: str, method: str, arguments: Sequence[Any]) -> tuple[str, Any]:
        """A call of the trainer whose actor is `caller`; one that was given up, and has a successor, is refused."""
        if caller not in {handle.identity for handle in list(self._handles.values())}:
            return "error", packed(HrmRayError(Fault(f"actor {caller[:8]}", "is no trainer of this run any more", "")))
        return answered(self.methods, method, arguments)

    def start_trainer(self, name: str, number: int) -> None:
        """See Workers."""
        gpus = self._plan.settings.cluster.gpus_per_worker if self._plan.device == "cuda" else 0
        actor = ray.remote(TrainerActor).options(
            num_cpus=self._plan.threads,
            num_gpus=gpus,
            scheduling_strategy="SPREAD",
            max_restarts=0,
            runtime_env=self._task.environment(self._plan.threads),
        )
        self._handles[name] = ActorTrainer(
            name,
            number,
            actor.remote(self._task, name, number, self._coordinator, self._node),
            self._plan.device,
        )

    def serve(self, coordinator: Coordinator) -> None:
        """See Workers."""
        self.methods.update(methods_of(coordinator))
        for handle in self._handles.values():
            if not handle.served:
                handle.serve()

    def take_ended(self) -> list[ActorTrainer]:
        """See Workers."""
        ended = [handle for handle in self._handles.values() if handle.code is not None]
        for handle in ended:
            del self._handles[handle.name]
            self._forget(handle)
        return ended

    def end(self, child: ActorTrainer) -> None:
        """See Workers."""
        child.kill()
        self._handles.pop(child.name, None)
        self._forget(child)

    def call_keeper(self, name: str, call: str, arguments: Sequence[Any], meanwhile: Callable[[], None]) -> Any:
        """See Workers."""
        if self._keeper is None:
            here = NodeAffinitySchedulingStrategy(self._node, soft=False)
            actor = ray.remote(KeeperActor).options(
                num_cpus=0,
                scheduling_strategy=here,
                max_restarts=0,
                max_concurrency=2,
                runtime_env=self._task.environment(self._plan.threads),
            )
            self._keeper = actor.remote(self._task)
            self._keeper_started = self._keeper.worker_info.remote()
        asked, silence = self._keeper.call.remote(call, tuple(arguments)), _Silence(self._keeper, self._keeper_started)
        try:
            while not ray.wait([asked], timeout=POLL_S)[0]:
                meanwhile()
                if silence.too_long():
                    self._end_keeper()
                    raise Disconnected
            return value_of(ray.get(asked))
        except ray.exceptions.RayError as error:
            self._end_keeper()
            raise Disconnected from error

    def close(self) -> None:
        """See Workers."""
        left = list(self._handles.values())
        for handle in left:
            self.end(handle)
        self._end_keeper()
        killing = [handle.killing for handle in left if handle.killing is not None]
        if killing:
            ray.wait(killing, num_returns=len(killing), timeout=CLEAN_UP_S)
        self._rows.close()
        self._remove_left_folders()

    def _end_keeper(self) -> None:
        keeper, started = self._keeper, self._keeper_started
        self._keeper = self._keeper_started = None
        if keeper is not None:
            with suppress(ray.exceptions.RayError):
                ray.kill(keeper)
                if ray.wait([started], timeout=0)[0]:
                    kill_worker(ray.get(started))  # also where it is stopped

    def _forget(self, handle: ActorTrainer) -> None:
        process = handle.info
        if process is not None and process.node_id != self._node:
            self._other_nodes.add(process.node_id)
        with suppress(ray.exceptions.RayError):
            ray.kill(handle.actor)  # it has ended its work, and still holds its CPUs

    def _remove_left_folders(self) -> None:
        """Trainers that were killed have left their folders on other machines."""
        tasks = [
            ray.remote(_remove_left_folders)
            .options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                runtime_env=self._task.environment(1),
            )
            .remote()
            for node in self._other_nodes
        ]
        if tasks:
            ray.wait(tasks, num_returns=len(tasks), timeout=CLEAN_UP_S)


def _remove_left_folders() -> None:
    remove_abandoned_folders(Path(tempfile.gettempdir()))


@dataclass(frozen=True)
class CoordinatorStatus:
    """What the coordinator has to tell the driver: records since the last call, whether the files of the run are open,
    and the processes of trainers and keeper."""

    records: tuple[Record, ...]
    begun: bool
    workers: tuple[WorkerInfo, ...]


@dataclass(frozen=True)
class Ended:
    """How a run ended in the coordinator: with a result, with an error, or with a stop before there was anything to
    save."""

    result: RunResult | None = None
    error: Packed | None = None
    stopped: StopReason | None = None


class CoordinatorActor:
    """The process that owns the ledger and the bundle's files, on the driver's node; several threads serve its
    calls."""

    def __init__(self, task: ActorTask) -> None:
        self._task = task
        self._records: list[Record] = []
        self._lock = threading.Lock()
        self._stop: StopReason | None = None
        self._begun = False
        self._workers: ActorWorkers | None = None

    def worker_info(self) -> WorkerInfo:
        """This process."""
        return WorkerInfo.here(-2)

    def run(self) -> Ended:
        """Train to the end."""
        try:
            plan = RunPlan.from_plain(self._task.plan)
            run_dir = RunDir(plan.bundle)
            if plan.attempt:
                plan = as_restarted(plan, run_dir)
            start = partial(self._start_workers, FileServer(run_dir), RowServer(plan))
            return Ended(run_with(start, plan, sink=self, stop=lambda: self._stop, begun=self._begin))
        except StopRequested as stopped:
            return Ended(stopped=stopped.reason)
        except Exception as error:  # noqa: BLE001 - the actor's edge: the driver reports it
            return Ended(error=packed(expected(error)))

    def answer_call(self, caller: str, method: str, arguments: Sequence[Any]) -> tuple[str, Any]:
        """A call of a trainer."""
        if self._workers is None:
            raise RuntimeError("trainers are started by the run")
        return self._workers.answer_call(caller, method, arguments)

    def take_status(self) -> CoordinatorStatus:
        """What is new since the last call."""
        with self._lock:
            records, self._records = tuple(self._records), []
        workers = () if self._workers is None else tuple(self._workers.processes)
        return CoordinatorStatus(records, self._begun, workers)

    def ask_stop(self, reason: StopReason) -> None:
        """End the run in order."""
        self._stop = self._stop or reason

    def write(self, record: Record) -> None:
        """Keep a record for the driver (MetricSink)."""
        with self._lock:
            self._records.append(record)

    def close(self) -> None:
        """See MetricSink."""

    def _begin(self) -> None:
        self._begun = True

    def _start_workers(self, files: FileServer, rows: RowServer, plan: RunPlan) -> ActorWorkers:
        self._workers = ActorWorkers(self._task, files, rows, plan)
        return self._workers
