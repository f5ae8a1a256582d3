"""What a run of independent trainers asks of its launcher: processes of the trainers, and of the keeper of anchors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

from hrm_ray.errors import HrmRayError
from hrm_ray.independent.calls import Coordinator


class TrainerHandle(Protocol):
    """A trainer that was started: its name, its number among the trainers, and what it said about its failure."""

    @property
    def name(self) -> str: ...

    @property
    def number(self) -> int: ...

    @property
    def device(self) -> str:
        """What it trains on, for people."""

    @property
    def failure(self) -> HrmRayError | None: ...

    @property
    def code(self) -> int | None:
        """Its exit code; None while it lives."""

    @property
    def identity(self) -> Hashable:
        """Another one when it is started again."""

    @property
    def placed(self) -> bool:
        """Whether its process was started; on a cluster without room for it, it is not."""

    def kill(self) -> None:
        """End it at once, whatever it does; `Workers.take_ended` gives it when it has ended."""


class Workers(Protocol):
    """The trainers and the keeper of anchors, as a launcher starts them. Closing ends those that are left."""

    @property
    def trainers(self) -> Mapping[str, TrainerHandle]:
        """The trainers whose end was not taken yet."""

    def start_trainer(self, name: str, number: int) -> None:
        """Start a trainer, which loads its libraries and waits until it is served."""

    def serve(self, coordinator: Coordinator) -> None:
        """Let the trainers that were started since the last call begin; their calls go to `coordinator`."""

    def take_ended(self) -> Sequence[TrainerHandle]:
        """The trainers that have ended since the last call, with all that they had said taken in."""

    def end(self, child: Any) -> None:
        """End a trainer, and forget it."""

    def call_keeper(self, name: str, call: str, arguments: Sequence[Any], meanwhile: Callable[[], None]) -> Any:
        """Call the keeper of anchors, started where there is none; `meanwhile` is called while it works.

        Raises Disconnected where it ends, and the error that it answers with.
        """

    def close(self) -> None:
        """End all."""
