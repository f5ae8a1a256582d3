"""A batch of text rows cut into chunks, and passes over them without a graph.

Such a pass goes layer by layer, and in each layer chunk by chunk, so that only one attention's keys and values are held
at a time. Its numbers are those of whole rows for every chunk size. Passes with a graph are in chunked_passes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hrm_ray.model.actv1 import ActV1, States
from hrm_ray.model.chunk_buffer import ChunkBuffer, CopyStream, KVBuffer, first_seen
from hrm_ray.model.dropout import Draws
from hrm_ray.model.layers import Context, KeysValues, KVCache, Level
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
        if len(self.parts) > 1 and self.scope.prompt is not None:
            raise ValueError("rows with a prompt, which sees itself fully, cannot be cut into chunks")

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
        """The layers' context for this chunk. Its keys begin where the window of its first position does."""
        part = self.parts[chunk]
        # A new scope for each pass: the masks that a scope caches must not outlive the chunk.
        scope = self.scope if len(self) == 1 else self.scope.part(first_seen(part.start, self.window), part.stop)
        rotation, draws = self.model.rotation(part.start, part.stop), Draws.of(self.batch, part.start)
        return Context(scope, rotation, cache, routing=routing, draws=draws)

    def routings(self) -> list[Routing | None]:
        """A router record for each chunk, which continues the counts of the chunks before."""
        whole = text_routing(self.model.config, self.batch["labels"]) if self.model.config.num_experts else None
        if whole is None or whole.counted is None:
            return [None] * len(self)
        records = [Routing(self.length, whole.counted[:, self.parts[0]])]
        for part in self.parts[1:]:
            records.append(records[-1].next_chunk(whole.counted[:, part]))
        return list(records)


@dataclass(frozen=True)
class BufferedStates:
    """Both hidden states by chunk."""

    z_h: ChunkBuffer
    z_l: ChunkBuffer

    @classmethod
    def initial(cls, rows: ChunkedRows, model: ActV1) -> BufferedStates:
        """The starting states, for reading only; they need no memory."""
        states = model.initial_states(rows.rows, rows.length)
        return cls(ChunkBuffer.of_row(states.z_h, rows.parts), ChunkBuffer.of_row(states.z_l, rows.parts))

    def copy(self, stream: CopyStream | None) -> BufferedStates:
        """Buffers with the same states, which may then be changed."""
        return BufferedStates(self.z_h.copy(stream), self.z_l.copy(stream))

    def put(self, chunk: int, states: States) -> None:
        self.z_h.put(chunk, states.z_h)
        self.z_l.put(chunk, states.z_l)

    def get(self, chunk: int) -> States:
        return States(self.z_h.get(chunk), self.z_l.get(chunk))

    def prefetch(self, chunk: int) -> None:
        """Begin to copy a chunk's states to the device, if there is such a chunk."""
        self.z_h.prefetch(chunk)
        self.z_l.prefetch(chunk)


ReplaceKeys = Callable[[int, Site, Tensor, Tensor], KeysValues]
"""Takes a chunk's number, an attention and the chunk's own keys and values; gives those to use instead."""


@torch.no_grad()
def run_without_grad(
    model: ActV1, rows: ChunkedRows, states: BufferedStates, updates: range, replace: ReplaceKeys | None = None
) -> None:
    """Run these `updates` of a segment on `states`, in place, without a graph."""
    z_h, z_l = states.z_h, states.z_l
    routings = rows.routings()

    def l_input(chunk: int) -> Tensor:
        states.prefetch(chunk + 1)
        return z_l.get(chunk) + (z_h.get(chunk) + rows.injection(chunk))

    def h_input(chunk: int) -> Tensor:
        states.prefetch(chunk + 1)
        return z_h.get(chunk) + z_l.get(chunk)

    for number in updates:
        if model.is_l_update(number):
            run_level(model.L_level, rows, l_input, z_l, number, routings, replace)
        else:
            run_level(model.H_level, rows, h_input, z_h, number, routings, replace)


@torch.no_grad()
def run_level(
    level: Level,
    rows: ChunkedRows,
    level_input: Callable[[int], Tensor],
    output: ChunkBuffer,
    update: int,
    routings: list[Routing | None],
    replace: ReplaceKeys | None = None,
) -> None:
    """Write to `output` what a level makes of `level_input`, both by chunk; the injection is part of the input.

    The input may read from `output`: a chunk is read before it is overwritten.
    """

    def between_layers(chunk: int) -> Tensor:
        output.prefetch(chunk + 1)
        return output.get(chunk)

    source = level_input
    for layer, block in enumerate(level.layers):
        buffer = KVBuffer(rows.parts, rows.window) if len(rows) > 1 else None
        for chunk in range(len(rows)):
            cache = None if buffer is None and replace is None else partial(_cached, buffer, replace, chunk)
            context = rows.context(chunk, cache, routings[chunk]).at(update)
            output.put(chunk, block(source(chunk), context, layer))
        source = between_layers


def _cached(
    buffer: KVBuffer | None, replace: ReplaceKeys | None, chunk: int, site: Site, keys: Tensor, values: Tensor
) -> KeysValues:
    """See KVCache."""
    if replace is not None:
        keys, values = replace(chunk, site, keys, values)
    return (keys, values) if buffer is None else buffer.update(chunk, keys, values)


@torch.no_grad()
def final_states(model: ActV1 | Transformer, rows: ChunkedRows, stream: CopyStream | None = None) -> ChunkBuffer:
    """The states that tokens are predicted from, by chunk: z_H after all segments, or the transformer's output."""
    if isinstance(model, Transformer):
        hidden = ChunkBuffer(rows.parts, stream)
        run_level(model.stack, rows, rows.injection, hidden, 0, rows.routings())
        return hidden
    states = BufferedStates.initial(rows, model).copy(stream)
    for _ in range(model.config.halt_max_steps):
        run_without_grad(model, rows, states, range(model.config.updates_per_segment))
    return states.z_h
