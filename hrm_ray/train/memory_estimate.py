"""Estimates the memory of one worker's weight update without allocating it.

The real training step runs on fake tensors, and every storage that would be alive is counted. The same count can be
made for a step on real tensors.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hrm_ray.model.attention import attend
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.objective import Batch
from hrm_ray.model.scope import AttentionScope
from hrm_ray.model.transforms.attend import use_kernel
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.fake_tensors import fake_tensors
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.optimizer_state import state_tensors, state_tensors_of
from hrm_ray.train.precision import activation_dtype, sum_gradients_in_float32
from hrm_ray.train.storage_tracker import OTHER, Allocation, StorageTracker, storage_bytes
from hrm_ray.train.strategies.single import SingleStrategy
from hrm_ray.train.strategies.zero import reduce_bucket_values
from hrm_ray.train.world import World
from hrm_ray.types import Columns

# What is traced of a larger update; the rest is extrapolated.
PASSES = 2
"""Micro-batches, where each has one pass: the first makes the gradients, the second adds to them as all others do."""
SEGMENTS = 2
"""Segments: the second begins with what the first left, as all others do."""
CHUNKS = 4
"""Chunks of a row, beyond those that a window reaches over."""
REACH = 4
"""Chunks that a window reaches over."""
SCHEDULE_STEPS = 1000
"""Steps of the schedule, of which the first is traced: AdaLoRA's ranks are those of the start, which are largest."""

DIVIDED: dict[str, tuple[str, ...]] = {
    "sharded-optimizer": ("optimizer", "average"),
    "zero1": ("optimizer", "average"),
    "zero2": ("optimizer", "average", "gradients"),
    "zero3": ("optimizer", "average", "gradients", "weights"),
    "fsdp": ("optimizer", "average", "gradients", "weights"),
}
"""Strategy -> what workers divide."""
DEEPSPEED = frozenset({"zero1", "zero2", "zero3"})
"""Strategies under which each worker also has its part of a float32 copy of the trained weights, which is updated, and
the bucket in which gradients are reduced."""

RESIDENT = ("weights", "gradients", "optimizer", "average", "carries", "batch")
"""What stays in memory over the passes of an update; whatever else the passes make is activations."""


@dataclass(frozen=True)
class MemoryAccount:
    """Bytes of one worker's tensors in an update.

    `carries_bytes` stay between updates of puzzles, `activations_bytes` is the most that the passes need on top of what
    stays, `peak_bytes` the most that is alive at once. The process itself, with Python and PyTorch, is not included.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    average_bytes: int
    carries_bytes: int
    activations_bytes: int
    peak_bytes: int

    def to_plain(self) -> dict[str, int]:
        """As JSON holds it."""
        return asdict(self)

    def as_text(self) -> str:
        """A sentence: the peak, and what it is made of."""
        parts = {name.removesuffix("_bytes"): size for name, size in asdict(self).items() if name != "peak_bytes"}
        shown = ", ".join(f"{name} {_megabytes(size)}" for name, size in parts.items() if size)
        return f"{_megabytes(self.peak_bytes)} at the peak of an update ({shown})"


def memory_estimate(settings: RunSettings, config: ModelConfig, device: str = "cpu") -> MemoryAccount:
    """The account of an update under `settings` (resolved), in seconds for a model of any size.

    Kernels are those of a CPU; those of another `device` keep about the same. Optimizer state that --optimizer-offload
    keeps in host memory is reported, and is no part of the peak.
    """
    memory = settings.memory
    if memory.model_dtype == "fp32" and activation_dtype(memory, torch.device(device)) == "bfloat16":
        # The update below is traced on a CPU, where the default is another.
        settings = settings.model_copy(update={"memory": memory.model_copy(update={"activations": "bf16"})})
    trace = _trace_rows(settings, config)
    account = trace.account(offloaded=settings.memory.optimizer_offload and device != "cpu")
    # Each further micro-batch keeps its columns, and its carry: those of the last update live until all new ones exist.
    further = settings.optimizer.gradient_accumulation_steps - trace.micro_batches
    carry = account.carries_bytes // trace.micro_batches
    columns = trace.tracker.at(trace.passes_end).get("batch", 0) // trace.micro_batches
    return replace(
        account,
        carries_bytes=account.carries_bytes + further * carry,
        peak_bytes=account.peak_bytes + further * (columns + 2 * carry),
    )


def account_for(loop: TrainingLoop, batches: list[Batch]) -> MemoryAccount:
    """The account of an update of `loop` on `batches`, one per micro-batch, with the optimizer's state in place.

    The weights move; the loop's progress and its position in the data do not.
    """
    return _trace(loop, batches).account(offloaded=False)


@dataclass
class _Trace:
    """The storages of one update, and when its passes began and ended."""

    tracker: StorageTracker
    micro_batches: int
    trained_values: int
    state_bytes: list[int]
    """Optimizer state of each parameter."""
    pass_starts: list[int]
    """The first pass also begins the update."""
    passes_end: int
    end: int

    def account(self, *, offloaded: bool) -> MemoryAccount:
        """With `offloaded` only the optimizer state of the largest parameter is on the device, in its turn."""
        start, after_passes, at_end = self.pass_starts[0], self.tracker.at(self.passes_end), self.tracker.at(self.end)
        in_turn = max(self.state_bytes, default=0) if offloaded else 0
        return MemoryAccount(
            weights_bytes=at_end["weights"],
            gradients_bytes=after_passes.get("gradients", 0),
            optimizer_bytes=at_end.get("optimizer", 0),
            average_bytes=at_end.get("average", 0),
            carries_bytes=at_end.get("carries", 0),
            activations_bytes=self.tracker.peak_bytes(beside=RESIDENT, since=start, until=self.passes_end),
            peak_bytes=self.tracker.peak_bytes(since=start, beside=("optimizer",) if offloaded else ()) + in_turn,
        )

    def divide(self, strategy: str, workers: int, bucket_bytes: int) -> None:
        """Leave one worker's part of what `workers` divide under `strategy`, and add what it needs to itself: copies
        count as weights, the bucket, of `bucket_bytes` for each value, as gradients."""
        categories = DIVIDED.get(strategy, ())
        for one in self.tracker.allocations:
            if one.category in categories:
                one.bytes = -(-one.bytes // workers)
        self.state_bytes = [-(-size // workers) if "optimizer" in categories else size for size in self.state_bytes]
        if strategy in DEEPSPEED:
            self.tracker.allocations.append(Allocation(-(-4 * self.trained_values // workers), "weights", 0))
            bucket = bucket_bytes * reduce_bucket_values(self.trained_values)
            self.tracker.allocations.append(Allocation(bucket, "gradients", 0))

    def extrapolate(self, growths: list[tuple[_Trace, float]], factors: dict[int, float]) -> None:
        """Make this trace of short rows that of longer rows and windows.

        `factors` are by length: a storage as long as one of these primes grows by its factor. `growths` are (the trace
        with one chunk less, number of further chunks): what passes leave to later ones grows per chunk by as much as it
        did with the last chunk. What comes and goes within a pass stays.
        """
        left = self._left_by_size()
        shares: defaultdict[int, float] = defaultdict(float)
        for less, further in growths:
            left_with_less = less._left_by_size()
            for size in left:
                # A size that the smaller trace does not have depends on the length, and is among the factors.
                if size in left_with_less:
                    shares[size] += (left[size] - left_with_less[size]) / left[size] * further
        for one in self.tracker.allocations:
            factor = next((factor for length, factor in factors.items() if one.bytes % length == 0), None)
            if factor is not None:
                one.bytes = round(one.bytes * factor)
            elif self._is_left(one):
                one.bytes = round(one.bytes * (1 + shares[one.bytes]))

    def _is_left(self, one: Allocation) -> bool:
        """Whether a pass made it and left it to a later one."""
        made = one.category == OTHER and one.allocated > self.pass_starts[0]
        return made and any(one.alive_at(start) for start in self.pass_starts[1:])

    def _left_by_size(self) -> Counter[int]:
        """The largest number of storages of each size that passes leave to later ones."""
        most: Counter[int] = Counter()
        left = [one for one in self.tracker.allocations if self._is_left(one)]
        for start in self.pass_starts[1:]:
            most |= Counter(one.bytes for one in left if one.alive_at(start))
        return most


def _trace_rows(settings: RunSettings, config: ModelConfig) -> _Trace:
    """The trace of an update on rows of the full length; rows of many chunks are extrapolated from rows of few."""
    chunk, length = settings.memory.chunk_size, config.seq_len
    window = None if config.window_size is None else min(config.window_size, length)
    chunks = CHUNKS if window is None else CHUNKS + min(-(-window // chunk), REACH)
    if not settings.memory.use_chunked_training or length <= chunks * chunk:
        return _trace_fake_update(settings, config)

    def trace_of(row: int, reach: int | None) -> _Trace:
        return _trace_fake_update(settings, replace(config, seq_len=row, window_size=reach))

    # Lengths are primes: a storage whose bytes one of them divides is a tensor of that length.
    fewer, row = (_prime_below(number * chunk) for number in (chunks - 1, chunks))
    factors = {row: length / row}
    if window is None or window <= REACH * chunk:
        trace = trace_of(row, window)
        growths = [(trace_of(fewer, window), (length - row) / chunk)]
    else:
        near = _marked_window(REACH * chunk, chunk)
        trace = trace_of(row, near)
        growths = [
            (trace_of(fewer, near), (length - row) / chunk),
            (trace_of(row, near - chunk), (window - near) / chunk),
        ]
        # The keys that a chunk sees, and those that it keeps for the next.
        factors |= {near - 1 + extra: (window - 1 + extra) / (near - 1 + extra) for extra in (0, chunk)}
    trace.extrapolate(growths, factors)
    return trace


def _prime_below(number: int) -> int:
    return next(n for n in range(number, 1, -1) if _is_prime(n))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def _marked_window(most: int, chunk: int) -> int:
    """The largest window of at most `most` positions whose two lengths in memory are primes: window - 1 positions, and
    these with a chunk. With an odd chunk one of the two is even; then the second alone is a prime."""
    odd = chunk % 2 == 1
    return next(w for w in range(most, 1, -1) if _is_prime(w - 1 + chunk) and (odd or _is_prime(w - 1)))


def _trace_fake_update(settings: RunSettings, config: ModelConfig) -> _Trace:
    """The trace of an update of a few micro-batches and segments, on fake tensors."""
    config = replace(config, halt_max_steps=min(config.halt_max_steps, SEGMENTS))
    several_passes = config.halt_max_steps > 1 and settings.model.supervision == "rollout"
    number = min(settings.optimizer.gradient_accumulation_steps, 1 if several_passes else PASSES)
    optimizer = settings.optimizer.model_copy(update={"gradient_accumulation_steps": number})
    strategy = settings.cluster.strategy_for(settings.cluster.world_size or 1)
    # Compiled blocks keep no more than eager ones.
    cluster = settings.cluster.model_copy(update={"strategy": "single", "compile": False})
    settings = settings.model_copy(update={"optimizer": optimizer, "cluster": cluster})
    world = World(0, 1, torch.device("cpu"), grouped=False)
    with fake_tensors():
        loop = assemble(settings, config, NoRows(), world, SCHEDULE_STEPS, resumes=True)
        if (settings.cluster.world_size or 1) > 1 or strategy in DEEPSPEED:
            sum_gradients_in_float32(loop.parts.objective.parameters())
        use_kernel(loop.parts.objective.model, _attend)
        trace = _trace(loop, [ones_batch(loop, config, settings.data.packing) for _ in range(number)])
    # Gradients are float32, but stage 2 reduces them in the type of the weights.
    narrow_bucket = strategy == "zero2" and settings.memory.model_dtype == "bf16"
    trace.divide(strategy, settings.cluster.world_size or 1, bucket_bytes=2 if narrow_bucket else 4)
    return trace


def _trace(loop: TrainingLoop, batches: list[Batch]) -> _Trace:
    parts, strategy, tracker = loop.parts, loop.parts.strategy, StorageTracker()
    if not isinstance(strategy, SingleStrategy):
        raise TypeError(f"memory is estimated for whole weights on one worker, not for {type(strategy).__name__}")
    pass_starts: list[int] = []
    tracker.name("weights", (*parts.objective.parameters(), *parts.objective.buffers()))
    tracker.name("batch", _tensors(batches))
    tracker.name("average", strategy.average.average.values() if strategy.average is not None else ())
    with tracker, _noted_passes(parts.objective, tracker, pass_starts):
        # An update by zero gradients makes the optimizer state that the traced update finds.
        for parameter in parts.objective.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        state_bytes = _update(loop, strategy, tracker)
        if parts.carried and loop.carries is None:
            loop.carries = [parts.objective.initial_carry(batch) for batch in batches]
        tracker.name("carries", _tensors(loop.carries))
        # Denominators as large as the number of tokens keep float16 gradients within their range.
        tokens = float(sum(batch["inputs"].numel() for batch in batches))
        _, carries = loop.passes(batches, lambda: defaultdict(lambda: tokens))
        if parts.carried:
            tracker.name("carries", _tensors(carries))
            loop.carries = carries
        passes_end = tracker.moment
        del carries
        _update(loop, strategy, tracker)
    trained = sum(parameter.numel() for parameter in parts.objective.parameters() if parameter.requires_grad)
    return _Trace(tracker, len(batches), trained, state_bytes, pass_starts, passes_end, tracker.moment)


def _update(loop: TrainingLoop, strategy: SingleStrategy, tracker: StorageTracker) -> list[int]:
    """Run a weight update; returns the bytes of each parameter's optimizer state."""
    if loop.parts.sparse is not None:
        loop.parts.sparse.forget()
    strategy.step(loop.parts.grad_clip, 1.0)
    tracker.name("optimizer", state_tensors(strategy.optimizer))
    return [storage_bytes(state_tensors_of(state)) for state in strategy.optimizer.state.values()]


@contextmanager
def _noted_passes(objective: nn.Module, tracker: StorageTracker, pass_starts: list[int]) -> Iterator[None]:
    """Note when each pass begins, and name gradients as they come."""
    hooks = [objective.register_forward_pre_hook(lambda *_: pass_starts.append(tracker.moment))]
    hooks += [
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.name("gradients", [p.grad]))
        for parameter in objective.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _FewBlocks(AttentionScope):
    """Of the blocks that a long row's queries are taken in, the last one twice: it sees the most keys, and what one
    block leaves is there while the next is computed."""

    def causal_from(self, queries: int, keys: int) -> int | None:
        # Documents of fake rows have no borders; those of real rows do.
        return super().causal_from(queries, keys) if self.documents is None else None

    def blocks(self, queries: int, keys: int, size: int) -> list[tuple[slice, slice]]:
        every = super().blocks(queries, keys, size)
        return every if len(every) < 3 else [every[-1], every[-1]]


def _attend(query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope) -> Tensor:
    """Attention as in training, in few blocks; an AttentionKernel."""
    few = scope.cached("few blocks", lambda: _FewBlocks(scope.causal, scope.documents, scope.prompt, scope.window))
    return attend(query, keys, values, few)


class NoRows:
    """A sample set to assemble a loop with; its batches are made by `_batch`."""

    def __len__(self) -> int:
        return 1

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        raise NotImplementedError("the memory estimate reads no samples")


def ones_batch(loop: TrainingLoop, config: ModelConfig, packing: bool) -> Batch:
    """The columns of one micro-batch, with the types and shapes that samples have."""
    rows, length, wanted = loop.parts.shape.batch_size, config.seq_len, loop.parts.wanted
    row_wise = {"puzzle_identifiers": torch.int32, "active": torch.bool, "min_steps": torch.int32}
    token_wise = {"inputs": torch.int32, "labels": torch.int32, "positions": torch.int32, "prompt": torch.bool}
    batch = {name: torch.ones(rows, dtype=dtype) for name, dtype in row_wise.items() if name in wanted}
    batch |= {name: torch.ones(rows, length, dtype=dtype) for name, dtype in token_wise.items() if name in wanted}
    if packing and config.task == "lm" and "prompt" not in wanted:
        # One document fills each row, which is the most that a position can see.
        batch["documents"] = torch.ones(rows, length, dtype=torch.int32)
    return batch


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors of batches and carries, which are dataclasses, dictionaries and lists."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    elif is_dataclass(tree):
        tree = list(vars(tree).values())
    return [tensor for part in tree for tensor in _tensors(part)] if isinstance(tree, list) else []
