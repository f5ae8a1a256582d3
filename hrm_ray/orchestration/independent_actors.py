"""The trainers of a run of independent trainers, and the process that keeps anchors, as actors.

They belong to the coordinator (independent_coordinator), and end when it does. This file imports no PyTorch: an actor
says that its process is there before it imports that, which can take minutes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from hrm_ray.errors import Fault, HrmRayError
from hrm_ray.independent.bundle_files import SentFiles
from hrm_ray.independent.sent_rows import sent_rows
from hrm_ray.independent.wire import Disconnected, RemoteCoordinator, answered, expected, packed, value_of
from hrm_ray.orchestration.run_monitor import WorkerInfo
from hrm_ray.orchestration.session import worker_environment
from hrm_ray.orchestration.session_folder import make_session_folder
from hrm_ray.train.plan import RunPlan

Packed = tuple[str, tuple[tuple[str, str, str], ...], str]
"""An error in plain values (wire.packed)."""


@dataclass(frozen=True)
class ActorTask:
    """What an actor is given: the plan in plain values, the file in the bundle by which it knows that it sees the
    bundle, and what that file holds."""

    plan: Mapping[str, Any]
    marker: str
    token: str

    def environment(self, threads: int) -> dict[str, Any]:
        """The runtime environment of an actor with so many threads."""
        return {"env_vars": worker_environment(threads)}

    def sees_bundle(self) -> bool:
        """Whether this machine has the bundle at its path."""
        try:
            return Path(self.marker).read_text(encoding="utf-8") == self.token
        except OSError:
            return False


class TrainerActor:
    """A trainer: a process on one device."""

    def __init__(self, task: ActorTask, name: str, number: int, coordinator: Any, coordinator_node: str) -> None:
        self._task, self._name, self._number = task, name, number
        self._coordinator, self._coordinator_node = coordinator, coordinator_node

    def worker_info(self) -> WorkerInfo:
        """This process."""
        return WorkerInfo.here(self._number)

    def load(self) -> None:
        """Import what training needs, while the coordinator prepares the run."""
        import hrm_ray.independent.assembly  # noqa: F401

    def train(self) -> Packed | None:
        """Train until the run ends; returns the error that ended it before."""
        from hrm_ray.independent.assembly import block_trainer

        folder: Path | None = None
        try:
            plan = RunPlan.from_plain(self._task.plan)
            coordinator = RemoteCoordinator(self._call)
            if ray.get_runtime_context().get_node_id() == self._coordinator_node:
                block_trainer(plan, self._name, self._number, coordinator).run()
                return None
            rows = sent_rows(plan, self._call)
            if self._task.sees_bundle():
                block_trainer(plan, self._name, self._number, coordinator, rows=rows).run()
                return None
            folder = make_session_folder(Path(tempfile.gettempdir()))
            files = SentFiles(folder, self._call)
            # A checkpoint's path would name a folder of this machine, if any.
            plan = replace(plan, bundle=folder, checkpoint=None)
            block_trainer(plan, self._name, self._number, coordinator, files, rows).run()
        except Disconnected:
            return packed(HrmRayError(Fault(self._name, "has lost its coordinator", "")))
        except Exception as error:  # noqa: BLE001 - the actor's edge: the coordinator reports it
            return packed(expected(error))
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def _call(self, method: str, *arguments: Any) -> Any:
        asked = self._coordinator.answer_call.remote(ray.get_runtime_context().get_actor_id(), method, arguments)
        try:
            # Not get: it spins for ever where the cluster is lost.
            while not ray.wait([asked], timeout=60.0)[0]:
                continue
            return value_of(ray.get(asked))
        except ray.exceptions.RayError as error:
            raise Disconnected from error


class KeeperActor:
    """The keeper of anchors, on the coordinator's machine."""

    def __init__(self, task: ActorTask) -> None:
        from hrm_ray.independent.anchor_keeper import AnchorKeeper

        plan = RunPlan.from_plain(task.plan)
        if plan.device == "cuda":
            import torch

            if not torch.cuda.is_available():  # the machine of the bundle need not have a GPU
                plan = replace(plan, device="cpu")
        self._keeper: AnchorKeeper | None = None
        self._make = partial(AnchorKeeper, plan)

    def worker_info(self) -> WorkerInfo:
        """This process."""
        return WorkerInfo.here(-1)

    def ping(self) -> None:
        """Answer, on another thread than that of the calls."""

    def call(self, method: str, arguments: Sequence[Any]) -> tuple[str, Any]:
        """A call of the keeper, which is made by the first one, so that its errors are answers too."""

        def called(*given: Any) -> Any:
            if self._keeper is None:
                self._keeper = self._make()
            return self._keeper.methods[method](*given)

        return answered({method: called}, method, arguments)
