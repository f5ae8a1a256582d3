"""Searches the longest context and the largest micro-batch of a run that fit into memory, by trials of the run itself.

The effective batch stays: what a smaller micro-batch lacks is accumulated. Where the run does not fit as it is, options
that save memory are added, those that cost least speed first.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np

from hrm_ray.errors import Fault, ResourceError, SettingsError, UnavailableError
from hrm_ray.launch.devices import Devices, visible_gpus
from hrm_ray.launch.preflight import PROCESS_BYTES
from hrm_ray.launch.resolve import ResolvedRun
from hrm_ray.launch.resources import gigabytes
from hrm_ray.search.fitting import FIRST_RATIO, Outcome, largest_fit, next_trial
from hrm_ray.search.trial import Verdict
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.host_memory import available_memory_bytes
from hrm_ray.train.memory_estimate import memory_estimate

CONTEXTS = 32
"""Contexts among which the longest is searched: multiples of so large a part of --max-seq-len."""
CONTEXT_UNIT = 8
"""Contexts are multiples of it."""
HEAD_ROOM, LEAST_HEAD_ROOM_BYTES = 0.05, 40 * 10**6
"""Part of the memory, and at least so much of it, that a trial leaves free: later updates meet fragmented memory."""
SHORTEST_CHUNK = 64
CHUNKS = 4
"""Parts that chunked training cuts a context into, where it is added."""
SMALLER_SIZES = 2
"""Micro-batches below the one that was found whose speed is measured too."""


@dataclass(frozen=True, eq=False)
class Lever:
    """Options that save memory: what they set, for how many times the time of an update (measured: docs/search.md), and
    what they change besides memory and time. Each of LEVERS is equal to itself alone."""

    name: str
    slower: float
    leaves: dict[str, Any]
    changes: str = ""


EIGHT_BITS = Lever(
    "8-bit optimizer", 1.01, {"optimizer.use_8bit_optimizer": True}, "moments are kept in 8 bits, not in 32"
)
CHECKPOINTING = Lever("gradient checkpointing", 1.07, {"memory.gradient_checkpointing": True})
CHUNKED = Lever("chunked training", 1.06, {"memory.use_chunked_training": True, "memory.chunk_gradients": "exact"})
SHARDED = Lever("sharded optimizer", 1.0, {"cluster.strategy": "sharded-optimizer"})
DIVIDED_WEIGHTS = Lever("zero3", 1.5, {"cluster.strategy": "zero3"})
LEVERS = (EIGHT_BITS, CHECKPOINTING, CHUNKED, SHARDED, DIVIDED_WEIGHTS)


@dataclass(frozen=True)
class Point:
    """What a trial tries. `context` is None for puzzles, whose length the data decides."""

    context: int | None
    batch_size: int
    levers: tuple[Lever, ...] = ()

    def __str__(self) -> str:
        context = "" if self.context is None else f"context {self.context}, "
        return f"{context}batch {self.batch_size}{''.join(f', {lever.name}' for lever in self.levers)}"


@dataclass(frozen=True)
class Trial:
    """A trial that was made."""

    point: Point
    verdict: Verdict


TryRun: TypeAlias = Callable[[RunSettings, int], Verdict]
"""Tries a run with these settings, which may take so many bytes; `search.trial.run_trial`."""
OnTrial: TypeAlias = Callable[[int, Trial], None]
"""Told of each trial, with its number."""


@dataclass(frozen=True)
class Found:
    """What a search found: the point, and all trials that it made."""

    point: Point
    trials: tuple[Trial, ...]
    limit_bytes: int

    @property
    def verdict(self) -> Verdict:
        """That of the point."""
        return next(one.verdict for one in reversed(self.trials) if one.point == self.point and one.verdict.fits)

    def speeds(self) -> list[Trial]:
        """The trials that fitted at the context and with the levers that were found, the smallest micro-batch first."""
        of_size = {
            one.point.batch_size: one
            for one in self.trials
            if one.verdict.fits and replace(one.point, batch_size=self.point.batch_size) == self.point
        }
        return [of_size[size] for size in sorted(of_size)]


def check_optimizable(settings: RunSettings) -> None:
    """Raises SettingsError for a run whose sizes cannot be searched."""
    if settings.run.resume or settings.run.resume_from is not None:
        reason = "the context and the effective batch of a resumed run are those of its checkpoint"
        raise SettingsError(Fault("a resumed run", reason, "Search before the run begins, and give it what was found"))
    if settings.cluster.ray_address is not None:
        raise _on_a_cluster(f"--ray-address {settings.cluster.ray_address}")
    if settings.cluster.trainer_batch_sizes is not None:
        value = f"--batch-size {settings.cluster.trainer_batch_sizes}"
        raise SettingsError(Fault(value, "one size is searched for all trainers", "Give the effective batch of each"))


def _on_a_cluster(named: str) -> SettingsError:
    hint = "Run `hrm-ray optimize --launcher local` on a machine of the cluster, and give the run what it finds"
    return SettingsError(Fault(named, "trials run on this machine, and not on a cluster", hint))


@dataclass(frozen=True)
class Gpu:
    """A GPU of the run."""

    name: str
    total_bytes: int
    free_bytes: int


_ASK_GPUS = (
    "import json, torch; print(json.dumps([[torch.cuda.get_device_name(n), *torch.cuda.mem_get_info(n)] "
    "for n in range(torch.cuda.device_count())]))"
)


@cache
def gpus_of(devices: Devices) -> tuple[Gpu, ...]:
    """The GPUs that the workers take. They are asked in a process of their own: this one would keep memory of each, and
    could not choose among them any more."""
    if devices.device != "cuda":
        return ()
    with visible_gpus(devices):
        asked = subprocess.run([sys.executable, "-c", _ASK_GPUS], capture_output=True, text=True, check=False)
    if asked.returncode:
        last = asked.stderr.strip().splitlines()[-1:] or ["no answer"]
        raise UnavailableError(Fault("the GPUs", f"they cannot be asked ({last[0][:120]})", "Give --device cpu"))
    found = [Gpu(name, total, free) for name, free, total in json.loads(asked.stdout.splitlines()[-1])]
    return tuple(found[: devices.request.gpus])


def memory_of(resolved: ResolvedRun) -> int:
    """Bytes that a worker of this run may take: --memory-budget, or what is free on the fullest of its devices."""
    devices, budget = resolved.devices, resolved.settings.memory.budget_bytes
    free = min((gpu.free_bytes for gpu in gpus_of(devices)), default=available_memory_bytes() // devices.world_size)
    return free if budget is None else min(free, budget)


@dataclass
class Search:
    """The search for one run. `try_run` makes a trial."""

    resolved: ResolvedRun
    try_run: TryRun
    on_trial: OnTrial = lambda number, trial: None
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises SettingsError for a run on a cluster, whose address may come from the environment."""
        if self.resolved.devices.ray_address is not None:
            raise _on_a_cluster(f"the cluster at {self.resolved.devices.ray_address}")

    @cached_property
    def budget_bytes(self) -> int:
        """Bytes that a worker may take."""
        return memory_of(self.resolved)

    @property
    def limit_bytes(self) -> int:
        """Bytes that a trial may take at its peak."""
        return round(min((1 - HEAD_ROOM) * self.budget_bytes, self.budget_bytes - LEAST_HEAD_ROOM_BYTES))

    @property
    def process_bytes(self) -> int:
        return PROCESS_BYTES if self.resolved.devices.device == "cpu" else 0

    @cached_property
    def share(self) -> int:
        """Rows of an update on each worker: the micro-batch times what is accumulated."""
        chosen = self.resolved.settings.optimizer
        return chosen.batch_size * chosen.gradient_accumulation_steps

    @property
    def asked(self) -> Point:
        """The run as it was asked for, in one micro-batch."""
        return Point(self.resolved.config.seq_len if self.is_text else None, self.share)

    @property
    def is_text(self) -> bool:
        return self.resolved.facts.task == "lm"

    def run(self) -> Found:
        """Search. Raises ResourceError where not even the shortest context fits, and HrmRayError where a trial fails
        for a reason other than memory."""
        if self._estimated_to_fit(self.asked) and self._tried(self.asked).fits:
            return self._found(self.asked)
        point = self._with_levers()
        if not self._tried(point).fits:
            point = self._longest_context(point)
        return self._found(self._largest_batch(point))

    def confirm(self, earlier: Found) -> Found | None:
        """What an earlier search found, where a trial says that it still fits."""
        if not self._tried(earlier.point).fits:
            return None
        return replace(earlier, trials=(*earlier.trials, *self.trials))

    @property
    def rate_name(self) -> str:
        """What `rate` counts."""
        return "tokens/s" if self.is_text else "puzzles/s"

    def rate(self, trial: Trial) -> float | None:
        """Tokens or puzzles a second of all workers in a trial, where its updates were timed."""
        if trial.verdict.update_s is None:
            return None
        rows = trial.point.batch_size * self._accumulated(trial.point) * self.resolved.devices.workers_of_an_update
        return rows * (trial.point.context or 1) / trial.verdict.update_s

    def _accumulated(self, point: Point) -> int:
        """Micro-batches of an update in a trial: the second adds to the gradients that the first has made, as do all
        further ones."""
        return min(2, self.share // point.batch_size)

    def settings_at(self, point: Point) -> RunSettings:
        """The settings (resolved) of the run at a point, as it is to be trained."""
        return settings_at(self.resolved.settings, point, self.share)

    def estimate(self, point: Point) -> int:
        """Bytes of the tensors of an update, without running it."""
        config = self.resolved.config
        if point.context is not None:
            config = replace(config, seq_len=point.context)
        return memory_estimate(self.settings_at(point), config, self.resolved.devices.device).peak_bytes

    def levers(self) -> list[Lever]:
        """The levers that this run can take, and that the user has not decided about."""
        settings, devices = self.resolved.settings, self.resolved.devices
        found: list[Lever] = []
        frozen = settings.adapt.use_peft or settings.run.expert_id is not None
        if settings.optimizer.optimizer == "adamw" and not frozen and find_spec("bitsandbytes") is not None:
            found.append(EIGHT_BITS)
        found.append(CHECKPOINTING)
        causal = self.is_text and settings.model.lm_mask != "prefix"
        if causal and self.resolved.config.seq_len >= 2 * SHORTEST_CHUNK and not settings.memory.cpu_offload:
            found.append(CHUNKED)
        if devices.workers_of_an_update > 1:
            found.append(SHARDED)
            if sys.platform == "linux" and find_spec("deepspeed") is not None:
                found.append(DIVIDED_WEIGHTS)
        return [lever for lever in found if not lever.leaves.keys() & settings.given]

    def _found(self, point: Point) -> Found:
        smaller = [size for size in divisors(self.share) if size < point.batch_size]
        for size in sorted(smaller, key=lambda size: abs(size - point.batch_size // 2))[:1]:
            self._tried(replace(point, batch_size=size))
            quarter = [other for other in smaller if other < size]
            for other in sorted(quarter, key=lambda other: abs(other - size // 2))[: SMALLER_SIZES - 1]:
                self._tried(replace(point, batch_size=other))
        return Found(point, tuple(self.trials), self.limit_bytes)

    def _tried(self, point: Point) -> Verdict:
        """The verdict on a point, by a trial where there was none yet."""
        for one in self.trials:
            if one.point == point:
                return one.verdict
        settings = self.settings_at(point)
        leaves: dict[str, Any] = {
            "optimizer.gradient_accumulation_steps": self._accumulated(point),
            "memory.memory_budget": self._budget(settings),
        }
        if settings.cluster.parallel_independent:
            # Trainers share no step: one of them is tried.
            alone = {"parallel_independent": False, "world_size": 1, "strategy": None, "launcher": "local"}
            leaves |= {f"cluster.{name}": value for name, value in alone.items()}
            leaves["cluster.threads"] = self.resolved.devices.threads
        settings = settings.with_leaves(leaves)
        trial = Trial(point, self.try_run(settings, self.limit_bytes))
        self.trials.append(trial)
        self.on_trial(len(self.trials), trial)
        return trial.verdict

    def _budget(self, settings: RunSettings) -> str:
        """The --memory-budget of a trial: that of the run, or what is free."""
        given = settings.memory.memory_budget
        if given is not None and settings.memory.budget_bytes == self.budget_bytes:
            return given
        return f"{self.budget_bytes // 1000}kB"

    def _estimated_to_fit(self, point: Point) -> bool:
        """Whether a trial may fit: its tensors alone do not take more than there is."""
        return self.process_bytes + self.estimate(point) <= self.limit_bytes

    def _with_levers(self) -> Point:
        """The asked context in micro-batches of one row, with the fewest levers with which it fits; where it fits with
        none, those that save most."""
        least = replace(self.asked, batch_size=1)
        points = [replace(least, levers=chosen) for chosen in by_cost(self.levers())]
        estimates: dict[Point, int] = {}
        failed: list[int] = []
        for point in points:
            estimates[point] = self.estimate(point)
            if self.process_bytes + estimates[point] > self.limit_bytes:
                continue
            # What saves next to nothing over what has failed is not tried.
            if failed and estimates[point] > 0.95 * min(failed):
                continue
            if self._tried(point).fits:
                return point
            failed.append(estimates[point])
        return min(points, key=lambda point: estimates[point])

    def _longest_context(self, point: Point) -> Point:
        """The longest context that fits with the point's micro-batch and levers."""
        if point.context is None:
            raise self._nothing_fits(point)
        contexts = contexts_up_to(point.context)
        points = [replace(point, context=context) for context in contexts]
        estimates = self._interpolated(points, contexts)
        best = self._search(points, estimates)
        if best is None:
            raise self._nothing_fits(points[0])
        return best

    def _largest_batch(self, point: Point) -> Point:
        sizes = divisors(self.share)
        points = [replace(point, batch_size=size) for size in sizes]
        best = self._search(points, self._interpolated(points, sizes))
        return best or point

    def _search(self, points: Sequence[Point], estimates: Sequence[float]) -> Point | None:
        """The last of the points that fits."""
        outcomes = [
            Outcome(points.index(one.point), one.verdict.fits, one.verdict.peak_bytes)
            for one in self.trials
            if one.point in points
        ]
        known = len(outcomes)
        while (index := next_trial(estimates, outcomes, self.limit_bytes, self.process_bytes, known)) is not None:
            verdict = self._tried(points[index])
            outcomes.append(Outcome(index, verdict.fits, verdict.peak_bytes))
        best = largest_fit(outcomes)
        return None if best is None else points[best]

    def _interpolated(self, points: Sequence[Point], values: Sequence[int]) -> list[float]:
        """Estimates of all points from those of the first, the middle and the last."""
        some = sorted({0, len(points) // 2, len(points) - 1})
        known = [float(self.estimate(points[index])) for index in some]
        return [float(size) for size in np.interp(values, [values[index] for index in some], known)]

    def _nothing_fits(self, point: Point) -> ResourceError:
        needed = self.process_bytes + FIRST_RATIO * self.estimate(point)
        reason = f"not even {point} fits into {gigabytes(self.limit_bytes)}, it needs about {gigabytes(round(needed))}"
        return ResourceError(Fault("memory", reason, "Give more --memory-budget, or a smaller model"))


def settings_at(settings: RunSettings, point: Point, share: int) -> RunSettings:
    """The settings (resolved) at a point, with as much accumulation as an update of `share` rows then takes."""
    leaves: dict[str, Any] = {
        "optimizer.batch_size": point.batch_size,
        "optimizer.gradient_accumulation_steps": share // point.batch_size,
        "optimizer.effective_batch_size": None,
    }
    if point.context is not None:
        leaves["data.max_seq_len"] = point.context
    if "memory.gradient_checkpointing" not in settings.given:
        leaves["memory.gradient_checkpointing"] = False
    for lever in point.levers:
        leaves |= lever.leaves
    if CHUNKED in point.levers and point.context is not None:
        leaves["memory.chunk_size"] = max(SHORTEST_CHUNK, -(-point.context // CHUNKS))
    return settings.with_leaves(leaves)


def by_cost(levers: Sequence[Lever]) -> list[tuple[Lever, ...]]:
    """All sets of these levers that go together, none first, then in the order of the time that they cost."""
    every = (chosen for count in range(len(levers) + 1) for chosen in combinations(levers, count))
    return sorted(filter(_at_most_one_strategy, every), key=slower)


def slower(levers: Sequence[Lever]) -> float:
    """For how many times the time of an update these levers save memory."""
    return math.prod(lever.slower for lever in levers)


def _at_most_one_strategy(levers: Sequence[Lever]) -> bool:
    strategies = [lever.leaves.get("cluster.strategy") for lever in levers if "cluster.strategy" in lever.leaves]
    eight_bits_of_deepspeed = "zero3" in strategies and EIGHT_BITS in levers
    return len(strategies) <= 1 and not eight_bits_of_deepspeed


def divisors(number: int) -> list[int]:
    """All of them, ascending: the micro-batches that an effective batch can be divided into."""
    return [size for size in range(1, number + 1) if number % size == 0]


def contexts_up_to(longest: int) -> list[int]:
    """The contexts among which the longest that fits is searched, ascending."""
    parts = (longest * part // CONTEXTS // CONTEXT_UNIT * CONTEXT_UNIT for part in range(1, CONTEXTS))
    return sorted({*(context for context in parts if context >= CONTEXT_UNIT), longest})
