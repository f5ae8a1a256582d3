"""The record of the routers in one pass: counts for the capacity, sums for losses and expert usage.

Mixtures of experts (moe.py) fill it, and router_losses.py makes losses of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Site = tuple[int, int]
"""Which attention or FFN of a segment: the number of the update in time order, and of the layer in its level."""


@dataclass(frozen=True)
class RouterSums:
    """The choices of one router in a pass, summed by row over the positions that count.

    `positions` [B]: their number; `assigned` [B, E]: how often each expert was chosen, before drops; `so_far`: the same
    with the earlier chunks of the row; `probability` [B, E]: routing probabilities, with their graph; `squares` [B]:
    squared logsumexp of the logits, with their graph; `dropped` [B]: choices beyond the capacity.
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

    `row_length` is the number of positions of a whole row, which decides the capacity. `counted` (bool [B, T], None:
    all) marks the positions that count; the others come last in their row. By site: `earlier`, how often each expert
    was chosen in the chunks before [B, E]; `chosen`, the same with this one; `routed`, the sums for losses.
    """

    row_length: int
    counted: Tensor | None = None
    earlier: Mapping[Site, Tensor] = field(default_factory=dict)
    chosen: dict[Site, Tensor] = field(default_factory=dict)
    routed: dict[Site, RouterSums] = field(default_factory=dict)
    _casts: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def record(self, site: Site, chosen: Tensor, routed: RouterSums | None) -> None:
        """Add what the router at `site` did."""
        # Only the first call counts: a block that is recomputed in the backward pass calls again.
        self.chosen.setdefault(site, chosen)
        if routed is not None:
            self.routed.setdefault(site, routed)

    def next_chunk(self, counted: Tensor | None) -> Routing:
        """The record for the chunk that follows this one in the same rows and the same segment."""
        return Routing(self.row_length, counted, self.chosen, _casts=self._casts)

    def detached(self) -> Routing:
        """A record for another pass over the same rows, whose losses are not used."""
        return Routing(self.row_length, self.counted, self.earlier, _casts=self._casts)

    def cast(self, weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype`, without a graph; cast once per pass, as autocast does."""
        if weight.dtype == dtype:
            return weight.detach()
        if weight not in self._casts or self._casts[weight].dtype != dtype:
            self._casts[weight] = weight.detach().to(dtype)
        return self._casts[weight]
