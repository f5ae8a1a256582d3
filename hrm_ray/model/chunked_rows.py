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
from hrm_ray.model.chunked_caches import Passed
from hrm_ray.model.chunked_rest import Here, Keeper, Rest
from hrm_ray.model.layers import Context, KeyValueExchange, Level
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

    def context(self, chunk: int, cache: KeyValueExchange | None, routing: Routing | None = None) -> Context:
        """What the layers are told about this chunk; its keys begin where its first position's reach does."""
        part = self.parts[chunk]
        first = 0 if self.window is None else max(part.start - self.window + 1, 0)
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


class Shelf:
    """One tensor per chunk, at rest between uses."""

    def __init__(self, keeper: Keeper, count: int) -> None:
        self._keeper = keeper
        self._rests: list[Rest | None] = [None] * count

    def copy(self) -> Shelf:
        """A shelf of its own with the same tensors."""
        other = Shelf(self._keeper, 0)
        other._rests = list(self._rests)
        return other

    def put(self, chunk: int, tensor: Tensor) -> None:
        self._rests[chunk] = self._keeper.rest(tensor)

    def get(self, chunk: int) -> Tensor:
        """The chunk's tensor; the next one's way here begins."""
        rest = self._rests[chunk]
        assert rest is not None
        if chunk + 1 < len(self._rests):
            self.ahead(chunk + 1)
        return rest.fetch()

    def ahead(self, chunk: int) -> None:
        """Begin to fetch."""
        rest = self._rests[chunk]
        if rest is not None:
            rest.ahead()

    def drop(self, chunk: int) -> None:
        """It will not be needed any more."""
        self._rests[chunk] = None


@dataclass(frozen=True)
class ShelvedStates:
    """Both hidden states by chunk."""

    z_h: Shelf
    z_l: Shelf

    @classmethod
    def empty(cls, keeper: Keeper, count: int) -> ShelvedStates:
        return cls(Shelf(keeper, count), Shelf(keeper, count))

    @classmethod
    def initial(cls, rows: ChunkedRows, model: ActV1) -> ShelvedStates:
        """The starting states; they take no room, so they stay on the device."""
        states = cls.empty(Here(), len(rows))
        for chunk, part in enumerate(rows.parts):
            states.put(chunk, model.initial_states(rows.rows, part.stop - part.start))
        return states

    def copy(self) -> ShelvedStates:
        """Shelves of their own with the same tensors."""
        return ShelvedStates(self.z_h.copy(), self.z_l.copy())

    def put(self, chunk: int, states: States) -> None:
        self.z_h.put(chunk, states.z_h)
        self.z_l.put(chunk, states.z_l)

    def get(self, chunk: int) -> States:
        return States(self.z_h.get(chunk), self.z_l.get(chunk))

    def drop(self, chunk: int) -> None:
        self.z_h.drop(chunk)
        self.z_l.drop(chunk)


ExchangeOf = Callable[[Site], "Callable[[int], KeyValueExchange]"]
"""For an attention, what its chunks exchange keys and values with, by chunk."""


def passed(rows: ChunkedRows) -> ExchangeOf:
    """One cache for all chunks of an attention, gone when the next attention begins."""

    def of_site(site: Site) -> Callable[[int], KeyValueExchange]:
        cache = Passed(rows.length, rows.window)
        return lambda chunk: cache

    return of_site


@torch.no_grad()
def sweep(
    model: ActV1,
    rows: ChunkedRows,
    states: ShelvedStates,
    updates: range,
    keeper: Keeper,
    exchanges: ExchangeOf | None = None,
) -> ShelvedStates:
    """The states after these `updates` of a segment, computed without a graph; those given stay as they are."""
    z_h, z_l = states.z_h, states.z_l
    routings = rows.routings()
    exchanges = passed(rows) if exchanges is None else exchanges
    for number in updates:
        if number % (model.config.l_cycles + 1) < model.config.l_cycles:

            def entering(chunk: int, z_h: Shelf = z_h, z_l: Shelf = z_l) -> Tensor:
                return z_l.get(chunk) + (z_h.get(chunk) + rows.injection(chunk))

            z_l = through_level(model.L_level, rows, entering, number, keeper, exchanges, routings)
        else:

            def joining(chunk: int, z_h: Shelf = z_h, z_l: Shelf = z_l) -> Tensor:
                return z_h.get(chunk) + z_l.get(chunk)

            z_h = through_level(model.H_level, rows, joining, number, keeper, exchanges, routings)
    return ShelvedStates(z_h, z_l)


@torch.no_grad()
def through_level(
    level: Level,
    rows: ChunkedRows,
    entering: Callable[[int], Tensor],
    update: int,
    keeper: Keeper,
    exchanges: ExchangeOf,
    routings: list[Routing | None],
) -> Shelf:
    """Chunks of what leaves a level, from `entering`, the chunks of what enters it with its injection."""
    source = entering
    hidden = Shelf(keeper, len(rows))
    for layer, block in enumerate(level.layers):
        exchange = exchanges((update, layer))
        for chunk in range(len(rows)):
            context = rows.context(chunk, exchange(chunk), routings[chunk]).at(update)
            hidden.put(chunk, block(source(chunk), context, layer))
        source = hidden.get
    return hidden
