"""A batch of text rows cut into chunks, and passes over them that keep no graph.

One job: what each chunk needs of the batch, and the network's updates over whole rows layer by layer, every layer chunk
after chunk, so that one attention's keys and values live at a time. Numbers are those of the uncut rows, whatever the
chunks. Passes with a graph are in chunked.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_ray.model.actv1 import ActV1, States
from hrm_ray.model.chunked_caches import RowKeys, first_seen
from hrm_ray.model.chunked_offload import ChunkBuffer, HandleBuffer, NoOffload, OffloadPolicy, empty_buffer
from hrm_ray.model.layers import Context, KVCache, Level
from hrm_ray.model.objective import Batch
from hrm_ray.model.router_losses import text_routing
from hrm_ray.model.routing import Routing, Site
from hrm_ray.model.scope import text_scope
from hrm_ray.model.transformer import Transformer


class ChunkedRows:
    """Rows of a text batch and their chunks of `size` positions (the last may be shorter), numbered from 0."""

    def __init__(self, model: ActV1 | Transformer, batch: Batch, size: int) -> None:
        self.model = model
        self.batch = batch
        self.rows, self.length = batch["inputs"].shape
        self.parts = [slice(at, min(at + size, self.length)) for at in range(0, self.length, size)]
        self.window = model.config.window_size
        self.scope = text_scope(batch.get("documents"), batch.get("prompt"), self.window)
        assert len(self.parts) == 1 or self.scope.prompt is None, "a prompt cannot be read a part at a time"

    def __len__(self) -> int:
        return len(self.parts)

    def column(self, name: str, chunk: int) -> Tensor:
        """A column of the batch [B, chunk]."""
        return self.batch[name][:, self.parts[chunk]]

    def injection(self, chunk: int) -> Tensor:
        """x of the chunk's positions [B, chunk, D], in the present gradient mode."""
        positions = None
        if self.model.config.pos_encodings == "learned":
            part = self.parts[chunk]
            if "positions" in self.batch:
                positions = self.column("positions", chunk)
            else:
                positions = torch.arange(part.start, part.stop, device=self.batch["inputs"].device).unsqueeze(0)
        x: Tensor = self.model.embedding(self.column("inputs", chunk), None, positions)
        return x

    def context(self, chunk: int, cache: KVCache | None, routing: Routing | None = None) -> Context:
        """What the layers are told about this chunk; its keys begin where its first position's reach does."""
        part = self.parts[chunk]
        first = first_seen(part.start, self.window)
        # Made anew each time: the masks that a scope remembers must not outlive the chunk.
        scope = self.scope if len(self) == 1 else self.scope.part(first, part.stop)
        return Context(scope, self.model.rotation(part.start, part.stop), cache, routing=routing)

    def routings(self) -> list[Routing | None]:
        """Records for the routers, one for each chunk, each knowing what the chunks before it have chosen."""
        found: list[Routing | None] = []
        whole = text_routing(self.model.config, self.batch["labels"]) if self.model.config.num_experts else None
        for part in self.parts:
            counted = None if whole is None or whole.counted is None else whole.counted[:, part]
            before = found[-1] if found else None
            if whole is None:
                found.append(None)
            else:
                found.append(Routing(self.length, counted) if before is None else before.next_chunk(counted))
        return found


def copied(shelf: ChunkBuffer, rows: ChunkedRows, policy: OffloadPolicy) -> ChunkBuffer:
    """A shelf of its own with the same tensors."""
    copy = empty_buffer(policy, rows.parts)
    for chunk in range(len(rows)):
        shelf.ahead(chunk + 1)
        copy.put(chunk, shelf.get(chunk))
    return copy


@dataclass(frozen=True)
class BufferedStates:
    """Both hidden states by chunk."""

    z_h: ChunkBuffer
    z_l: ChunkBuffer

    @classmethod
    def initial(cls, rows: ChunkedRows, model: ActV1) -> BufferedStates:
        """The starting states; they take no room."""
        shelves = cls(HandleBuffer(NoOffload(), len(rows)), HandleBuffer(NoOffload(), len(rows)))
        for chunk, part in enumerate(rows.parts):
            shelves.put(chunk, model.initial_states(rows.rows, part.stop - part.start))
        return shelves

    def copied(self, rows: ChunkedRows, policy: OffloadPolicy) -> BufferedStates:
        """Shelves of their own with the same tensors, which may then be changed."""
        return BufferedStates(copied(self.z_h, rows, policy), copied(self.z_l, rows, policy))

    def put(self, chunk: int, states: States) -> None:
        self.z_h.put(chunk, states.z_h)
        self.z_l.put(chunk, states.z_l)

    def get(self, chunk: int) -> States:
        return States(self.z_h.get(chunk), self.z_l.get(chunk))

    def ahead(self, chunk: int) -> None:
        self.z_h.ahead(chunk)
        self.z_l.ahead(chunk)


ExchangeOf = Callable[[Site], "Callable[[int], KVCache | None]"]
"""For an attention, what its chunks exchange keys and values with, by chunk."""


class ChunkExchange:
    """One chunk's exchange with keys and values of its row that live as long as one attention is passed."""

    def __init__(self, keys: RowKeys, chunk: int) -> None:
        self._keys = keys
        self._chunk = chunk

    def exchange(self, site: Site, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See KVCache."""
        self._keys.put(self._chunk, keys, values)
        return self._keys.seen(self._chunk, keys, values)


def single_pass_cache(rows: ChunkedRows) -> ExchangeOf:
    """One cache for all chunks of an attention, gone when the next attention begins."""

    def of_site(site: Site) -> Callable[[int], KVCache | None]:
        if len(rows) == 1:
            return lambda chunk: None
        keys = RowKeys(rows.parts, rows.window, slides=True)
        return lambda chunk: ChunkExchange(keys, chunk)

    return of_site


@torch.no_grad()
def run_without_grad(
    model: ActV1, rows: ChunkedRows, states: BufferedStates, updates: range, exchanges: ExchangeOf | None = None
) -> None:
    """Take `states`, in place, through these `updates` of a segment, without a graph."""
    z_h, z_l = states.z_h, states.z_l
    routings = rows.routings()
    exchanges = single_pass_cache(rows) if exchanges is None else exchanges

    def entering_l(chunk: int) -> Tensor:
        states.ahead(chunk + 1)
        return z_l.get(chunk) + (z_h.get(chunk) + rows.injection(chunk))

    def entering_h(chunk: int) -> Tensor:
        states.ahead(chunk + 1)
        return z_h.get(chunk) + z_l.get(chunk)

    for number in updates:
        if number % (model.config.l_cycles + 1) < model.config.l_cycles:
            run_level(model.L_level, rows, entering_l, z_l, number, exchanges, routings)
        else:
            run_level(model.H_level, rows, entering_h, z_h, number, exchanges, routings)


@torch.no_grad()
def run_level(
    level: Level,
    rows: ChunkedRows,
    entering: Callable[[int], Tensor],
    hidden: ChunkBuffer,
    update: int,
    exchanges: ExchangeOf,
    routings: list[Routing | None],
) -> None:
    """Fill `hidden` with what leaves a level, given the chunks of what enters it, its injection included.

    A chunk of `hidden` may be part of what enters: it is laid down after it was taken.
    """

    def between(chunk: int) -> Tensor:
        hidden.ahead(chunk + 1)
        return hidden.get(chunk)

    source = entering
    for layer, block in enumerate(level.layers):
        exchange = exchanges((update, layer))
        for chunk in range(len(rows)):
            context = rows.context(chunk, exchange(chunk), routings[chunk]).at(update)
            hidden.put(chunk, block(source(chunk), context, layer))
        source = between
