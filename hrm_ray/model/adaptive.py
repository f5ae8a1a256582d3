"""Reading each token out at the segment where it halts, exactly as generation with caches would.

One job: the rule of adaptive reading on whole sequences (ACTV1_SPEC, section 13). A token that halted after segment m
leaves, for every later segment, its segment-m keys and values at the same cycle, level and layer. Token-by-token
generation is in generate.py and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_ray.model.actv1 import ActV1, States
from hrm_ray.model.layers import AttentionScope, Context, Site


class FrozenExchange:
    """Keeps the keys and values of every attention of the last segment; frozen tokens keep theirs."""

    def __init__(self) -> None:
        self._kept: dict[Site, tuple[Tensor, Tensor]] = {}
        self._frozen: Tensor | None = None

    def begin_segment(self, frozen: Tensor) -> None:
        """`frozen` bool [B, T]: tokens that have halted before this segment."""
        self._frozen = frozen.view(frozen.shape[0], 1, frozen.shape[1], 1)

    def exchange(self, site: Site, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, T, d] of this attention, those of frozen tokens replaced by their kept ones."""
        if site not in self._kept:
            self._kept[site] = (keys, values)
            return keys, values
        assert self._frozen is not None
        old_keys, old_values = self._kept[site]
        self._kept[site] = (
            torch.where(self._frozen, old_keys, keys),
            torch.where(self._frozen, old_values, values),
        )
        return self._kept[site]


@dataclass(frozen=True)
class Reading:
    """After one segment of adaptive reading: states, which tokens are read out now, and which are now frozen [B, T]."""

    segment: int
    states: States
    reads: Tensor
    frozen: Tensor


def adaptive_segments(model: ActV1, x: Tensor, scope: AttentionScope, prompt: Tensor | None) -> Iterator[Reading]:
    """Segment after segment over x [B, T, D]; a token is read out at the first segment (from 1) where q_halt > 0.

    `prompt` bool [B, T] marks tokens that think to the end: a prompt under a prefix mask has no labels, so the head was
    never trained there.
    """
    rows, length = x.shape[:2]
    states = model.initial_states(rows, length)
    frozen = torch.zeros(rows, length, dtype=torch.bool, device=x.device)
    cache = FrozenExchange()
    context = Context(scope, model.rotation(0, length), cache)
    for segment in range(1, model.config.halt_max_steps + 1):
        cache.begin_segment(frozen)
        states = model.segment(states, x, context)
        halts = model.halting_scores(states.z_h)[0] > 0
        if prompt is not None:
            halts = halts & ~prompt
        if segment == model.config.halt_max_steps:
            halts = torch.ones_like(halts)
        reads = halts & ~frozen
        frozen = frozen | halts
        yield Reading(segment, states, reads, frozen)
