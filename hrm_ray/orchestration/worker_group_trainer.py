"""TorchTrainer without two of Ray Train's helper actors, which a run here does not use; its wait can be left.

Each helper is a Python process that starts while the workers do: without them a run on two cores begins about two
seconds earlier and ends one second earlier. Ray Train lists them in a private method; a version without this method
starts all of them. This module imports torch and ray.train, so import it late.
"""

from __future__ import annotations

import threading
from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

DATASETS = "DatasetsCallback"
"""Starts a manager of Ray Data shards, even without datasets."""
CLEANER = "PlacementGroupCleanerCallback"
"""Frees placement groups when the controller is killed; not needed where the cluster ends with the run."""
LOOK_EVERY_S = 0.5
"""Seconds between two looks whether the wait is to be left."""


class WorkerGroupTrainer(TorchTrainer):
    """A TorchTrainer; with `private_cluster` the cluster ends with the run. `leave` ends the wait in `fit`."""

    def __init__(self, *args: Any, private_cluster: bool, leave: threading.Event, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unused = (set() if self.datasets else {DATASETS}) | ({CLEANER} if private_cluster else set())
        self._leave = leave

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc] # mypy reads Train V1's class
        return [callback for callback in callbacks if type(callback).__name__ not in self._unused]

    def _initialize_and_run_controller(self, **options: Any) -> Result:
        """As Ray Train's own, which waits in `ray.get` without a limit: where the cluster is lost and Ray is shut down,
        such a thread takes a core until the process ends."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        environment = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **get_env_vars_to_propagate()}
        where: dict[str, Any] = {"scheduling_strategy": here, "runtime_env": {"env_vars": environment}}
        controller: Any = ray.remote(TrainController).options(num_cpus=0, **where).remote(**options)
        self._result_of(controller.run.remote())
        result: Result = self._result_of(controller.get_result.remote())
        return result

    def _result_of(self, call: Any) -> Any:
        while not ray.wait([call], timeout=LOOK_EVERY_S)[0]:
            if self._leave.is_set():
                raise RuntimeError("the attempt has ended without its controller")
        return ray.get(call)
