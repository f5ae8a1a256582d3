"""Settings of the machines: launcher, workers, devices.

One job: the leaves of section `cluster`. Whether the devices are there is the preflight's question.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, field_validator

from hrm_ray.settings.base import Section, refusal

Launcher: TypeAlias = Literal["local", "ray"]
Device: TypeAlias = Literal["auto", "cpu", "cuda", "xpu", "mps"]


class ClusterSettings(Section):
    """Where the run takes place."""

    launcher: Launcher | None = None
    """local: in this process; ray: through Ray Train (if not said: local for one device without a cluster)."""
    world_size: int | None = Field(default=None, ge=1)
    """Workers that train together (if not said: one per visible GPU, else one on the CPU)."""
    ddp: bool | None = None
    """Average the gradients of the workers once per weight update (if not said: on with several workers)."""
    ray_address: str | None = None
    """Address of a running Ray cluster; without it one is started on this machine for the run."""
    device: Device = "auto"
    """Kind of device to train on; auto takes the best there is."""
    cuda_ids: str | None = None
    """Numbers of the GPUs to use, with commas between them: "0,1"."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each worker (if not said: the CPUs of the machine shared among its workers)."""
    strict: bool = False
    """Make every fallback an error."""

    @field_validator("cuda_ids")
    @classmethod
    def _device_numbers(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise refusal("is not a list of GPU numbers", "Give numbers with commas between them, such as 0,1")
        numbers = [int(part) for part in parts]
        if len(set(numbers)) != len(numbers):
            raise refusal("names a GPU twice", "Name each GPU once")
        return ",".join(str(number) for number in numbers)

    @property
    def cuda_numbers(self) -> tuple[int, ...]:
        """The GPU numbers of `cuda_ids`; empty where none were named."""
        return () if self.cuda_ids is None else tuple(int(part) for part in self.cuda_ids.split(","))
