"""Adaptive evaluation of whole rows: each token is read out at the segment where it halts, as in generation with
caches.

A token that halted after segment m keeps its segment-m keys and values in every later segment, at the same cycle, level
and layer (ACTV1_SPEC, section 13). inference/text.py decodes token by token and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.chunk_buffer import ChunkBuffer, CopyStream
from hrm_ray.model.chunked_rows import BufferedStates, ChunkedRows, run_without_grad
from hrm_ray.model.layers import KeysValues
from hrm_ray.model.routing import Site


@dataclass(frozen=True)
class Reading:
    """One segment of adaptive reading: the states (valid until the next segment), the tokens read out after it, and the
    tokens frozen from now on, both bool [B, T]."""

    segment: int
    states: BufferedStates
    reads: Tensor
    frozen: Tensor


def adaptive_segments(model: ActV1, rows: ChunkedRows, stream: CopyStream | None = None) -> Iterator[Reading]:
    """Segment after segment over `rows`, without a graph. A token is read out at the first segment (from 1) where
    q_halt > 0.

    Tokens of a prompt run all segments: under a prefix mask they have no labels, so the head was never trained on them.
    Keys and values of every attention are kept, as generation keeps them (with a `stream` in host memory); activations
    follow the chunk.
    """
    states = BufferedStates.initial(rows, model).copy(stream)
    frozen = torch.zeros(rows.rows, rows.length, dtype=torch.bool, device=rows.batch["inputs"].device)
    kept: dict[Site, tuple[ChunkBuffer, ChunkBuffer]] = {}

    def keys_of_halted(chunk: int, site: Site, keys: Tensor, values: Tensor) -> KeysValues:
        """A chunk's own keys and values [B, heads, T, d]; frozen tokens keep those of the segment before."""
        if site not in kept:
            kept[site] = ChunkBuffer(rows.parts, stream, dim=2), ChunkBuffer(rows.parts, stream, dim=2)
        kept_keys, kept_values = kept[site]
        if segment > 1:
            halted = frozen[:, None, rows.parts[chunk], None]
            keys = torch.where(halted, kept_keys.get(chunk), keys)
            values = torch.where(halted, kept_values.get(chunk), values)
        kept_keys.put(chunk, keys)
        kept_values.put(chunk, values)
        return keys, values

    for segment in range(1, model.config.halt_max_steps + 1):
        run_without_grad(model, rows, states, range(model.config.updates_per_segment), keys_of_halted)
        halts = torch.cat([model.halting_scores(states.z_h.get(chunk))[0] > 0 for chunk in range(len(rows))], dim=1)
        if rows.scope.prompt is not None:
            halts = halts & ~rows.scope.prompt
        if segment == model.config.halt_max_steps:
            halts = torch.ones_like(halts)
        reads = halts & ~frozen
        frozen = frozen | halts
        yield Reading(segment, states, reads, frozen)
