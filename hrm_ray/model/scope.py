"""Attention scopes: which positions attend to which, as rules that need no mask of the whole sequence.

Text is causal in every attention of every cycle and segment, so that a state at position t depends on positions up to t
alone (ACTV1_SPEC, section 13); nothing asks for full attention on text.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

MadeT = TypeVar("MadeT")


@dataclass(frozen=True)
class AttentionScope:
    """Which positions see which. The queries are the last positions of the keys, so cached keys are put in front.

    A position sees another if every given rule allows it:
    - `causal`: the other is not later, or both are inside a prompt;
    - `documents` [B, T]: both have the same document number; a document's positions are contiguous;
    - `window`: the other is less than `window` positions away (a position sees itself and the window - 1 before it;
      inside a prompt, which sees itself fully, also those after it).
    `documents` and `prompt` (bool [B, T], True inside a prompt) cover the last T positions of the keys or more.
    """

    causal: bool = False
    documents: Tensor | None = None
    prompt: Tensor | None = None
    window: int | None = None
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def part(self, first: int, stop: int) -> AttentionScope:
        """The scope of keys `first` to `stop` (exclusive) alone."""
        return replace(
            self,
            documents=None if self.documents is None else self.documents[:, first:stop],
            prompt=None if self.prompt is None else self.prompt[:, first:stop],
            _cache={},
        )

    def cached(self, key: Hashable, make: Callable[[], MadeT]) -> MadeT:
        """What `make` gave the first time for this `key`: computed once for all attentions of a pass."""
        if key not in self._cache:
            self._cache[key] = make()
        made: MadeT = self._cache[key]
        return made

    def is_rule(self) -> bool:
        """Whether the rules depend on distances alone, the same in every row."""
        return self.documents is None and self.prompt is None

    def sees_all(self, queries: int, keys: int) -> bool:
        """Whether each of the last `queries` positions sees every key."""
        if not self.is_rule() or (self.causal and queries > 1):
            return False
        return self.window is None or keys <= self.window

    def is_plain_causal(self, queries: int, keys: int) -> bool:
        """Whether this is the causal rule that kernels have themselves, which starts at the first key."""
        if not self.causal or not self.is_rule() or queries != keys:
            return False
        return self.window is None or keys <= self.window

    def causal_from(self, queries: int, keys: int) -> int | None:
        """The first key that the last `queries` positions see, if the causal rule alone holds from it on.

        None at a document's border, in a prompt, or beyond a window. Reads the documents on the host, once per pass.
        """
        if not self.causal or self.prompt is not None:
            return None
        first: int | None = 0
        if self.documents is not None:
            documents = self.documents[:, -keys:]
            first = self.cached(("begin", queries, keys), lambda: _common_begin(documents, queries))
        if first is None or (self.window is not None and keys - first > self.window):
            return None
        return first

    def whole_mask(self, queries: int, keys: int, like: Tensor) -> Tensor:
        """0 where a query sees a key, else minus infinity: [B or 1, 1, queries, keys] in the type of `like`."""
        # Made once per pass; given a boolean mask, SDPA would make and keep such a tensor at each attention.
        return self.cached(
            ("whole", queries, keys, like.dtype),
            lambda: self._mask(slice(0, queries), slice(0, keys), queries, keys, like),
        )

    def blocks(self, queries: int, keys: int, size: int) -> list[tuple[slice, slice]]:
        """The queries in blocks of `size`, each with the range of keys that any of its queries can see."""
        return self.cached(("blocks", queries, keys, size), lambda: list(self._ranges(queries, keys, size)))

    def block_mask(self, block: slice, seen: slice, queries: int, keys: int, size: int, like: Tensor) -> Tensor:
        """The mask of one of the `blocks` of `size` as `whole_mask` would have it there: [B or 1, 1, block, seen]."""
        if not self.is_rule():
            return self._mask(block, seen, queries, keys, like)
        # Distances are the same for every block, so one strip, as wide as any block can see, serves all of them.
        before = keys - queries + block.start - seen.start
        reach = keys if self.window is None else min(keys, self.window - 1)
        widest = slice(reach, reach + size)
        ends = widest.stop if self.causal else widest.stop + reach
        strip = self.cached(
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


def _common_begin(documents: Tensor, queries: int) -> int | None:
    """Where the document of the last `queries` positions begins, if it is one position in every row."""
    # A document's positions are contiguous, so the first and the last query decide.
    begins = _document_ranges(documents)[0]
    positions = set(torch.cat((begins[:, -queries], begins[:, -1])).tolist())
    return int(positions.pop()) if len(positions) == 1 else None


def _document_ranges(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Where the document of each position [B, T] begins, and where it ends (exclusive)."""
    length = documents.shape[1]
    positions = torch.arange(length, device=documents.device)
    changes = documents[:, 1:] != documents[:, :-1]
    begins = F.pad(torch.where(changes, positions[1:], 0), (1, 0)).cummax(1).values
    ends = F.pad(torch.where(changes, positions[1:], length), (0, 1), value=length)
    return begins, ends.flip(1).cummin(1).values.flip(1)


FULL = AttentionScope()
CAUSAL = AttentionScope(causal=True)


def text_scope(documents: Tensor | None, prompt: Tensor | None, window: int | None = None) -> AttentionScope:
    """The scope of packed text rows, for one pass; see AttentionScope."""
    return AttentionScope(causal=True, documents=documents, prompt=prompt, window=window)
