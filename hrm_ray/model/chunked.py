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

from dataclasses import dataclass, replace

import torch

from hrm_ray.model.actv1 import ActV1, States
from hrm_ray.model.chunked_passes import GraphPasses
from hrm_ray.model.chunked_rest import Keeper, keeper_on
from hrm_ray.model.chunked_rows import ChunkedRows, Shelf, ShelvedStates, sweep
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
    """What goes from pass to pass: segments finished and passes done in the present one, the states and token losses
    that the present segment started from, and the segment itself once it has begun."""

    segments: int
    passes: int
    states: ShelvedStates | None
    token_loss: Shelf | None
    present: Segment | None


@dataclass(frozen=True)
class Segment:
    """A segment under way: the states that enter the updates with gradient, the states and losses reached so far."""

    graph: GraphPasses
    entering: ShelvedStates
    reached: ShelvedStates
    token_loss: Shelf


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
        self._keeper: Keeper | None = None

    @property
    def passes_per_step(self) -> int:
        return self.segments_per_step * self.chunking.count(self.model.config.seq_len)

    def initial_carry(self, batch: Batch) -> ChunkCarry:
        return ChunkCarry(0, 0, None, None, None)

    def forward(self, batch: Batch, carry: ChunkCarry) -> SegmentOutput[ChunkCarry]:
        """One chunk of a segment; sums over its valid tokens."""
        if carry.present is None:
            carry = self._begun(batch, carry)
        states, token_loss, present = carry.states, carry.token_loss, carry.present
        assert states is not None and token_loss is not None and present is not None
        graph, rows = present.graph, present.graph.rows
        chunk = graph.next_chunk(carry.passes)
        context = graph.context(chunk)
        with graph.random.again(chunk):
            reached = self._updates_with_gradient(present, chunk, context)
        came_with = TextCarry(states.get(chunk), token_loss.get(chunk), carry.segments)
        routed = graph.routed(context.routing, chunk, batch["active"], self.router_losses)
        output = self.supervised(came_with, reached, rows.column("labels", chunk), routed)
        present.reached.put(chunk, output.carry.states)
        present.token_loss.put(chunk, output.carry.token_loss)
        return SegmentOutput(output.terms, self._passed(carry, present, chunk), output.metrics)

    def _passed(self, carry: ChunkCarry, present: Segment, chunk: int) -> ChunkCarry:
        """The carry after a pass; what no later pass needs is let go."""
        present.entering.drop(chunk)
        if carry.passes + 1 < len(present.graph.rows):
            return replace(carry, passes=carry.passes + 1)
        return ChunkCarry(carry.segments + 1, 0, present.reached, present.token_loss, None)

    def _begun(self, batch: Batch, carry: ChunkCarry) -> ChunkCarry:
        """The carry with its segment begun: the updates without gradient done, and what exact gradients need."""
        rows = self.chunking.rows(self.model, batch)
        if self._keeper is None:
            self._keeper = keeper_on(batch["inputs"].device, offload=self.chunking.offload)
        keeper = self._keeper
        states, token_loss = carry.states, carry.token_loss
        if states is None or token_loss is None:
            states, token_loss = ShelvedStates.initial(rows, self.model), Shelf(keeper, len(rows))
            for chunk in range(len(rows)):
                token_loss.put(chunk, torch.zeros_like(rows.column("labels", chunk), dtype=torch.float32))
        config = self.model.config
        entering = sweep(self.model, rows, states, range(config.updates_per_segment - config.bp_steps), keeper)
        graph = GraphPasses.over(rows, self.chunking.exact, keeper)
        present = Segment(graph, entering.copy(), ShelvedStates.empty(keeper, len(rows)), Shelf(keeper, len(rows)))
        graph.record(lambda chunk, context: self._updates_with_gradient(present, chunk, context))
        return replace(carry, states=states, token_loss=token_loss, present=present)

    def _updates_with_gradient(self, present: Segment, chunk: int, context: Context) -> States:
        """The updates that carry gradient, over one chunk, in the present gradient mode."""
        config = self.model.config
        first = config.updates_per_segment - config.bp_steps
        x = present.graph.rows.injection(chunk)
        return self.model.updates(present.entering.get(chunk), x, context, first, config.updates_per_segment)


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
        self._keeper: Keeper | None = None

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
            self._keeper = keeper_on(batch["inputs"].device, offload=self.chunking.offload)
        graph = GraphPasses.over(rows, self.chunking.exact, self._keeper)
        graph.record(lambda chunk, context: self.model(rows.injection(chunk), context))
        return graph
