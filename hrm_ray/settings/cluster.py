"""Settings of the machines: launcher, workers and devices."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import field_validator

from hrm_ray.settings.base import Section, option, refusal

Launcher: TypeAlias = Literal["local", "ray"]
Device: TypeAlias = Literal["auto", "cpu", "cuda", "xpu", "mps"]


class ClusterSettings(Section):
    """Where the run takes place."""

    launcher: Launcher | None = option(
        None, "free", replaces_stored=("cluster.ddp",), unset="local for one device without a cluster"
    )
    """local: in this process; ray: through Ray Train."""
    world_size: int | None = option(None, "free", ge=1, unset="one per visible GPU, else one")
    """Number of workers that train together."""
    ddp: bool | None = option(None, "free", unset="on with several workers")
    """Average the gradients of the workers once per weight update."""
    ray_address: str | None = option(None, "free", unset="a cluster started on this machine for the run")
    """Address of a running Ray cluster."""
    device: Device = option("auto", "free", affects=("memory",))
    """Device type to train on; auto takes the best one available."""
    cuda_ids: str | None = option(None, "free", unset="all visible GPUs")
    """Numbers of the GPUs to use, separated by commas: "0,1"."""
    threads: int | None = option(None, "free", ge=1, unset="the machine's CPUs divided among its workers")
    """CPU threads of each worker."""
    strict: bool = option(False, "free")
    """Treat every fallback as an error."""

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
