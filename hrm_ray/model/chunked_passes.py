"""The passes of one segment that carry gradient: their order over the chunks, and what they hand to one another.

One job: keys and values, routers' counts and random states between passes. What a pass computes is the objectives' (see
chunked.py, which says how the two kinds of gradients go).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hrm_ray.model.chunked_caches import KeptKeys
from hrm_ray.model.chunked_offload import OffloadPolicy
from hrm_ray.model.chunked_rows import ChunkedRows
from hrm_ray.model.layers import Context
from hrm_ray.model.router_losses import RouterLosses, RouterOutcome, positions_that_count, router_terms
from hrm_ray.model.routing import Routing, Site


class RandomStates:
    """The generators' states before each chunk, so that dropout falls the same way when a chunk is computed again."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._kept: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def keep(self, chunk: int) -> None:
        """Remember the present states as those before `chunk`."""
        self._kept[chunk] = (torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._devices])

    @contextmanager
    def again(self, chunk: int) -> Iterator[None]:
        """The states before `chunk`, if it was computed before; the present ones afterwards."""
        if chunk not in self._kept:
            yield
            return
        with torch.random.fork_rng(self._devices):
            host, others = self._kept[chunk]
            torch.set_rng_state(host)
            for device, state in zip(self._devices, others, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@dataclass
class GraphPasses:
    """The passes of one segment that carry gradient: their order, their keys and values, their routers' records.

    `routings` are records without what routers tell losses, by chunk; `whole` holds, per site, how often each expert
    was chosen in whole rows, known once the last chunk has been computed.
    """

    rows: ChunkedRows
    exact: bool
    kept: KeptKeys
    random: RandomStates
    routings: list[Routing | None]
    whole: Mapping[Site, Tensor] = field(default_factory=dict)

    @classmethod
    def over(cls, rows: ChunkedRows, exact: bool, policy: OffloadPolicy) -> GraphPasses:
        """None of them done."""
        kept = KeptKeys(rows.parts, rows.window, policy, exact)
        return cls(rows, exact, kept, RandomStates(rows.batch["inputs"].device), rows.routings())

    def next_chunk(self, passes: int) -> int:
        """The chunk that comes after `passes` passes; what only those before it needed is let go."""
        if passes:
            self.kept.done(self._chunk_of(passes - 1))
        return self._chunk_of(passes)

    def chunk_after(self, chunk: int) -> int:
        """Whose pass comes after that over `chunk`; there may be none."""
        return chunk - 1 if self.exact else chunk + 1

    def _chunk_of(self, passes: int) -> int:
        return len(self.rows) - 1 - passes if self.exact else passes

    @torch.no_grad()
    def record(self, work: Callable[[int, Context], object], ahead: Callable[[int], None] = lambda chunk: None) -> None:
        """For exact gradients: let `work` go over all chunks but the last, which none comes after, in order, and keep
        their keys and values. `ahead` begins to fetch what it needs for a chunk."""
        if not self.exact:
            return
        for chunk in range(len(self.rows) - 1):
            self.random.keep(chunk)
            ahead(chunk + 1)
            work(chunk, self.rows.context(chunk, self.kept.exchange(chunk), self.routings[chunk]))
        # Autocast may keep the weights' casts, and those made without a graph would cut the weights' gradients off.
        torch.clear_autocast_cache()

    def context(self, chunk: int) -> Context:
        """What the layers are told in the pass over `chunk`."""
        exchange = self.kept.exchange(chunk) if len(self.rows) > 1 else None
        record = self.routings[chunk]
        if record is not None and self.exact:
            # What was noted without a graph serves as what came earlier; the pass itself is to be heard.
            record = replace(record, chosen={}, routed={})
        return self.rows.context(chunk, exchange, record)

    def routed(self, routing: Routing | None, chunk: int, active: Tensor, losses: RouterLosses) -> RouterOutcome:
        """The routers' terms of the pass over `chunk`; with exact gradients an expert's share is that of whole rows."""
        if routing is None:
            return router_terms(None, active, losses)
        if self.exact:
            if chunk == len(self.rows) - 1:
                self.whole = routing.chosen
            told = {site: replace(each, so_far=self.whole[site]) for site, each in routing.routed.items()}
            routing = replace(routing, routed=told)
        count = positions_that_count(self.rows.batch["labels"]).sum(1)
        return router_terms(routing, active, losses, count)
