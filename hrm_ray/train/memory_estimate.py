"""What a weight update will take of memory, found by going through it without any.

One job: the account of one worker's update. The real code runs on tensors that have a shape and no storage (PyTorch's
fake tensors), and every tensor that would live is counted. The same account can be taken of a real update.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hrm_ray.model.attention import attend
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.objective import Batch
from hrm_ray.model.scope import AttentionScope
from hrm_ray.model.transforms.attend import use_kernel
from hrm_ray.settings.tree import RunSettings
from hrm_ray.train.assemble import assemble
from hrm_ray.train.loop import TrainingLoop
from hrm_ray.train.optimizer_state import state_tensors, state_tensors_of
from hrm_ray.train.precision import sum_gradients_in_float32
from hrm_ray.train.storage_tracker import OTHER, Allocation, StorageTracker, storage_bytes
from hrm_ray.train.strategies.single import SingleStrategy
from hrm_ray.train.world import World
from hrm_ray.types import Columns

PASSES = 2
"""So many of an update's are gone through at least: the first may make the gradients, the second adds to them as all
others do. Where a micro-batch has that many itself, one is enough."""
SEGMENTS = 2
"""So many of a batch's are gone through: the second begins with what the first left, as all others do."""
CHUNKS = 4
"""So many of a row's are gone through, beyond those that a window reaches over. What further ones keep is told from it
and from a rehearsal of one chunk less."""
RESIDENT = ("weights", "gradients", "optimizer", "average", "carries", "batch")
"""What stays over the passes of an update; everything else that lives in them is activations."""

REACH = 4
"""A window over more chunks is told from one over so many and from one over one chunk less."""

_STEPS = 1000
"""Length of the schedule that a rehearsal begins: what changes with the steps, such as ranks, is as at its start."""


@dataclass(frozen=True)
class MemoryAccount:
    """Bytes of one worker's tensors in an update.

    `carries_bytes` rest between updates of puzzles, `activations_bytes` is the most that the passes need beside what
    stays, `peak_bytes` the most that is alive at once. The process itself, with Python and PyTorch, comes on top.
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
    """The account of an update as `settings` (resolved) ask for it, in seconds for any size; nothing is allocated.

    It goes by the kernels of a CPU; those of another `device` keep about the same. A few micro-batches, segments and
    chunks are gone through, and what further ones keep is added. State of the optimizer that --optimizer-offload keeps
    in host memory is told, and not part of the peak.
    """
    watched = _whole_row(settings, config)
    account = watched.account(offloaded=settings.memory.optimizer_offload and device != "cpu")
    more = settings.optimizer.gradient_accumulation_steps - watched.micro_batches
    carried = account.carries_bytes // watched.micro_batches
    # The carries of the last update live until those of the present one are all there.
    kept = watched.live.at(watched.passed).get("batch", 0) // watched.micro_batches + 2 * carried
    return replace(
        account,
        carries_bytes=account.carries_bytes + more * carried,
        peak_bytes=account.peak_bytes + more * kept,
    )


def account_for(loop: TrainingLoop, batches: list[Batch]) -> MemoryAccount:
    """The account of an update of `loop` on `batches`, one per micro-batch, with the optimizer's state in place. The
    weights move; the loop's progress and its place in the data do not."""
    return _watch(loop, batches).account(offloaded=False)


def _whole_row(settings: RunSettings, config: ModelConfig) -> _Watched:
    """An update on whole rows: gone through, or where they have many chunks told from rows of few."""
    chunk, length = settings.memory.chunk_size, config.seq_len
    window = None if config.window_size is None else min(config.window_size, length)
    far = window is not None and window > REACH * chunk
    chunks = CHUNKS + (0 if window is None else REACH if far else -(-window // chunk))
    if not settings.memory.use_chunked_training or length <= chunks * chunk:
        return _rehearsed(settings, config)
    near = _marked_window(REACH * chunk, chunk) if far else window

    def gone_through(row: int, reach: int | None) -> _Watched:
        return _rehearsed(settings, replace(config, seq_len=row, window_size=reach))

    # Bytes that a prime divides are those of tensors as long as the row.
    fewer, row = (_prime_below(number * chunk) for number in (chunks - 1, chunks))
    watched = gone_through(row, near)
    growths = [Growth(gone_through(fewer, near), (length - row) / chunk)]
    factors = {row: length / row}
    if far:
        assert near is not None and window is not None
        growths.append(Growth(gone_through(row, near - chunk), (window - near) / chunk))
        # What a chunk sees, and what slides on to the next.
        factors |= {near - 1 + extra: (window - 1 + extra) / (near - 1 + extra) for extra in (0, chunk)}
    watched.grow(growths, factors)
    return watched


def _prime_below(number: int) -> int:
    return next(n for n in range(number, 1, -1) if _is_prime(n))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def _marked_window(most: int, chunk: int) -> int:
    """The largest window of at most `most` positions whose lengths, alone and with a chunk, are known by their primes;
    where one of the two is always even, that with a chunk."""
    either = chunk % 2 == 1
    return next(w for w in range(most, 1, -1) if _is_prime(w - 1 + chunk) and (either or _is_prime(w - 1)))


def _rehearsed(settings: RunSettings, config: ModelConfig) -> _Watched:
    """An update on tensors without storage, of a few micro-batches and segments."""
    config = replace(config, halt_max_steps=min(config.halt_max_steps, SEGMENTS))
    several = config.halt_max_steps > 1 and settings.model.supervision == "rollout"
    number = min(settings.optimizer.gradient_accumulation_steps, 1 if several else PASSES)
    chosen = settings.optimizer.model_copy(update={"gradient_accumulation_steps": number})
    settings = settings.model_copy(update={"optimizer": chosen})
    world = World(0, 1, torch.device("cpu"), grouped=False)
    with torch.random.fork_rng(devices=()), FakeTensorMode(), _Answers(), _moving_fake_modules():
        loop = assemble(settings, config, _NoRows(), None, world, _STEPS, lambda: None, resumes=True).loop
        if (settings.cluster.world_size or 1) > 1:
            sum_gradients_in_float32(loop.parts.objective.parameters())
        use_kernel(loop.parts.objective.model, _attend)
        return _watch(loop, [_batch(loop, config, settings.data.packing) for _ in range(number)])


@dataclass
class _Watched:
    """An update that was gone through: every storage's life, and the moments at which its passes began and ended."""

    live: StorageTracker
    micro_batches: int
    states_bytes: list[int]
    """What the optimizer keeps of each parameter."""
    begun: list[int]
    """When each pass began; the first also begins the update."""
    passed: int
    ended: int

    def account(self, *, offloaded: bool) -> MemoryAccount:
        """With `offloaded` the optimizer's state is elsewhere, but for that of the largest parameter in its turn."""
        begun, after_passes, at_end = self.begun[0], self.live.at(self.passed), self.live.at(self.ended)
        in_turn = max(self.states_bytes, default=0) if offloaded else 0
        return MemoryAccount(
            weights_bytes=at_end["weights"],
            gradients_bytes=after_passes.get("gradients", 0),
            optimizer_bytes=at_end.get("optimizer", 0),
            average_bytes=at_end.get("average", 0),
            carries_bytes=at_end.get("carries", 0),
            activations_bytes=self.live.peak_bytes(beside=RESIDENT, since=begun, until=self.passed),
            peak_bytes=self.live.peak_bytes(since=begun, beside=("optimizer",) if offloaded else ()) + in_turn,
        )

    def grow(self, growths: list[Growth], factors: dict[int, float]) -> None:
        """Make this account, of rows of few chunks, that of longer rows and windows.

        What is as long as one of the lengths in `factors`, all primes, grows by its factor. Of what passes leave to
        later ones, each further chunk brings as much more as there is here beyond the account that is less by one. What
        comes and goes within a pass stays.
        """
        more = self._left()
        shares: defaultdict[int, float] = defaultdict(float)
        for growth in growths:
            less = growth.less._left()
            for size in more:
                # A size that the other has not is of what goes by length.
                if size in less:
                    shares[size] += (more[size] - less[size]) / more[size] * growth.further
        for life in self.live.lives:
            factor = next((factor for length, factor in factors.items() if life.bytes % length == 0), None)
            if factor is not None:
                life.bytes = round(life.bytes * factor)
            elif self._is_left(life):
                life.bytes = round(life.bytes * (1 + shares[life.bytes]))

    def _is_left(self, life: Allocation) -> bool:
        """Whether a pass leaves it to a later one."""
        made = life.category == OTHER and life.born > self.begun[0]
        return made and any(life.alive_at(begun) for begun in self.begun[1:])

    def _left(self) -> Counter[int]:
        """How many of each size passes leave to later ones, at the most."""
        most: Counter[int] = Counter()
        left = [life for life in self.live.lives if self._is_left(life)]
        for begun in self.begun[1:]:
            most |= Counter(life.bytes for life in left if life.alive_at(begun))
        return most


@dataclass(frozen=True)
class Growth:
    """The account with one chunk less, of the row or of the window, and how many chunks further it is to go."""

    less: _Watched
    further: float


def _watch(loop: TrainingLoop, batches: list[Batch]) -> _Watched:
    parts, live = loop.parts, StorageTracker()
    begun: list[int] = []
    live.name("weights", (*parts.objective.parameters(), *parts.objective.buffers()))
    live.name("batch", _tensors(batches))
    average = _whole(loop).average
    live.name("average", average.average.values() if average is not None else ())
    with live, _noting(parts.objective, live, begun):
        # An update with gradients of nothing makes the state that the next one finds.
        for parameter in parts.objective.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        states_bytes = _update(loop, live)
        if parts.carried and loop.carries is None:
            loop.carries = [parts.objective.initial_carry(batch) for batch in batches]
        live.name("carries", _tensors(loop.carries))
        # Sums over as many as there are tokens, so that float16 gradients are within their range.
        _, carries = loop.passes(batches, defaultdict(lambda: float(sum(b["inputs"].numel() for b in batches))))
        if parts.carried:
            live.name("carries", _tensors(carries))
            loop.carries = carries
        passed = live.moment
        del carries
        _update(loop, live)
    return _Watched(live, len(batches), states_bytes, begun, passed, live.moment)


def _update(loop: TrainingLoop, live: StorageTracker) -> list[int]:
    """A weight update with what follows it; gives the bytes that the optimizer keeps of each parameter."""
    strategy, parts = _whole(loop), loop.parts
    if parts.sparse is not None:
        parts.sparse.forget()
    strategy.step(parts.grad_clip, 1.0)
    live.name("optimizer", state_tensors(strategy.optimizer))
    return [storage_bytes(state_tensors_of(state)) for state in strategy.optimizer.state.values()]


def _whole(loop: TrainingLoop) -> SingleStrategy:
    """The loop's strategy, which must keep everything on this worker."""
    if not isinstance(loop.parts.strategy, SingleStrategy):
        raise TypeError(f"no estimate for {type(loop.parts.strategy).__name__}")
    return loop.parts.strategy


@contextmanager
def _noting(objective: nn.Module, live: StorageTracker, begun: list[int]) -> Iterator[None]:
    """Tell gradients from activations as they come, and note the moment at which each pass begins."""
    hooks = [objective.register_forward_pre_hook(lambda *_: begun.append(live.moment))]
    hooks += [
        parameter.register_post_accumulate_grad_hook(lambda p: live.name("gradients", [p.grad]))
        for parameter in objective.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _moving_fake_modules() -> Iterator[None]:
    """Let modules of fake tensors be moved and cast: PyTorch would swap two tensors, which those do not bear."""
    real = nn.Module._apply

    def move(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            child._apply(change)
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = change(parameter.data)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
        return module

    nn.Module._apply = move  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = real  # type: ignore[method-assign]


class _Answers(TorchDispatchMode):
    """Answers what no fake tensor can: a number on the host is 1, such as the norm of the gradients, and a whole number
    0, such as where a document begins."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0 if args[0].dtype in (torch.int32, torch.int64) else 1.0
        return func(*args, **(kwargs or {}))


class _FewBlocks(AttentionScope):
    """Of long rows, whose queries are taken a block at a time, the last block alone, which sees the most keys; and once
    more, since what one block leaves is there while the next is computed. Rows of documents have borders."""

    def causal_from(self, queries: int, keys: int) -> int | None:
        return super().causal_from(queries, keys) if self.documents is None else None

    def blocks(self, queries: int, keys: int, size: int) -> list[tuple[slice, slice]]:
        every = super().blocks(queries, keys, size)
        return every if len(every) < 3 else [every[-1], every[-1]]


def _attend(query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope) -> Tensor:
    """Attention as training computes it, in few blocks; an AttentionKernel."""
    few = scope.cached("rehearsed", lambda: _FewBlocks(scope.causal, scope.documents, scope.prompt, scope.window))
    return attend(query, keys, values, few)


class _NoRows:
    """A sample set to assemble a loop with; batches are made without it."""

    def __len__(self) -> int:
        return 1

    def rows(self, indices: npt.NDArray[np.int64]) -> Columns:
        raise AssertionError("a rehearsal reads no samples")


def _batch(loop: TrainingLoop, config: ModelConfig, packing: bool) -> Batch:
    """The columns of one micro-batch, of the types and shapes that samples have."""
    rows, length = loop.parts.shape.batch_size, config.seq_len
    row_wise = {"puzzle_identifiers": torch.int32, "active": torch.bool, "min_steps": torch.int32}
    batch = {name: torch.ones(rows, dtype=kind) for name, kind in row_wise.items()}
    batch |= {name: torch.ones(rows, length, dtype=torch.int32) for name in ("inputs", "labels", "positions")}
    batch = {name: tensor for name, tensor in batch.items() if name in loop.parts.wanted}
    if "prompt" in loop.parts.wanted:
        batch["prompt"] = torch.ones(rows, length, dtype=torch.bool)
    elif packing and config.task == "lm":
        # Where a document begins cannot be asked; attention takes each row for one, which is the most that it sees.
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
