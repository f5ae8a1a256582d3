"""Training on long texts a chunk of positions at a time: a pass is one chunk of one segment.

Memory for activations follows the chunk. In a segment the updates without gradient come first, over whole rows
(chunked_rows.py). Then the updates with gradient go chunk by chunk, each pass with its own backward; a chunk attends to
the keys and values of earlier chunks of the same segment, update and layer (chunked_passes.py). Losses and states are
those of whole rows for every chunk size. Gradients:
- truncated: none flows from a chunk to an earlier one. Passes run from the first chunk to the last.
- exact: those of whole rows. The updates with gradient run once over the chunks without a graph; then passes run from
  the last chunk to the first, compute each again, and hand the gradients of earlier keys and values on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hrm_ray.model.actv1 import ActV1, States
from hrm_ray.model.chunk_buffer import ChunkBuffer, CopyStream, copy_stream
from hrm_ray.model.chunked_passes import GraphPasses
from hrm_ray.model.chunked_rows import BufferedStates, ChunkedRows, run_without_grad
from hrm_ray.model.layers import Context
from hrm_ray.model.losses import LossKind
from hrm_ray.model.objective import Batch, SegmentOutput
from hrm_ray.model.router_losses import NO_ROUTER_LOSSES, RouterLosses
from hrm_ray.model.text_objective import OnePassOnText, RolloutOnText, TextCarry
from hrm_ray.model.transformer import Transformer


@dataclass(frozen=True)
class Chunking:
    """How rows are cut: positions per chunk, whether gradients are exact, and whether tensors passed between passes are
    kept in host memory."""

    size: int
    exact: bool
    offload: bool = False

    def count(self, length: int) -> int:
        """Chunks of a row."""
        return -(-length // self.size)

    def rows(self, model: ActV1 | Transformer, batch: Batch) -> ChunkedRows:
        """The batch's rows in chunks."""
        rows = ChunkedRows(model, batch, self.size)
        # Settings decide the number of passes, so that it is the same on every rank.
        if len(rows) != self.count(model.config.seq_len):
            raise ValueError(f"rows of {rows.length} positions for a model of {model.config.seq_len}")
        return rows

    def stream(self, batch: Batch) -> CopyStream | None:
        """The stream to host memory, if anything is kept there."""
        return copy_stream(batch["inputs"].device, offload=self.offload)


@dataclass(frozen=True)
class Segment:
    """A segment under way, by chunk: `previous_z_h` and `previous_loss` of the segment before, and the `states` and
    token losses (nats) of this one. Until a chunk's pass, its states are those that the updates with gradient start
    from."""

    passes: GraphPasses
    previous_z_h: ChunkBuffer
    previous_loss: ChunkBuffer
    states: BufferedStates
    token_loss: ChunkBuffer


@dataclass(frozen=True)
class ChunkCarry:
    """Segments done, and passes done in the current segment; the states and token losses that the last segment ended
    with, or the present segment once it has begun."""

    segments: int = 0
    passes: int = 0
    states: BufferedStates | None = None
    token_loss: ChunkBuffer | None = None
    segment: Segment | None = None


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

    @property
    def passes_per_step(self) -> int:
        return self.segments_per_step * self.chunking.count(self.model.config.seq_len)

    def initial_carry(self, batch: Batch) -> ChunkCarry:
        return ChunkCarry()

    def forward(self, batch: Batch, carry: ChunkCarry) -> SegmentOutput[ChunkCarry]:
        """One chunk of a segment; sums over its valid tokens."""
        segment = carry.segment or self._new_segment(batch, carry)
        passes, rows = segment.passes, segment.passes.rows
        chunk = passes.chunk_of(carry.passes)
        context = passes.context(chunk)
        start = segment.states.get(chunk)
        segment.states.prefetch(passes.chunk_of(carry.passes + 1))
        end = self._updates_with_gradient(rows, chunk, start, context)
        # Only z_H is judged.
        z_h = segment.previous_z_h.get(chunk)
        previous = TextCarry(States(z_h, z_h), segment.previous_loss.get(chunk), carry.segments)
        routed = passes.router_terms(context.routing, chunk, batch["active"], self.router_losses)
        output = self.supervised(previous, end, rows.column("labels", chunk), routed)
        # The new states replace the old ones before the backward pass: the old ones enter sums only, of which autograd
        # saves nothing, and it would refuse if one were saved.
        segment.states.put(chunk, output.carry.states)
        segment.token_loss.put(chunk, output.carry.token_loss)
        if carry.passes + 1 < len(rows):
            new_carry = ChunkCarry(carry.segments, carry.passes + 1, segment=segment)
        else:
            new_carry = ChunkCarry(carry.segments + 1, 0, segment.states, segment.token_loss)
        return SegmentOutput(output.terms, new_carry, output.metrics)

    def _new_segment(self, batch: Batch, carry: ChunkCarry) -> Segment:
        """The next segment: its updates without gradient done, and its chunks recorded where gradients are exact."""
        rows, stream = self.chunking.rows(self.model, batch), self.chunking.stream(batch)
        if carry.states is None or carry.token_loss is None:
            previous_states = BufferedStates.initial(rows, self.model)
            states = previous_states.copy(stream)
            no_loss = torch.zeros((), device=batch["inputs"].device).expand(rows.rows, rows.length)
            previous_loss = ChunkBuffer.of_row(no_loss, rows.parts)
        else:
            previous_states, previous_loss = carry.states, carry.token_loss
            # z_H is judged as it was, so it is copied; z_L is not needed any more and changed in place.
            states = BufferedStates(previous_states.z_h.copy(stream), previous_states.z_l)
        config = self.model.config
        run_without_grad(self.model, rows, states, range(config.updates_per_segment - config.bp_steps))
        passes = GraphPasses(rows, self.chunking.exact, stream)
        passes.record(
            lambda chunk, context: self._updates_with_gradient(rows, chunk, states.get(chunk), context),
            prefetch=states.prefetch,
        )
        return Segment(passes, previous_states.z_h, previous_loss, states, ChunkBuffer(rows.parts, stream))

    def _updates_with_gradient(self, rows: ChunkedRows, chunk: int, states: States, context: Context) -> States:
        """The updates that carry gradient, over one chunk, in the current gradient mode."""
        config = self.model.config
        first = config.updates_per_segment - config.bp_steps
        return self.model.updates(states, rows.injection(chunk), context, first, config.updates_per_segment)


@dataclass(frozen=True)
class TransformerCarry:
    """Passes done, and what they share once the first has begun."""

    done: int = 0
    passes: GraphPasses | None = None


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

    @property
    def passes_per_step(self) -> int:
        return self.chunking.count(self.model.config.seq_len)

    def initial_carry(self, batch: Batch) -> TransformerCarry:
        return TransformerCarry()

    def forward(self, batch: Batch, carry: TransformerCarry) -> SegmentOutput[TransformerCarry]:
        """One chunk; sums over its valid tokens."""
        passes = carry.passes
        if passes is None:
            passes = GraphPasses(
                self.chunking.rows(self.model, batch), self.chunking.exact, self.chunking.stream(batch)
            )
            rows = passes.rows
            passes.record(lambda chunk, context: self.model(rows.injection(chunk), context))
        chunk = passes.chunk_of(carry.done)
        context = passes.context(chunk)
        hidden = self.model(passes.rows.injection(chunk), context)
        routed = passes.router_terms(context.routing, chunk, batch["active"], self.router_losses)
        terms, metrics = self.supervised(hidden, passes.rows.column("labels", chunk), routed)
        return SegmentOutput(terms, TransformerCarry(carry.done + 1, passes), metrics)
