"""Reading each token out at the segment where it halts, exactly as generation with caches would.

One job: the rule of adaptive reading on whole sequences (ACTV1_SPEC, section 13). A token that halted after segment m
leaves, for every later segment, its segment-m keys and values at the same cycle, level and layer. Token-by-token
generation is in generate.py and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.chunked_offload import Handle, OffloadPolicy
from hrm_ray.model.chunked_rows import BufferedStates, ChunkedRows, run_without_grad, single_pass_cache
from hrm_ray.model.layers import KVCache
from hrm_ray.model.routing import Site


class FrozenKeys:
    """Keeps the keys and values of every attention of the last segment, by chunk; frozen tokens keep theirs."""

    def __init__(self, rows: ChunkedRows, policy: OffloadPolicy) -> None:
        self._rows = rows
        self._keeper = policy
        self._kept: dict[tuple[Site, int], tuple[Handle, Handle]] = {}
        self._frozen: Tensor | None = None

    def begin_segment(self, frozen: Tensor) -> None:
        """`frozen` bool [B, T]: tokens that have halted before this segment."""
        self._frozen = frozen

    def of_site(self, site: Site) -> Callable[[int], KVCache]:
        """What the chunks of one attention exchange with, see ExchangeOf."""
        earlier = single_pass_cache(self._rows)(site)
        return lambda chunk: _FrozenChunk(self, earlier(chunk), chunk)

    def replaced(self, site: Site, chunk: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk's keys and values [B, heads, T, d], those of frozen tokens replaced by their kept ones."""
        assert self._frozen is not None
        place = (site, chunk)
        if place in self._kept:
            old = [rest.fetch() for rest in self._kept[place]]
            frozen = self._frozen[:, None, self._rows.parts[chunk], None]
            keys, values = torch.where(frozen, old[0], keys), torch.where(frozen, old[1], values)
        self._kept[place] = (self._keeper.rest(keys), self._keeper.rest(values))
        return keys, values


class _FrozenChunk:
    def __init__(self, frozen: FrozenKeys, earlier: KVCache | None, chunk: int) -> None:
        self._frozen = frozen
        self._earlier = earlier
        self._chunk = chunk

    def exchange(self, site: Site, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        own = self._frozen.replaced(site, self._chunk, keys, values)
        return own if self._earlier is None else self._earlier.exchange(site, *own)


@dataclass(frozen=True)
class Reading:
    """After one segment of adaptive reading: states, until the next one begins, which tokens are read out now, and
    which are now frozen [B, T]."""

    segment: int
    states: BufferedStates
    reads: Tensor
    frozen: Tensor


def adaptive_segments(model: ActV1, rows: ChunkedRows, policy: OffloadPolicy) -> Iterator[Reading]:
    """Segment after segment over `rows`; a token is read out at the first segment (from 1) where q_halt > 0.

    Tokens of a prompt think to the end: under a prefix mask they have no labels, so the head was never trained there.
    Without a graph. Keys and values of every attention are kept, as generation keeps them; activations follow the
    chunk.
    """
    states = BufferedStates.initial(rows, model).copied(rows, policy)
    frozen = torch.zeros(rows.rows, rows.length, dtype=torch.bool, device=rows.batch["inputs"].device)
    keys = FrozenKeys(rows, policy)
    for segment in range(1, model.config.halt_max_steps + 1):
        keys.begin_segment(frozen)
        run_without_grad(model, rows, states, range(model.config.updates_per_segment), keys.of_site)
        halts = torch.cat([model.halting_scores(states.z_h.get(chunk))[0] > 0 for chunk in range(len(rows))], dim=1)
        if rows.scope.prompt is not None:
            halts = halts & ~rows.scope.prompt
        if segment == model.config.halt_max_steps:
            halts = torch.ones_like(halts)
        reads = halts & ~frozen
        frozen = frozen | halts
        yield Reading(segment, states, reads, frozen)
