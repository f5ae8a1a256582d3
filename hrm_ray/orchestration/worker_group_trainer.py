"""TorchTrainer without two of Ray Train's helper actors, which a run here does not use.

Each is a Python process that starts while the workers do: without them a run on two cores begins about two seconds
earlier and ends one second earlier. Ray Train lists them in a private method; a version without this method starts all
of them. This module imports torch and ray.train, so import it late.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer

DATASETS = "DatasetsCallback"
"""Starts a manager of Ray Data shards, even without datasets."""
CLEANER = "PlacementGroupCleanerCallback"
"""Frees placement groups when the controller is killed; not needed where the cluster ends with the run."""


class WorkerGroupTrainer(TorchTrainer):
    """A TorchTrainer; with `private_cluster` the cluster ends with the run."""

    def __init__(self, *args: Any, private_cluster: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unused = (set() if self.datasets else {DATASETS}) | ({CLEANER} if private_cluster else set())

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc] # mypy reads Train V1's class
        return [callback for callback in callbacks if type(callback).__name__ not in self._unused]
