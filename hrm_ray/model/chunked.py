"""Training on long texts a chunk of positions at a time: a pass is one chunk of one segment.

One job: which chunk is computed when, and what is carried from pass to pass. Memory for activations follows the chunk.

In a segment the updates without gradient come first, over whole rows (chunked_rows.py). Then the updates that carry
gradient go chunk by chunk, each pass with its own backward; a chunk attends to the keys and values that earlier chunks
had in the same segment, update and layer (chunked_passes.py). Numbers are those of whole rows for every chunk size.
Gradients:
- truncated: none flows from a chunk to an earlier one. Passes run from the first chunk to the last.
- exact: those of whole rows. The updates that carry gradient run over the chunks once without a graph, then passes run
  from the last chunk to the first, each computed again, and hand the gradients of earlier keys and values on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hrm_ray.model.actv1 import ActV1, States
from hrm_ray.model.chunked_offload import (
    ChunkBuffer,
    HandleBuffer,
    NoOffload,
    OffloadPolicy,
    empty_buffer,
    offload_policy,
)
from hrm_ray.model.chunked_passes import GraphPasses
from hrm_ray.model.chunked_rows import BufferedStates, ChunkedRows, copied, run_without_grad
from hrm_ray.model.layers import Context
from hrm_ray.model.losses import LossKind
from hrm_ray.model.objective import Batch, SegmentOutput
from hrm_ray.model.router_losses import NO_ROUTER_LOSSES, RouterLosses
from hrm_ray.model.text_objective import OnePassOnText, RolloutOnText, TextCarry
from hrm_ray.model.transformer import Transformer


@dataclass(frozen=True)
class Chunking:
    """How rows are cut: positions of a chunk, whether gradients are exact, and whether what is carried rests in host
    memory."""

    size: int
    exact: bool
    offload: bool = False

    def count(self, length: int) -> int:
        """Chunks of a row."""
        return -(-length // self.size)

    def rows(self, model: ActV1 | Transformer, batch: Batch) -> ChunkedRows:
        """The batch's rows in chunks; as long as the settings say, since those decide the number of passes."""
        rows = ChunkedRows(model, batch, self.size)
        assert len(rows) == self.count(model.config.seq_len)
        return rows


@dataclass(frozen=True)
class ChunkCarry:
    """What goes from pass to pass: segments finished and passes done in the present one, and by chunk the states and
    token losses (nats) that the last segment ended with; the present segment once it has begun."""

    segments: int = 0
    passes: int = 0
    states: BufferedStates | None = None
    token_loss: ChunkBuffer | None = None
    present: Segment | None = None


@dataclass(frozen=True)
class Segment:
    """A segment under way. By chunk: `judged`, the z_H that came with the carry, and its `token_loss`; `states`, those
    that enter the updates with gradient until their pass, and then those that it reached, with their `reached_loss`."""

    graph: GraphPasses
    judged: ChunkBuffer
    token_loss: ChunkBuffer
    states: BufferedStates
    reached_loss: ChunkBuffer


class ChunkedTextObjective(RolloutOnText[ChunkCarry]):
    """ACT on long texts: `halt_max_steps` segments of as many passes as a row has chunks, segment after segment."""

    def __init__(
        self,
        model: ActV1,
        loss: LossKind,
        halt_margin: float,
        chunking: Chunking,
        router_losses: RouterLosses = NO_ROUTER_LOSSES,
    ) -> None:
        super().__init__(model, loss, halt_margin, router_losses)
        self.chunking = chunking
        self._keeper: OffloadPolicy | None = None

    @property
    def passes_per_step(self) -> int:
        return self.segments_per_step * self.chunking.count(self.model.config.seq_len)

    def initial_carry(self, batch: Batch) -> ChunkCarry:
        return ChunkCarry()

    def forward(self, batch: Batch, carry: ChunkCarry) -> SegmentOutput[ChunkCarry]:
        """One chunk of a segment; sums over its valid tokens."""
        present = carry.present if carry.present is not None else self._begun(batch, carry)
        graph, rows = present.graph, present.graph.rows
        chunk = graph.next_chunk(carry.passes)
        context = graph.context(chunk)
        # What is reached takes the place of what entered, before the backward pass: the states enter sums, which keep
        # nothing of them, and autograd would refuse if something did.
        entering = present.states.get(chunk)
        present.states.ahead(graph.chunk_after(chunk))
        with graph.random.again(chunk):
            reached = self._updates_with_gradient(rows, chunk, entering, context)
        came_with = TextCarry(self._came_with(present, chunk), present.token_loss.get(chunk), carry.segments)
        routed = graph.routed(context.routing, chunk, batch["active"], self.router_losses)
        output = self.supervised(came_with, reached, rows.column("labels", chunk), routed)
        present.states.put(chunk, output.carry.states)
        present.reached_loss.put(chunk, output.carry.token_loss)
        return SegmentOutput(output.terms, self._passed(carry, present), output.metrics)

    def _came_with(self, present: Segment, chunk: int) -> States:
        """The states that are judged; only z_H is."""
        z_h = present.judged.get(chunk)
        return States(z_h, z_h)

    def _passed(self, carry: ChunkCarry, present: Segment) -> ChunkCarry:
        """The carry after a pass."""
        if carry.passes + 1 < len(present.graph.rows):
            return ChunkCarry(carry.segments, carry.passes + 1, present=present)
        return ChunkCarry(carry.segments + 1, 0, present.states, present.reached_loss)

    def _begun(self, batch: Batch, carry: ChunkCarry) -> Segment:
        """The segment after the carry's: the updates without gradient done, and what exact gradients need."""
        rows = self.chunking.rows(self.model, batch)
        if self._keeper is None:
            self._keeper = offload_policy(batch["inputs"].device, offload=self.chunking.offload)
        policy = self._keeper
        if carry.states is None or carry.token_loss is None:
            came, token_loss = BufferedStates.initial(rows, self.model), _no_loss(rows)
            states = came.copied(rows, policy)
        else:
            came, token_loss = carry.states, carry.token_loss
            # The z_H that came is judged; the z_L is not needed as it came, and the new one takes its place.
            states = BufferedStates(copied(came.z_h, rows, policy), came.z_l)
        config = self.model.config
        run_without_grad(self.model, rows, states, range(config.updates_per_segment - config.bp_steps))
        graph = GraphPasses.over(rows, self.chunking.exact, policy)
        graph.record(
            lambda chunk, context: self._updates_with_gradient(rows, chunk, states.get(chunk), context),
            ahead=states.ahead,
        )
        return Segment(graph, came.z_h, token_loss, states, empty_buffer(policy, rows.parts))

    def _updates_with_gradient(self, rows: ChunkedRows, chunk: int, states: States, context: Context) -> States:
        """The updates that carry gradient, over one chunk, in the present gradient mode."""
        config = self.model.config
        first = config.updates_per_segment - config.bp_steps
        return self.model.updates(states, rows.injection(chunk), context, first, config.updates_per_segment)


def _no_loss(rows: ChunkedRows) -> ChunkBuffer:
    """Before the first segment."""
    shelf = HandleBuffer(NoOffload(), len(rows))
    for chunk in range(len(rows)):
        shelf.put(chunk, torch.zeros((), device=rows.batch["inputs"].device).expand(rows.column("inputs", chunk).shape))
    return shelf


@dataclass(frozen=True)
class TransformerCarry:
    """Passes done, and what they hand to one another once the first has begun."""

    passes: int
    graph: GraphPasses | None


class ChunkedTransformerObjective(OnePassOnText[TransformerCarry]):
    """The baseline transformer on long texts: every layer carries gradient, and there is one segment."""

    def __init__(
        self,
        model: Transformer,
        loss: LossKind,
        chunking: Chunking,
        router_losses: RouterLosses = NO_ROUTER_LOSSES,
    ) -> None:
        super().__init__(model, loss, router_losses)
        self.chunking = chunking
        self._keeper: OffloadPolicy | None = None

    @property
    def passes_per_step(self) -> int:
        return self.chunking.count(self.model.config.seq_len)

    def initial_carry(self, batch: Batch) -> TransformerCarry:
        return TransformerCarry(0, None)

    def forward(self, batch: Batch, carry: TransformerCarry) -> SegmentOutput[TransformerCarry]:
        """One chunk; sums over its valid tokens."""
        graph = carry.graph if carry.graph is not None else self._begun(batch)
        chunk = graph.next_chunk(carry.passes)
        context = graph.context(chunk)
        with graph.random.again(chunk):
            hidden = self.model(graph.rows.injection(chunk), context)
        routed = graph.routed(context.routing, chunk, batch["active"], self.router_losses)
        terms, metrics = self.supervised(hidden, graph.rows.column("labels", chunk), routed)
        return SegmentOutput(terms, TransformerCarry(carry.passes + 1, graph), metrics)

    def _begun(self, batch: Batch) -> GraphPasses:
        rows = self.chunking.rows(self.model, batch)
        if self._keeper is None:
            self._keeper = offload_policy(batch["inputs"].device, offload=self.chunking.offload)
        graph = GraphPasses.over(rows, self.chunking.exact, self._keeper)
        graph.record(lambda chunk, context: self.model(rows.injection(chunk), context))
        return graph
