"""What the routers of one pass are told, and what they tell: counts for the capacity, sums for losses and usage.

One job: the record that passes from mixtures of experts (moe.py) to the objectives, which make losses of it
(router_losses.py). Which token goes to which expert is decided in moe.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Site = tuple[int, int]
"""Which attention or FFN of a segment: the number of the update in time order, and of the layer in its level."""


@dataclass(frozen=True)
class Routed:
    """What one router did with the positions of a pass that count, summed over them, row by row.

    `positions` [B]: how many they are; `assigned` [B, E]: how often each expert was chosen, before drops; `so_far` the
    same with the earlier chunks of the row; `probability` [B, E]: routing probabilities, with their graph; `squares`
    [B]: squared logsumexp of the scores, with their graph; `dropped` [B]: choices that the capacity left out.
    """

    positions: Tensor
    assigned: Tensor
    so_far: Tensor
    probability: Tensor
    squares: Tensor
    dropped: Tensor


@dataclass
class Routing:
    """The routers' record of one pass: a segment over whole rows, or over one chunk of them.

    `row_length` is the positions of a whole row, which the capacity is a share of. `counted` (bool [B, T], None: all)
    marks the positions that count; the others come last in their row. `earlier` holds, per site, how often each expert
    was chosen in the chunks before [B, E]. A site that tells something twice, because its block is recomputed in the
    backward pass, is heard once.
    """

    row_length: int
    counted: Tensor | None = None
    earlier: Mapping[Site, Tensor] = field(default_factory=dict)
    chosen: dict[Site, Tensor] = field(default_factory=dict)
    routed: dict[Site, Routed] = field(default_factory=dict)
    _narrowed: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def note(self, site: Site, chosen: Tensor, routed: Routed | None) -> None:
        """What the router at `site` did: `chosen` [B, E] with the earlier chunks', and what the losses are made of."""
        self.chosen.setdefault(site, chosen)
        if routed is not None:
            self.routed.setdefault(site, routed)

    def next_chunk(self, counted: Tensor | None) -> Routing:
        """The record for the chunk that follows this one in the same rows and the same segment."""
        return Routing(self.row_length, counted, self.chosen, _narrowed=self._narrowed)

    def detached(self) -> Routing:
        """A record for a pass over the same rows that nothing is learned from."""
        return Routing(self.row_length, self.counted, self.earlier, _narrowed=self._narrowed)

    def narrowed(self, weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """`weight` in the type of the computation, without a graph; cast once in a pass, as autocast would."""
        if weight.dtype == dtype:
            return weight.detach()
        if weight not in self._narrowed or self._narrowed[weight].dtype != dtype:
            self._narrowed[weight] = weight.detach().to(dtype)
        return self._narrowed[weight]
