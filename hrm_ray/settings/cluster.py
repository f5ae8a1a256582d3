"""Settings of the machines: launcher, workers and devices."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import field_validator, model_validator

from hrm_ray.settings.base import Section, option, refusal
from hrm_ray.settings.duration import seconds_of
from hrm_ray.settings.needs import MERGED, OUTER_STEP

Launcher: TypeAlias = Literal["local", "ray", "subprocess"]
StrategyName: TypeAlias = Literal["single", "ddp", "sharded-optimizer", "zero1", "zero2", "zero3", "fsdp"]


def strategy_of_ddp(ddp: Any) -> Any:
    """The `strategy` for a value of `ddp`, a setting of version 0.1. An invalid value is kept, and refused later."""
    return {"True": "ddp", "False": "single"}.get(str(ddp), ddp)


SHORTEST_HANG_S = 5
"""Heartbeats come once a second."""


class ClusterSettings(Section):
    """Launcher, workers and devices."""

    launcher: Launcher | None = option(
        None, "free", replaces_stored=("cluster.strategy",), unset="local for one device without a cluster"
    )
    """local: in this process; ray: through Ray Train, and trainers of --parallel-independent as Ray actors; subprocess:
    those in processes of this machine, without Ray, which is their default without --ray-address."""
    world_size: int | None = option(None, "free", ge=1, unset="one per GPU of this machine or cluster, else one")
    """Number of workers that train together."""
    strategy: StrategyName | None = option(
        None,
        "free",
        aliases={"--ddp": "ddp", "--no-ddp": "single", "--zero-stage": None},
        replaces_stored=("cluster.parallel_independent", "cluster.trainer_batch_sizes"),
        unset="ddp for several workers, else single",
    )
    """How several workers train together. single: one worker. ddp: every worker has the whole model, and gradients are
    averaged once per weight update. sharded-optimizer: as ddp, with the optimizer state and the moving average divided
    among the workers. zero1, zero2, zero3: DeepSpeed ZeRO (Linux), which divides the optimizer state; the gradients
    too; the weights too. fsdp: PyTorch's FSDP2, which divides as zero3 does, without experts. The numbers are those of
    ddp, and a run can be resumed under another strategy. docs/memory.md says which to take."""
    parallel_independent: bool = option(False, "free", replaces_stored=("cluster.strategy",))
    """Train in --world-size trainers that share no step: each trains ranges of the data on its own, and their changes
    are merged every so many weight updates. For devices of unequal speed, and where workers cannot be connected. A run
    can change between this and a strategy when it is resumed."""
    merge_every: str = option("auto", "free", needs=(MERGED,))
    """Weight updates of a trainer between two merges. auto: as few as keep merging below 3 % of the time (8 to 500);
    end: once, at the end, which is much worse than one trainer alone."""
    outer_optimizer: Literal["nesterov", "none", "diloco"] = option("nesterov", "free", needs=(MERGED,))
    """What is done with the mean of the trainers' changes. none: it is added; nesterov: with momentum 0.3; diloco: rate
    0.7 and momentum 0.9, for long runs."""
    outer_lr: float | None = option(
        None, "free", gt=0, needs=(MERGED, OUTER_STEP), unset="1 for nesterov, 0.7 for diloco"
    )
    """Factor of each merge."""
    outer_momentum: float | None = option(
        None, "free", ge=0, lt=1, needs=(MERGED, OUTER_STEP), unset="0.3 for nesterov, 0.9 for diloco"
    )
    """Nesterov momentum of the merges."""
    merge_weights: Literal["samples", "equal"] = option("samples", "free", needs=(MERGED,))
    """How much each trainer's change counts in a merge: by the samples that it was trained on, or all alike."""
    trainer_batch_sizes: str | None = option(
        None, "free", affects=("memory",), needs=(MERGED,), unset="--batch-size for each trainer"
    )
    """The --batch-size of each trainer, for devices of unequal memory or speed: 16,8 (--batch-size 16,8 says the same).
    The largest is the unit of steps."""
    gpu_share: float | None = option(None, "free", gt=0, le=1, needs=(MERGED,), unset="1: a GPU for each trainer")
    """Part of a GPU that each trainer takes: with 0.5 two share one, also in its memory."""
    min_workers: int | None = option(None, "free", ge=1, unset="as many as --world-size")
    """Fewest workers to go on with where some are lost and nothing takes their place. The effective batch stays the
    same: fewer workers take more rows each."""
    max_workers: int | None = option(None, "free", ge=1, unset="as many as --world-size")
    """Most workers to use where the cluster has room for more: they join at the next checkpoint. The effective batch
    stays the same."""
    ray_address: str | None = option(None, "free", unset="a cluster started on this machine for the run")
    """Address of a running Ray cluster."""
    wait_for_resources: str | None = option(None, "dropped", unset="10 s for a cluster in use")
    """Wait at most this long (as 90s, 30m, 1h30m or 1:30:00) while the cluster is too small or in use by others."""
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = option("auto", "free", affects=("memory",))
    """Device type to train on; auto takes the best one available."""
    cuda_ids: str | None = option(None, "free", unset="all visible GPUs")
    """Numbers of the GPUs to use, separated by commas: "0,1"."""
    threads: int | None = option(None, "free", ge=1, unset="the machine's CPUs divided among its workers")
    """CPU threads of each worker."""
    compile: bool | None = option(None, "free", unset="on for CUDA with Triton and a C compiler")
    """Compile the blocks with torch.compile: faster steps, a slower first step. Compiled code is kept for later runs in
    the folder of TORCHINDUCTOR_CACHE_DIR."""
    max_failures: int = option(3, "free", ge=0)
    """How often a run goes on by itself after a failure, from its newest checkpoint: a lost worker or machine, a full
    disk. Wrong settings or data and losses that are not finite end it at once, and so does a second failure at one
    step. Restarts with smaller micro-batches after out of memory are not counted. 0: never."""
    hang_after: str | None = option(None, "free", unset="120 s or 20 steps, whichever is longer")
    """End Ray workers that make no progress for this long (90s, 30m, 1h30m; a number alone is seconds), and write the
    stacks of all ranks to stacks.txt in the bundle. The first step, evaluations, checkpoints and waits for data may
    take longer. A warning names the rank before, after 30 s or 10 steps. A local run is warned of, and not ended. Under
    --parallel-independent the trainer is ended and started again, by default after 600 s."""
    strict: bool = option(False, "free")
    """Treat fallbacks, and options that have no effect, as errors."""

    @model_validator(mode="before")
    @classmethod
    def _strategy_of_ddp(cls, leaves: Any) -> Any:
        """Settings of version 0.1 have `ddp` (true, false or null) in place of `strategy`."""
        if not isinstance(leaves, dict) or "ddp" not in leaves:
            return leaves
        return {"strategy": strategy_of_ddp(leaves["ddp"]), **{key: leaves[key] for key in leaves if key != "ddp"}}

    @field_validator("strategy", mode="before")
    @classmethod
    def _no_stage(cls, value: Any) -> Any:
        """`--zero-stage none` is the default."""
        return None if value == "none" else value

    @field_validator("hang_after")
    @classmethod
    def _long_enough(cls, value: str | None) -> str | None:
        if value is None:
            return None
        seconds = seconds_of(value)
        if seconds is None:
            raise refusal("is not a duration", "Give one like 90s, 30m or 1h30m")
        if seconds < SHORTEST_HANG_S:
            raise refusal("is too short to tell a hang from a slow step", f"Give {SHORTEST_HANG_S}s or more")
        return value

    @field_validator("merge_every")
    @classmethod
    def _auto_end_or_number(cls, value: str) -> str:
        if value in ("auto", "end") or (value.isascii() and value.isdigit() and int(value) > 0):
            return value
        raise refusal("is no number of weight updates", "Give auto, end, or a number such as 50")

    @field_validator("wait_for_resources")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None and seconds_of(value) is None:
            raise refusal("is not a duration", "Give one like 90s, 30m, 1h30m or 1:30:00")
        return value

    @field_validator("trainer_batch_sizes")
    @classmethod
    def _sizes(cls, value: str | None) -> str | None:
        if value is not None and not all(part.strip().isdecimal() and int(part) for part in value.split(",")):
            raise refusal("is not a list of batch sizes", "Give a number for each trainer, such as 16,8")
        return value

    @property
    def batch_size_of_trainers(self) -> tuple[int, ...]:
        """The batch size of each independent trainer; empty where all have the same."""
        listed = self.trainer_batch_sizes
        return () if listed is None else tuple(int(part) for part in listed.split(","))

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
    def hang_after_s(self) -> int | None:
        """The seconds of --hang-after."""
        return None if self.hang_after is None else seconds_of(self.hang_after)

    @property
    def gpus_per_worker(self) -> float:
        """GPUs of each worker, where it trains on GPUs."""
        return self.gpu_share if self.gpu_share and self.parallel_independent else 1.0

    def strategy_for(self, world_size: int) -> StrategyName:
        """The strategy for `world_size` workers."""
        return self.strategy or ("ddp" if world_size > 1 else "single")

    @property
    def wait_s(self) -> int | None:
        """The seconds of --wait-for-resources."""
        return None if self.wait_for_resources is None else seconds_of(self.wait_for_resources)

    @property
    def cuda_numbers(self) -> tuple[int, ...]:
        """The GPU numbers of `cuda_ids`; empty where none were named, or --device is not CUDA."""
        if self.cuda_ids is None or self.device not in ("auto", "cuda"):
            return ()
        return tuple(int(part) for part in self.cuda_ids.split(","))
