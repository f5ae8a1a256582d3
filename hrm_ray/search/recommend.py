"""Recommends options for a model in a given memory, from estimates alone: nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from hrm_ray.errors import Fault, ResourceError, SettingsError
from hrm_ray.launch.preflight import PROCESS_BYTES
from hrm_ray.log_filters import silence_unused_kernels
from hrm_ray.model.config import ModelConfig, model_config
from hrm_ray.model.describe import count_parameters
from hrm_ray.search.optimize import (
    CHECKPOINTING,
    CHUNKED,
    DIVIDED_WEIGHTS,
    EIGHT_BITS,
    SHARDED,
    SHORTEST_CHUNK,
    Lever,
    Point,
    by_cost,
    contexts_up_to,
    divisors,
    settings_at,
)
from hrm_ray.settings.presets import PRESETS
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.memory_estimate import MemoryAccount, memory_estimate

PLANNED = 0.9
"""Part of the memory that is planned with; the rest is for fragmentation and, on a GPU, for CUDA itself."""
HIDDEN_SIZES = (128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192)
HEAD_SIZE = 64
SMALLER_MODELS = 3
"""Trials of a smaller model where the one asked for does not fit."""
MOST_WORKERS = 64


@dataclass(frozen=True)
class Recommendation:
    """Options for a run that fits: its point, settings, architecture and expected memory."""

    point: Point
    settings: RunSettings
    config: ModelConfig
    account: MemoryAccount
    expected_bytes: int
    parameters: int


@dataclass(frozen=True)
class Asked:
    """What is asked: settings (resolved, for text) with the context and the effective batch, the size of the
    vocabulary, the bytes of each worker's device, and its kind."""

    settings: RunSettings
    vocab_size: int
    memory_bytes: int
    device: str

    @property
    def share(self) -> int:
        """Rows of an update on each worker."""
        chosen = self.settings.optimizer
        return chosen.batch_size * chosen.gradient_accumulation_steps

    @property
    def context(self) -> int:
        return self.settings.data.max_seq_len or 0

    @property
    def workers(self) -> int:
        return self.settings.cluster.world_size or 1

    @property
    def room_bytes(self) -> int:
        """What the tensors of an update may take."""
        return round(PLANNED * self.memory_bytes) - self.process_bytes

    @property
    def process_bytes(self) -> int:
        return PROCESS_BYTES if self.device == "cpu" else 0

    def levers(self) -> list[Lever]:
        """Options that may save memory, and that the user has not decided about."""
        settings = self.settings
        found = [CHECKPOINTING]
        if settings.optimizer.optimizer == "adamw" and not settings.adapt.use_peft:
            found.append(EIGHT_BITS)
        if self.context >= 2 * SHORTEST_CHUNK and settings.model.lm_mask != "prefix":
            found.append(CHUNKED)
        if self.workers > 1:
            found += [SHARDED, DIVIDED_WEIGHTS]
        return [lever for lever in found if not lever.leaves.keys() & settings.given]

    def config_at(self, point: Point) -> ModelConfig:
        return model_config(settings_at(self.settings, point, self.share), self.vocab_size)

    def account(self, point: Point) -> MemoryAccount:
        """The memory of an update at a point."""
        return _account(settings_at(self.settings, point, self.share), self.config_at(point), self.device)

    def fits(self, point: Point) -> bool:
        return self.account(point).peak_bytes <= self.room_bytes


_account = lru_cache(maxsize=64)(memory_estimate)
"""Estimates take seconds, and are asked for again."""


def recommend(asked: Asked) -> Recommendation:
    """The options for what is asked with which an update is fastest, as far as that is known, and fits. Raises
    ResourceError, which names single changes that would make it fit, where nothing does."""
    silence_unused_kernels()
    plain = Point(asked.context, 1)
    if asked.fits(plain):
        return _described(asked, _largest_batch(asked, plain))
    sets = by_cost(asked.levers())
    # Whether anything fits is decided by the sets that no other set contains.
    largest = [levers for levers in sets if not any(set(levers) < set(other) for other in sets)]
    least = min(
        (replace(plain, levers=levers) for levers in largest), key=lambda point: asked.account(point).peak_bytes
    )
    if not asked.fits(least):
        raise ResourceError(_does_not_fit(asked, least))
    for levers in sets:
        point = replace(plain, levers=levers)
        if asked.fits(point):
            return _described(asked, _largest_batch(asked, point))
    return _described(asked, _largest_batch(asked, least))


def _largest_batch(asked: Asked, point: Point) -> Point:
    """The point with the largest micro-batch that fits; memory is linear in its rows."""
    sizes = divisors(asked.share)
    ends = [sizes[0], sizes[-1]]
    known = [asked.account(replace(point, batch_size=size)).peak_bytes for size in ends]
    estimates = np.interp(sizes, ends, known)
    fitting = [size for size, estimate in zip(sizes, estimates, strict=True) if estimate <= asked.room_bytes]
    for size in reversed(fitting):
        larger = replace(point, batch_size=size)
        if asked.fits(larger):
            return larger
    return point


def _described(asked: Asked, point: Point) -> Recommendation:
    account, config = asked.account(point), asked.config_at(point)
    expected = asked.process_bytes + account.peak_bytes
    settings = settings_at(asked.settings, point, asked.share)
    return Recommendation(point, settings, config, account, expected, count_parameters(config).total)


def _does_not_fit(asked: Asked, least: Point) -> Fault:
    """What is asked, what it takes at least, and each single change with which it would fit."""
    needed = asked.process_bytes + asked.account(least).peak_bytes
    # Rounded up, so that it fits.
    changes = [f"--memory {_size(1.1 * needed / PLANNED)}", *_changes(asked, least)]
    parameters = count_parameters(asked.config_at(least)).total
    workers = f" on each of {asked.workers} workers" if asked.workers > 1 else ""
    reason = f"{_count(parameters)} parameters at context {asked.context} take at least {_size(needed)}{workers}"
    return Fault(f"--memory {_size(asked.memory_bytes)}", reason, f"Give {' or '.join(changes)}")


def _changes(asked: Asked, least: Point) -> Iterator[str]:
    """Single changes other than more memory."""
    contexts = contexts_up_to(asked.context)[:-1]
    if contexts:
        ends = [contexts[0], contexts[-1]]
        sizes = [asked.account(replace(least, context=context)).peak_bytes for context in ends]
        fitting = [
            context
            for context, estimate in zip(contexts, np.interp(contexts, ends, sizes), strict=True)
            if estimate <= asked.room_bytes
        ]
        for context in reversed(fitting):
            if asked.fits(replace(least, context=context)):
                yield f"--context {context}"
                break
    smaller = _smaller_model(asked, least)
    if smaller is not None:
        yield f"--parameters {_count(smaller)}"
    workers = _more_workers(asked, least)
    if workers is not None:
        yield f"--world-size {workers}"


def _more_workers(asked: Asked, least: Point) -> int | None:
    """Workers with which the run fits, where they divide the weights too."""
    levers = tuple(lever for lever in least.levers if lever not in (EIGHT_BITS, SHARDED, DIVIDED_WEIGHTS))
    point, account = replace(least, levers=(*levers, DIVIDED_WEIGHTS)), asked.account(replace(least, levers=levers))
    divided = account.weights_bytes + account.gradients_bytes + account.optimizer_bytes
    workers = 2 * asked.workers
    while "cluster.strategy" not in asked.settings.given and workers <= MOST_WORKERS:
        if account.peak_bytes - divided + divided / workers <= asked.room_bytes:
            more = replace(asked, settings=asked.settings.with_leaves({"cluster.world_size": workers}))
            if more.fits(point):
                return workers
        workers *= 2
    return None


def _smaller_model(asked: Asked, least: Point) -> int | None:
    """The parameters of a smaller model that fits."""
    if any(f"model.{name}" in asked.settings.given for name in ("hidden_size", "h_layers", "l_layers", "num_layers")):
        return None
    total = count_parameters(asked.config_at(least)).total
    needed = asked.account(least).peak_bytes
    for _ in range(SMALLER_MODELS):
        total = int(0.95 * total * max(0.2, asked.room_bytes / needed))
        try:
            settings = with_shape(asked.settings, total, asked.vocab_size)
        except SettingsError:
            return None
        small = replace(asked, settings=settings)
        needed = small.account(least).peak_bytes
        if needed <= asked.room_bytes:
            return count_parameters(small.config_at(least)).total
    return None


def with_shape(settings: RunSettings, parameters: int, vocab_size: int) -> RunSettings:
    """The settings (resolved) with an architecture of about so many parameters, between the presets in its shape.
    Raises SettingsError where there is none."""
    widths = [leaves["model.hidden_size"] for leaves in PRESETS.values()]
    depths = [leaves["model.h_layers"] for leaves in PRESETS.values()]
    best: tuple[float, dict[str, Any]] | None = None
    for width in HIDDEN_SIZES:
        shape = {
            "model.hidden_size": width,
            "model.num_heads": max(2, width // HEAD_SIZE),
            "model.expansion": 4.0,
        }
        one, two = (_count_with(settings, shape, layers, vocab_size) for layers in (1, 2))
        layers = max(1, round(1 + (parameters - one) / (two - one)))
        total = one + (layers - 1) * (two - one)
        # A right number of parameters counts more than a usual depth.
        off = 10 * abs(np.log(total / parameters)) + abs(np.log(layers / np.interp(width, widths, depths)))
        if best is None or off < best[0]:
            best = float(off), {**shape, "model.h_layers": layers, "model.l_layers": layers}
    if best is None or not 0.8 < count_of(settings.with_leaves(best[1]), vocab_size) / parameters < 1.25:
        reason = f"no architecture with a vocabulary of {vocab_size} has about so many"
        raise SettingsError(Fault(f"--parameters {_count(parameters)}", reason, "Give another number, or the sizes"))
    return settings.with_leaves(best[1])


def _count_with(settings: RunSettings, shape: dict[str, Any], layers: int, vocab_size: int) -> int:
    return count_of(settings.with_leaves({**shape, "model.h_layers": layers, "model.l_layers": layers}), vocab_size)


def count_of(settings: RunSettings, vocab_size: int) -> int:
    """Parameters of the architecture of these settings."""
    return _counted(model_config(settings, vocab_size))


@cache
def _counted(config: ModelConfig) -> int:
    return count_parameters(config).total


def parameters_of(text: str) -> int | None:
    """A number of parameters: `400M`, `1.5B` or `125000000`; None for anything else."""
    factors = {"K": 10**3, "M": 10**6, "B": 10**9}
    digits, factor = (text[:-1], factors[text[-1].upper()]) if text[-1:].upper() in factors else (text, 1)
    try:
        number = float(digits)
    except ValueError:
        return None
    return round(number * factor) if 0 < number * factor < 10**13 else None


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3g}B" if parameters >= 10**9 else f"{parameters / 1e6:.3g}M"


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f}GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f}MB"
