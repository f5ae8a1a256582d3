"""Keys and values of a row's earlier chunks, and the gradients that come back to them.

One job: what an attention sees of the chunks before: `RowKeys` in passes without a graph, `KeptKeys` in those with one.
Which chunk is computed when is decided in chunked_rows.py and chunked_passes.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm_ray.model.chunked_offload import Handle, OffloadPolicy
from hrm_ray.model.layers import KVCache
from hrm_ray.model.routing import Site

Pair = tuple[Tensor, Tensor]
"""Keys and values [B, heads, T, d]."""


def first_seen(position: int, window: int | None) -> int:
    """The first position that the one at `position` sees."""
    return 0 if window is None else max(position - window + 1, 0)


class SiteKeys(Protocol):
    """One attention's keys and values by chunk."""

    def put(self, chunk: int, keys: Tensor, values: Tensor) -> None:
        """A chunk's own, without a graph; chunks come in order."""

    def seen(self, chunk: int, keys: Tensor, values: Tensor) -> Pair:
        """All that `chunk` sees, from its first position's first to its last; `keys`, `values` are its own."""

    def ahead(self, chunk: int) -> None:
        """Begin to fetch what `chunk` will see of earlier ones."""


class RowKeys:
    """On the device, side by side in one tensor for keys and one for values.

    Where `slides`, what no later chunk can see is given up, so that their room is the window's and a chunk's.
    """

    def __init__(self, parts: list[slice], window: int | None, *, slides: bool) -> None:
        self._parts = parts
        self._window = window
        self._origin = 0
        self._room = parts[-1].stop
        if slides and window is not None:
            self._room = min(self._room, window - 1 + max(part.stop - part.start for part in parts))
        self._rows: Pair | None = None

    def put(self, chunk: int, keys: Tensor, values: Tensor) -> None:
        part = self._parts[chunk]
        if self._rows is None:
            shape = (*keys.shape[:2], self._room, keys.shape[3])
            self._rows = (keys.new_empty(shape), values.new_empty(shape))
        if part.stop - self._origin > self._room:
            self._slide(first_seen(part.start, self._window), part.start)
        place = slice(part.start - self._origin, part.stop - self._origin)
        for row, own in zip(self._rows, (keys, values), strict=True):
            row[:, :, place] = own

    def _slide(self, first: int, stop: int) -> None:
        """Move positions `first` to `stop` to the beginning."""
        assert self._rows is not None
        for row in self._rows:
            row[:, :, : stop - first] = row[:, :, first - self._origin : stop - self._origin].clone()
        self._origin = first

    def seen(self, chunk: int, keys: Tensor, values: Tensor) -> Pair:
        assert self._rows is not None
        part = self._parts[chunk]
        place = slice(first_seen(part.start, self._window) - self._origin, part.stop - self._origin)
        return self._rows[0][:, :, place], self._rows[1][:, :, place]

    def ahead(self, chunk: int) -> None:
        return None


class RestKeys:
    """Each chunk's by itself, with a keeper that is away; where `slides`, what no later chunk can see is given up."""

    def __init__(self, parts: list[slice], window: int | None, policy: OffloadPolicy, *, slides: bool) -> None:
        self._parts = parts
        self._window = window
        self._keeper = policy
        self._slides = slides
        self._rests: dict[int, tuple[Handle, Handle]] = {}

    def put(self, chunk: int, keys: Tensor, values: Tensor) -> None:
        if self._slides:
            first = first_seen(self._parts[chunk].start, self._window)
            for earlier in [number for number in self._rests if self._parts[number].stop <= first]:
                del self._rests[earlier]
        self._rests[chunk] = (self._keeper.rest(keys), self._keeper.rest(values))

    def _earlier(self, chunk: int) -> list[int]:
        first = first_seen(self._parts[chunk].start, self._window)
        return [number for number in range(chunk) if self._parts[number].stop > first]

    def seen(self, chunk: int, keys: Tensor, values: Tensor) -> Pair:
        earlier = self._earlier(chunk)
        if not earlier:
            return keys, values
        unseen = first_seen(self._parts[chunk].start, self._window) - self._parts[earlier[0]].start
        fetched = [[rest.fetch() for rest in self._rests[number]] for number in earlier]
        joined = [torch.cat((*(pair[n] for pair in fetched), own), dim=2) for n, own in enumerate((keys, values))]
        return joined[0][:, :, max(unseen, 0) :], joined[1][:, :, max(unseen, 0) :]

    def ahead(self, chunk: int) -> None:
        for number in self._earlier(chunk):
            for rest in self._rests[number]:
                rest.ahead()


@dataclass
class KeptKeys:
    """Keys and values of the attentions that carry gradient, for one segment of rows cut into `parts`.

    With `exact`, passes run from the last chunk to the first after all but the last were recorded, and a pass's
    backward adds what it finds for earlier chunks to their gradients; otherwise they run from the first to the last,
    each recording for the next, and no gradient goes back.
    """

    parts: list[slice]
    window: int | None
    policy: OffloadPolicy
    exact: bool
    sites: dict[Site, SiteKeys] = field(default_factory=dict)
    recorded: set[tuple[Site, int]] = field(default_factory=set)
    gradients: dict[tuple[Site, int], tuple[Handle, Handle]] = field(default_factory=dict)

    def exchange(self, chunk: int) -> KVCache:
        """The exchange of a pass over this chunk, in either gradient mode."""
        return _Exchange(self, chunk)

    def done(self, chunk: int) -> None:
        """The pass over `chunk` is over: nobody will ask for its keys' gradients any more."""
        for place in [place for place in self.gradients if place[1] == chunk]:
            del self.gradients[place]

    def together(self, site: Site, chunk: int, keys: Tensor, values: Tensor) -> Pair:
        """Record a chunk's own keys and values, once, and give all that it sees; none with a graph."""
        if site not in self.sites:
            slides = not self.exact
            self.sites[site] = (
                RestKeys(self.parts, self.window, self.policy, slides=slides)
                if self.policy.away
                else RowKeys(self.parts, self.window, slides=slides)
            )
        if (site, chunk) not in self.recorded:
            self.recorded.add((site, chunk))
            self.sites[site].put(chunk, keys, values)
        return self.sites[site].seen(chunk, keys, values)

    def fetch_ahead(self, after: Site, chunk: int) -> None:
        """Begin to fetch what the attention behind `after` will see."""
        sites = list(self.sites)
        if after in self.sites and after != sites[-1]:
            self.sites[sites[sites.index(after) + 1]].ahead(chunk)

    def add_gradients(self, site: Site, chunk: int, found: Pair) -> None:
        """Add to the gradients of the earlier keys and values that `chunk` sees; `found` is all of them in order."""
        first, stop = first_seen(self.parts[chunk].start, self.window), self.parts[chunk].start
        for number in range(chunk):
            part = self.parts[number]
            begin = max(part.start, first)
            if begin >= part.stop:
                continue
            given = slice(begin - first, part.stop - first)
            sums = []
            for which, each in enumerate(found):
                if (site, number) in self.gradients:
                    total = self.gradients[(site, number)][which].fetch()
                else:
                    # Summed over later chunks, so in float32 at least.
                    wide = torch.promote_types(each.dtype, torch.float32)
                    total = each.new_zeros((*each.shape[:2], part.stop - part.start, each.shape[3]), dtype=wide)
                total[:, :, begin - part.start :] += each[:, :, given]
                sums.append(self.policy.rest(total))
            self.gradients[(site, number)] = (sums[0], sums[1])
        assert found[0].shape[2] == stop - first

    def gradient(self, site: Site, chunk: int) -> Pair | None:
        """What later chunks have sent to this chunk's own keys and values."""
        found = self.gradients.get((site, chunk))
        return None if found is None else (found[0].fetch(), found[1].fetch())


class _Exchange:
    """Called again where a block is recomputed in the backward pass: it gives the same and changes nothing."""

    def __init__(self, kept: KeptKeys, chunk: int) -> None:
        self._kept = kept
        self._chunk = chunk
        self._met: set[Site] = set()

    def exchange(self, site: Site, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if site not in self._met:
            self._met.add(site)
            self._kept.fetch_ahead(site, self._chunk)
        together: Pair = _Together.apply(keys, values, self._kept, site, self._chunk)
        return together


class _Together(torch.autograd.Function):
    """A chunk's keys and values behind the earlier ones that it sees.

    Backward gives its own part back; with exact gradients it adds the rest up where earlier chunks will find it, and
    takes what later chunks have left for this one, whose graph is in this pass.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, kept: KeptKeys, site: Site, chunk: int) -> Pair:
        ctx.kept, ctx.site, ctx.chunk, ctx.own = kept, site, chunk, keys.shape[2]
        seen = kept.together(site, chunk, keys, values)
        return seen if seen[0] is not keys else (keys.view_as(keys), values.view_as(values))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_keys: Tensor, for_values: Tensor) -> tuple[Tensor | None, ...]:
        kept: KeptKeys = ctx.kept
        earlier = for_keys.shape[2] - ctx.own
        own = (for_keys[:, :, earlier:], for_values[:, :, earlier:])
        if kept.exact:
            kept.add_gradients(ctx.site, ctx.chunk, (for_keys[:, :, :earlier], for_values[:, :, :earlier]))
            later = kept.gradient(ctx.site, ctx.chunk)
            if later is not None:
                own = (own[0] + later[0].to(own[0].dtype), own[1] + later[1].to(own[1].dtype))
        return own[0], own[1], None, None, None
