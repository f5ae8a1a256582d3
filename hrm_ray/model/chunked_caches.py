"""Keys and values of a row's earlier chunks, and the gradients that come back to them.

One job: what an attention sees of the chunks before, in passes without a graph (`Passed`) and with one (`KeptKeys`).
Which chunk is computed when is decided in chunked_rows.py and chunked.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm_ray.model.chunked_rest import Keeper, Rest
from hrm_ray.model.layers import KeyValueExchange, Site


class Passed:
    """One attention's keys and values so far, while chunk after chunk passes it without a graph.

    `length` is the positions of a whole row. With a `window` only what a later position can still see is kept.
    """

    def __init__(self, length: int, window: int | None) -> None:
        self._length = length
        self._window = window
        self._kept: tuple[Tensor, Tensor] | None = None
        self._filled = 0

    def exchange(self, site: Site, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See KeyValueExchange."""
        if keys.shape[2] == self._length:
            return keys, values
        return self._appended(keys, values) if self._window is None else self._in_reach(keys, values, self._window)

    def _appended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self._kept is None:
            shape = (*keys.shape[:2], self._length, keys.shape[3])
            self._kept = (keys.new_empty(shape), values.new_empty(shape))
        begin, self._filled = self._filled, self._filled + keys.shape[2]
        for kept, new in zip(self._kept, (keys, values), strict=True):
            kept[:, :, begin : self._filled] = new
        return self._kept[0][:, :, : self._filled], self._kept[1][:, :, : self._filled]

    def _in_reach(self, keys: Tensor, values: Tensor, window: int) -> tuple[Tensor, Tensor]:
        if self._kept is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self._kept, (keys, values), strict=True))
        first = max(keys.shape[2] - window + 1, 0)
        # Copies: views would keep the whole chunk.
        self._kept = (keys[:, :, first:].clone(), values[:, :, first:].clone())
        return keys, values


@dataclass
class _Piece:
    """One chunk's keys and values at one attention, and the gradient that later chunks have sent to them so far."""

    keys: Rest
    values: Rest
    count: int
    gradients: tuple[Rest, Rest] | None = None


@dataclass
class KeptKeys:
    """Keys and values [B, heads, T, d] by attention and chunk, for passes with a graph.

    `window` bounds what a chunk sees of earlier ones. With `exact`, passes run from the last chunk to the first after
    every chunk has been recorded once, and a pass's backward adds what it finds for earlier chunks to their gradients;
    otherwise they run from the first to the last, each recording for the next, and no gradient goes back.
    """

    window: int | None
    keeper: Keeper
    exact: bool
    pieces: dict[Site, dict[int, _Piece]] = field(default_factory=dict)

    def recording(self, chunk: int) -> KeyValueExchange:
        """The exchange of a pass without a graph that only records."""
        return _Recording(self, chunk)

    def passing(self, chunk: int) -> KeyValueExchange:
        """The exchange of the pass with a graph over this chunk."""
        return _Passing(self, chunk)

    def done(self, chunk: int) -> None:
        """The pass after this one begins: forget what no later one can see."""
        if self.exact:
            for pieces in self.pieces.values():
                pieces.pop(chunk, None)
        elif self.window is not None:
            for pieces in self.pieces.values():
                self._drop_unseen(pieces)

    def _drop_unseen(self, pieces: dict[int, _Piece]) -> None:
        seen = 0
        for chunk in sorted(pieces, reverse=True):
            if self.window is not None and seen >= self.window - 1:
                del pieces[chunk]
            else:
                seen += pieces[chunk].count

    def record(self, site: Site, chunk: int, keys: Tensor, values: Tensor) -> None:
        """Keep a chunk's own keys and values, once."""
        pieces = self.pieces.setdefault(site, {})
        if chunk not in pieces:
            parts = [self.keeper.rest(part.detach()) for part in (keys, values)]
            pieces[chunk] = _Piece(parts[0], parts[1], keys.shape[2])

    def earlier(self, site: Site, chunk: int) -> list[tuple[_Piece, int]]:
        """The pieces that `chunk` can see any of, in order, each with how many of its first positions it cannot."""
        found: list[tuple[_Piece, int]] = []
        pieces, seen = self.pieces.get(site, {}), 0
        for number in range(chunk - 1, -1, -1):
            left = None if self.window is None else self.window - 1 - seen
            if left is not None and left <= 0:
                break
            piece = pieces[number]
            unseen = 0 if left is None else max(piece.count - left, 0)
            found.append((piece, unseen))
            seen += piece.count
        return found[::-1]

    def fetch_ahead(self, after: Site, chunk: int) -> None:
        """Begin to fetch what the attention behind `after` will see."""
        sites = list(self.pieces)
        place = sites.index(after) + 1 if after in self.pieces else len(sites)
        for site in sites[place : place + 1]:
            for piece, _ in self.earlier(site, chunk):
                piece.keys.ahead()
                piece.values.ahead()

    def add_gradient(self, site: Site, chunk: int, for_keys: Tensor, for_values: Tensor) -> None:
        """Add to the gradients of the earlier keys and values that `chunk` sees, given one after the other."""
        first = 0
        for piece, unseen in self.earlier(site, chunk):
            stop = first + piece.count - unseen
            parts = (for_keys[:, :, first:stop], for_values[:, :, first:stop])
            piece.gradients = self._added(piece, unseen, parts)
            first = stop

    def _added(self, piece: _Piece, unseen: int, parts: tuple[Tensor, Tensor]) -> tuple[Rest, Rest]:
        sums = []
        for number, part in enumerate(parts):
            if piece.gradients is None:
                # Summed over later chunks, so in float32 at least.
                shape = (*part.shape[:2], piece.count, part.shape[3])
                total = part.new_zeros(shape, dtype=torch.promote_types(part.dtype, torch.float32))
            else:
                total = piece.gradients[number].fetch()
            total[:, :, unseen:] += part
            sums.append(self.keeper.rest(total))
        return sums[0], sums[1]

    def gradient(self, site: Site, chunk: int) -> tuple[Tensor, Tensor] | None:
        """What later chunks have sent to this chunk's own keys and values."""
        pieces = self.pieces.get(site, {})
        if chunk not in pieces:
            return None
        found = pieces[chunk].gradients
        return None if found is None else (found[0].fetch(), found[1].fetch())


class _Recording:
    def __init__(self, kept: KeptKeys, chunk: int) -> None:
        self._kept = kept
        self._chunk = chunk

    def exchange(self, site: Site, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._kept.record(site, self._chunk, keys, values)
        return _joined(self._kept.earlier(site, self._chunk), keys, values)


class _Passing:
    """Called again where a block is recomputed in the backward pass: it gives the same and changes nothing."""

    def __init__(self, kept: KeptKeys, chunk: int) -> None:
        self._kept = kept
        self._chunk = chunk
        self._met: set[Site] = set()

    def exchange(self, site: Site, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        kept, chunk = self._kept, self._chunk
        if site not in self._met:
            self._met.add(site)
            kept.fetch_ahead(site, chunk)
        if kept.exact:
            together: tuple[Tensor, Tensor] = _Joined.apply(keys, values, kept, site, chunk)
            return together
        kept.record(site, chunk, keys, values)
        return _joined(kept.earlier(site, chunk), keys, values)


def _joined(pieces: Iterable[tuple[_Piece, int]], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Earlier keys and values, which carry no graph, in front of a chunk's own."""
    found = list(pieces)
    if not found:
        return keys, values
    earlier_keys = [piece.keys.fetch()[:, :, unseen:] for piece, unseen in found]
    earlier_values = [piece.values.fetch()[:, :, unseen:] for piece, unseen in found]
    return torch.cat((*earlier_keys, keys), dim=2), torch.cat((*earlier_values, values), dim=2)


class _Joined(torch.autograd.Function):
    """`_joined` whose backward lets gradients through to earlier chunks: it adds them up there, and takes what later
    chunks have left for this one's own keys and values, whose graph is in this pass."""

    @staticmethod
    def forward(
        ctx: Any, keys: Tensor, values: Tensor, kept: KeptKeys, site: Site, chunk: int
    ) -> tuple[Tensor, Tensor]:
        ctx.kept, ctx.site, ctx.chunk, ctx.own = kept, site, chunk, keys.shape[2]
        pieces = kept.earlier(site, chunk)
        return _joined(pieces, keys, values) if pieces else (keys.view_as(keys), values.view_as(values))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_keys: Tensor, for_values: Tensor) -> tuple[Tensor | None, ...]:
        kept: KeptKeys = ctx.kept
        earlier = for_keys.shape[2] - ctx.own
        if earlier:
            kept.add_gradient(ctx.site, ctx.chunk, for_keys[:, :, :earlier], for_values[:, :, :earlier])
        own = (for_keys[:, :, earlier:], for_values[:, :, earlier:])
        later = kept.gradient(ctx.site, ctx.chunk)
        if later is not None:
            own = (own[0] + later[0].to(own[0].dtype), own[1] + later[1].to(own[1].dtype))
        return own[0], own[1], None, None, None
