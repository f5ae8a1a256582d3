"""TorchTrainer without the helper actors that a run here has no use for.

One job: choose Ray Train's callbacks. Loads torch and ray.train, so it is imported late.

Each helper is a Python process that starts while the workers do; without these two a run on two cores begins about
two seconds earlier and ends one second earlier. Ray Train keeps the choice in a private method: should a later
version not have it, this class is plain TorchTrainer.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer

DATASETS = "DatasetsCallback"
"""Starts a manager of Ray Data shards even when there are no datasets."""
CLEANER = "PlacementGroupCleanerCallback"
"""Frees placement groups when the controller is killed; a cluster that ends with its run needs no such thing."""


class WorkerGroupTrainer(TorchTrainer):
    """A TorchTrainer for one worker group; `private_cluster` says that the cluster ends with the run."""

    def __init__(self, *args: Any, private_cluster: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        idle = set() if self.datasets else {DATASETS}
        self._idle = idle | ({CLEANER} if private_cluster else set())

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc] # mypy reads Train V1's class
        return [callback for callback in callbacks if type(callback).__name__ not in self._idle]
