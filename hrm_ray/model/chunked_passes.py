"""The passes of one segment that carry gradient, one chunk of positions each, and what they pass to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm_ray.model.chunk_buffer import CopyStream, KVBuffer, OffloadedTensor, first_seen
from hrm_ray.model.chunked_rows import ChunkedRows
from hrm_ray.model.layers import Context, KeysValues
from hrm_ray.model.router_losses import RouterLosses, RouterOutcome, positions_that_count, router_terms
from hrm_ray.model.routing import Routing, Site


class GraphPasses:
    """The order of a segment's passes, and their keys and values and routers' records.

    With `exact` gradients all chunks but the last are first computed without a graph, in order. Then passes run from
    the last chunk to the first, and each sends gradients to the keys and values of earlier chunks. Otherwise passes run
    from the first chunk to the last, and no gradient goes back.
    """

    def __init__(self, rows: ChunkedRows, exact: bool, stream: CopyStream | None) -> None:
        self.rows = rows
        self.exact = exact
        self._stream = stream
        self._caches: dict[Site, KVBuffer] = {}
        self._prefetched: set[Site] = set()
        # By attention, and 0 for keys or 1 for values: the first position of the gradient from later chunks, and it.
        self._pending: dict[tuple[Site, int], tuple[int, Tensor | OffloadedTensor]] = {}
        self._routings = rows.routings()
        self._row_choices: Mapping[Site, Tensor] = {}

    def chunk_of(self, number: int) -> int:
        """The chunk of pass `number` of the segment."""
        return len(self.rows) - 1 - number if self.exact else number

    @torch.no_grad()
    def record(
        self, compute: Callable[[int, Context], object], prefetch: Callable[[int], None] = lambda chunk: None
    ) -> None:
        """For exact gradients: `compute` all chunks but the last, and keep their keys and values. No chunk sees the
        last one. `prefetch` begins to copy what `compute` needs for a chunk."""
        if not self.exact:
            return
        for chunk in range(len(self.rows) - 1):
            prefetch(chunk + 1)
            compute(chunk, self._context(chunk, self._routings[chunk]))
        # Autocast caches the weights' casts; those made without a graph would cut off the weights' gradients.
        torch.clear_autocast_cache()

    def context(self, chunk: int) -> Context:
        """The layers' context in the pass over `chunk`."""
        record = self._routings[chunk]
        if record is not None and self.exact:
            # `earlier` keeps the counts that were recorded without a graph; the pass fills the others anew.
            record = replace(record, chosen={}, routed={})
        return self._context(chunk, record)

    def _context(self, chunk: int, record: Routing | None) -> Context:
        self._prefetched = set()
        return self.rows.context(chunk, partial(self._update, chunk) if len(self.rows) > 1 else None, record)

    def router_terms(self, routing: Routing | None, chunk: int, active: Tensor, losses: RouterLosses) -> RouterOutcome:
        """The routers' terms of the pass over `chunk`. With exact gradients an expert's share is that of whole rows."""
        if routing is None:
            return router_terms(None, active, losses)
        if self.exact:
            if chunk == len(self.rows) - 1:
                self._row_choices = routing.chosen
            routed = {site: replace(each, so_far=self._row_choices[site]) for site, each in routing.routed.items()}
            routing = replace(routing, routed=routed)
        count = positions_that_count(self.rows.batch["labels"]).sum(1)
        return router_terms(routing, active, losses, count)

    def _update(self, chunk: int, site: Site, keys: Tensor, values: Tensor) -> KeysValues:
        """See KVCache."""
        sites = list(self._caches)
        # A block that is computed again in the backward pass must not fetch for the block behind it.
        if site in self._caches and site not in self._prefetched and site != sites[-1]:
            self._caches[sites[sites.index(site) + 1]].prefetch(chunk)
        self._prefetched.add(site)
        seen: KeysValues = _WithEarlier.apply(keys, values, self, site, chunk)
        return seen

    def with_earlier(self, site: Site, chunk: int, keys: Tensor, values: Tensor) -> KeysValues:
        """A chunk's own keys and values behind the earlier ones that it sees, without a graph."""
        if site not in self._caches:
            self._caches[site] = KVBuffer(self.rows.parts, self.rows.window, self._stream, drop=not self.exact)
        return self._caches[site].update(chunk, keys, values)

    def send_gradient(self, site: Site, which: int, chunk: int, gradient: Tensor) -> Tensor:
        """Keep the part of `gradient` that belongs to earlier chunks for their passes, and return the chunk's own part
        with what later chunks have sent to it. `which` is 0 for keys and 1 for values [B, heads, T_seen, d]."""
        part = self.rows.parts[chunk]
        first, earlier = first_seen(part.start, self.rows.window), gradient.shape[2] - (part.stop - part.start)
        own, total, start = gradient[:, :, earlier:], None, part.stop
        if (site, which) in self._pending:
            start, pending = self._pending.pop((site, which))
            total = pending.fetch() if isinstance(pending, OffloadedTensor) else pending
            # With a window later chunks may see the end of this one only.
            begin = max(part.start, start)
            own = own.clone()
            own[:, :, begin - part.start :] += total[:, :, begin - start :].to(own.dtype)
            total = total[:, :, : begin - start]
        if earlier:
            if total is None or first < start:
                total = self._extended(gradient, earlier, total)
            total += gradient[:, :, :earlier]
            self._pending[site, which] = first, total if self._stream is None else OffloadedTensor(total, self._stream)
        return own

    def _extended(self, gradient: Tensor, earlier: int, total: Tensor | None) -> Tensor:
        """`total`, or nothing, with zeros in front, `earlier` positions in all."""
        window, length = self.rows.window, self.rows.length
        capacity = length if window is None or window > length else window - 1
        # A sum over later chunks, so in float32 at least.
        wide = torch.promote_types(gradient.dtype, torch.float32)
        extended = gradient.new_zeros((*gradient.shape[:2], capacity, gradient.shape[3]), dtype=wide)[:, :, :earlier]
        if total is not None:
            extended[:, :, earlier - total.shape[2] :] = total
        return extended


class _WithEarlier(torch.autograd.Function):
    """A chunk's keys and values behind the earlier ones that it sees."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, passes: GraphPasses, site: Site, chunk: int) -> KeysValues:
        ctx.passes, ctx.site, ctx.chunk, ctx.own = passes, site, chunk, keys.shape[2]
        seen = passes.with_earlier(site, chunk, keys, values)
        # A custom function must not return its input itself.
        return seen if seen[0] is not keys else (keys.view_as(keys), values.view_as(values))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        passes: GraphPasses = ctx.passes
        own = [
            passes.send_gradient(ctx.site, which, ctx.chunk, gradient)
            if passes.exact
            else gradient[:, :, gradient.shape[2] - ctx.own :]
            for which, gradient in enumerate(gradients)
        ]
        return own[0], own[1], None, None, None
