"""Attention under a scope: who sees whom as rules, computed without a mask of the whole sequence.

One job: softmax(q k^T / sqrt(d)) v over the keys that a scope allows, by PyTorch's own kernels, on any device. Which
other kernels may take its place is in attention_backends.py; projections and rotary positions are in layers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm_ray.model.attention_joined import attend_in_two

WHOLE_MASK_ENTRIES = 256 * 256
"""Up to so many pairs of query and key one mask serves the whole row; above, queries are taken a block at a time."""

QUERY_BLOCKS = {"cpu": 128}
"""Queries of a block by kind of device: enough for a kernel to be busy with. Measured on a CPU."""
QUERY_BLOCK = 512
"""Queries of a block on any other device."""
SMALLEST_BLOCK = 64
"""A block much wider than the window computes mostly masked pairs, and one narrower than this is mostly overhead."""


MadeT = TypeVar("MadeT")


@dataclass(frozen=True)
class AttentionScope:
    """Which positions see which. The queries are the last positions of the keys, so that keys kept from earlier
    positions need no more than to stand in front.

    A position sees another where every rule that is given allows it:
    - `causal`: the other is not later, or both are inside a prompt;
    - `documents` [B, T]: both have the same document number; a document's positions lie side by side;
    - `window`: the other is less than `window` positions away (a position sees itself and the window - 1 before it;
      inside a prompt, which sees itself fully, also those after it).
    `documents` and `prompt` (bool [B, T], True inside a prompt) belong to the last T positions of the keys and more.
    """

    causal: bool = False
    documents: Tensor | None = None
    prompt: Tensor | None = None
    window: int | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def part(self, first: int, stop: int) -> AttentionScope:
        """The scope of keys `first` to `stop` (exclusive) alone."""
        return replace(
            self,
            documents=None if self.documents is None else self.documents[:, first:stop],
            prompt=None if self.prompt is None else self.prompt[:, first:stop],
            _made={},
        )

    def remembered(self, place: Hashable, make: Callable[[], MadeT]) -> MadeT:
        """What `make` gave the first time for this `place`: worked out once for all attentions of a pass."""
        if place not in self._made:
            self._made[place] = make()
        made: MadeT = self._made[place]
        return made

    def is_rule(self) -> bool:
        """Whether distances alone decide, the same in every row."""
        return self.documents is None and self.prompt is None

    def sees_all(self, queries: int, keys: int) -> bool:
        """Whether each of the last `queries` positions sees every key."""
        if not self.is_rule() or (self.causal and queries > 1):
            return False
        return self.window is None or keys <= self.window

    def is_plain_causal(self, queries: int, keys: int) -> bool:
        """Whether kernels' own causal rule, which starts at the first key, says the same."""
        if not self.causal or not self.is_rule() or queries != keys:
            return False
        return self.window is None or keys <= self.window

    def causal_from(self, queries: int, keys: int) -> int | None:
        """The first key that the last `queries` positions see, where from it on causality alone decides.

        None where it does not: at a document's border, in a prompt, or beyond a window. Looks at the documents on the
        host, once.
        """
        if not self.causal or self.prompt is not None:
            return None
        first: int | None = 0
        if self.documents is not None:
            first = self.remembered(("common", queries, keys), lambda: self._common_begin(queries, keys))
        if first is None or (self.window is not None and keys - first > self.window):
            return None
        return first

    def _common_begin(self, queries: int, keys: int) -> int | None:
        """Where the document that the last `queries` positions of every row lie in begins, if it is one place."""
        assert self.documents is not None
        begins, _ = _document_ranges(self.documents[:, -keys:])
        # A document's positions lie side by side.
        places = set(torch.cat((begins[:, -queries], begins[:, -1])).tolist())
        return int(places.pop()) if len(places) == 1 else None

    def whole_mask(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """0 where a query sees a key, else minus infinity: [B or 1, 1, queries, keys] in the type of `like`.

        Made once for all attentions of a pass; SDPA would make and keep one from a boolean mask at each.
        """
        return self.remembered(
            ("whole", queries, keys, like.dtype),
            lambda: self._mask(slice(0, queries), slice(0, keys), queries, keys, like),
        )

    def blocks(self, queries: int, keys: int, size: int) -> list[tuple[slice, slice]]:
        """The queries in blocks of `size`, each with the range of keys that any of its queries can see."""
        return self.remembered(("blocks", queries, keys, size), lambda: list(self._ranges(queries, keys, size)))

    def block_mask(self, block: slice, seen: slice, queries: int, keys: int, size: int, like: Tensor) -> Tensor:
        """The mask of one of the `blocks` of `size` as `whole_mask` would have it there: [B or 1, 1, block, seen]."""
        if not self.is_rule():
            return self._mask(block, seen, queries, keys, like)
        # Distances look the same from every block: one strip, as wide as any block can see, serves all of them.
        before = keys - queries + block.start - seen.start
        reach = keys if self.window is None else min(keys, self.window - 1)
        widest = slice(reach, reach + size)
        ends = widest.stop if self.causal else widest.stop + reach
        strip = self.remembered(
            ("strip", reach, size, like.dtype),
            lambda: _filled(self._rules(widest, slice(0, ends), like.device), like),
        )
        return strip[:, :, : block.stop - block.start, reach - before : reach - before + seen.stop - seen.start]

    def _mask(self, block: slice, seen: slice, queries: int, keys: int, like: Tensor) -> Tensor:
        behind = keys - queries
        rows = slice(behind + block.start, behind + block.stop)
        documents = None if self.documents is None else self.documents[:, -keys:]
        prompt = None if self.prompt is None else self.prompt[:, -keys:]
        return _filled(self._rules(rows, seen, like.device, documents, prompt), like)

    def _rules(
        self,
        rows: slice,
        seen: slice,
        device: torch.device,
        documents: Tensor | None = None,
        prompt: Tensor | None = None,
    ) -> Tensor:
        """Whether the positions `rows` see the positions `seen`: [B or 1, rows, seen]."""
        query = torch.arange(rows.start, rows.stop, device=device)[:, None]
        key = torch.arange(seen.start, seen.stop, device=device)
        allowed = torch.ones(1, len(query), len(key), dtype=torch.bool, device=device)
        if self.causal:
            allowed = allowed & (key <= query)
            if prompt is not None:
                allowed = allowed | (prompt[:, rows, None] & prompt[:, None, seen])
        if self.window is not None:
            allowed = allowed & (key > query - self.window) & (key < query + self.window)
        if documents is not None:
            allowed = allowed & (documents[:, rows, None] == documents[:, None, seen])
        return allowed

    def _ranges(self, queries: int, keys: int, size: int) -> Iterator[tuple[slice, slice]]:
        starts = list(range(0, queries, size))
        firsts = [keys - queries + start for start in starts]
        lasts = [min(first + size, keys) - 1 for first in firsts]
        low, high = [0] * len(starts), [keys] * len(starts)
        if self.causal and self.prompt is None:
            high = [last + 1 for last in lasts]
        if self.window is not None:
            low = [max(first - self.window + 1, 0) for first in firsts]
            high = [min(most, last + self.window) for most, last in zip(high, lasts, strict=True)]
        if self.documents is not None:
            begins, ends = _document_ranges(self.documents[:, -keys:])
            low = [max(pair) for pair in zip(low, begins[:, firsts].amin(0).tolist(), strict=True)]
            high = [min(pair) for pair in zip(high, ends[:, lasts].amax(0).tolist(), strict=True)]
        for number, start in enumerate(starts):
            # A position sees itself, also where no document can be looked at (tensors without storage).
            least, most = min(int(low[number]), firsts[number]), max(int(high[number]), lasts[number] + 1)
            yield slice(start, min(start + size, queries)), slice(least, most)


def _filled(allowed: Tensor, like: Tensor) -> Tensor:
    """[B, q, k] -> [B, 1, q, k]: 0 where allowed, else minus infinity."""
    zeros = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill_(~allowed, float("-inf")).unsqueeze(1)


def _document_ranges(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Where the document of each position [B, T] begins, and where it ends (exclusive)."""
    length = documents.shape[1]
    places = torch.arange(length, device=documents.device)
    changes = documents[:, 1:] != documents[:, :-1]
    begins = F.pad(torch.where(changes, places[1:], 0), (1, 0)).cummax(1).values
    ends = F.pad(torch.where(changes, places[1:], length), (0, 1), value=length)
    return begins, ends.flip(1).cummin(1).values.flip(1)


class AttentionKernel(Protocol):
    """One way to compute attention; all give the same numbers, to their precision."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope) -> Tensor:
        """`query` [B, heads, Tq, d]; `keys`, `values` [B, heads, Tk >= Tq, d] -> [B, heads, Tq, d]."""


def attend(query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope) -> Tensor:
    """Attention by PyTorch's scaled dot product: the kernel that is there on every device.

    Rows whose pairs would make a large mask go without one where causality alone decides (on a CPU also for fewer
    queries than keys), and else a block of queries at a time against the keys in its reach, forward and backward:
    O(S x window) with a window, and never a tensor of S x S.
    """
    queries, there = query.shape[2], keys.shape[2]
    if scope.sees_all(queries, there):
        return F.scaled_dot_product_attention(query, keys, values)
    if scope.is_plain_causal(queries, there):
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True)
    if queries * there <= WHOLE_MASK_ENTRIES:
        mask = scope.whole_mask(queries, there, query)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    first = scope.causal_from(queries, there)
    if first == there - queries:
        return F.scaled_dot_product_attention(query, keys[:, :, first:], values[:, :, first:], is_causal=True)
    if first is not None and query.device.type == "cpu":
        return attend_in_two(query, keys[:, :, first:], values[:, :, first:])
    return blockwise(query, keys, values, scope, block_size(scope, query.device.type))


def block_size(scope: AttentionScope, device: str) -> int:
    """Queries that go together: as many as the window has keys, within bounds."""
    widest = QUERY_BLOCKS.get(device, QUERY_BLOCK)
    return widest if scope.window is None else max(SMALLEST_BLOCK, min(widest, scope.window))


def blockwise(query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope, size: int) -> Tensor:
    """Attention in blocks of `size` queries; see `attend`."""
    result: Tensor = _Blockwise.apply(query, keys, values, scope, size)
    return result


class _Blockwise(torch.autograd.Function):
    """Keeps queries, keys and values only; the backward pass computes each block again, with its own mask.

    Gradients of keys and values are added up in one buffer: a slice per block in the graph would cost a tensor of the
    whole row for each of them.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, scope: AttentionScope, size: int) -> Tensor:
        ctx.save_for_backward(query, keys, values)
        ctx.scope, ctx.size = scope, size
        queries, there = query.shape[2], keys.shape[2]
        seen = torch.empty_like(query)
        for block, reach in scope.blocks(queries, there, size):
            mask = scope.block_mask(block, reach, queries, there, size, query)
            seen[:, :, block] = F.scaled_dot_product_attention(
                query[:, :, block], keys[:, :, reach], values[:, :, reach], attn_mask=mask
            )
        return seen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values = ctx.saved_tensors
        scope: AttentionScope = ctx.scope
        queries, there = query.shape[2], keys.shape[2]
        # A key's gradient is a sum over blocks: in float32, whatever the type that attention is computed in.
        wide = torch.promote_types(keys.dtype, torch.float32)
        d_query = torch.empty_like(query)
        d_keys, d_values = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
        for block, reach in scope.blocks(queries, there, ctx.size):
            mask = scope.block_mask(block, reach, queries, there, ctx.size, query)
            parts = (query[:, :, block], keys[:, :, reach], values[:, :, reach])
            leaves = [part.detach().requires_grad_() for part in parts]
            with torch.enable_grad():
                seen = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], attn_mask=mask)
            d_query[:, :, block], for_keys, for_values = torch.autograd.grad(seen, leaves, gradient[:, :, block])
            d_keys[:, :, reach] += for_keys
            d_values[:, :, reach] += for_values
        return d_query, d_keys.to(keys.dtype), d_values.to(values.dtype), None, None
