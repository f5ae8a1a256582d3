"""Mixture of experts in place of a block's FFN: each token goes through the top k experts of its router.

Dispatch and products are in grouped_product.py, the routers' losses in router_losses.py.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_ray.model.activations import inner_values
from hrm_ray.model.autocast import product_dtype
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.grouped_product import SortedChoices, combine, dispatch, grouped_product, sort_by_expert
from hrm_ray.model.routing import RouterSums, Routing, Site


class Router(nn.Module):
    """Logits of the experts for every token, in float32 whatever the type of the rest (Fedus et al. 2021)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, E]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class StackedProjection(nn.Module):
    """One linear map per expert, `weight` [E, out, in].

    If a single expert is trained, `own` [out, in] is its matrix as a parameter that shares the memory of `weight`: the
    others have neither gradient nor optimizer state, and a state dict holds the whole stack only.
    """

    def __init__(self, experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        self.register_parameter("own", None)
        self.own: nn.Parameter | None
        self.expert: int | None = None

    def forward(self, rows: Tensor, order: SortedChoices, routing: Routing | None) -> Tensor:
        """rows [A, in], sorted by expert -> [A, out]."""
        stack = self.weight.detach().to(rows.dtype) if routing is None else routing.cast(self.weight, rows.dtype)
        return grouped_product(rows, self.weight if self.own is None else self.own, stack, order.ends, self.expert)

    def train_only(self, expert: int) -> None:
        """Freeze all matrices but that of `expert`."""
        self.expert = expert
        self.weight.requires_grad_(False)
        self.own = nn.Parameter(self.weight.data[expert])
        self.register_state_dict_post_hook(_leave_own_out)
        self.register_load_state_dict_pre_hook(_take_own_from_stack)

    def _apply(self, fn: Any, recurse: bool = True) -> StackedProjection:
        super()._apply(fn, recurse)
        if self.own is not None:
            # Both were moved separately; they must share memory again.
            self.own.data = self.weight.data[self.expert]
        return self


def _leave_own_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    stacked = cast(StackedProjection, module)
    if stacked.own is None or stacked.own.data_ptr() != stacked.weight[stacked.expert].data_ptr():
        raise RuntimeError("the trained expert no longer shares the memory of its stack")
    del state[f"{prefix}own"]


def _take_own_from_stack(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    if f"{prefix}weight" in state:
        state[f"{prefix}own"] = state[f"{prefix}weight"][cast(StackedProjection, module).expert]


class Experts(nn.Module):
    """The experts' FFNs, each as wide as a dense FFN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        count, outer, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_proj = StackedProjection(count, outer, inner) if config.swiglu else None
        self.up_proj = StackedProjection(count, outer, inner)
        self.down_proj = StackedProjection(count, inner, outer)

    def forward(self, rows: Tensor, order: SortedChoices, routing: Routing | None) -> Tensor:
        """rows [A, D], sorted by expert -> [A, D]."""
        gate = self.gate_proj(rows, order, routing) if self.gate_proj is not None else None
        inner = inner_values(self.activation, self.up_proj(rows, order, routing), gate)
        result: Tensor = self.down_proj(inner, order, routing)
        return result


class MixtureOfExperts(nn.Module):
    """Top-k routing: softmax over all experts, the k most probable, their probabilities normalised to sum to 1.

    In training an expert takes at most ceil(capacity_factor * T * k / E) of a row's T positions; a choice beyond that
    is dropped and adds nothing to its token. Earlier positions of the row come first, whatever the scores and the other
    rows: no token depends on a later one, and no row on how the batch was split. Evaluation drops nothing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.capacity_factor = config.moe_capacity_factor
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor, site: Site, routing: Routing | None) -> Tensor:
        """x [B, T, D] -> [B, T, D] in the type of matrix products."""
        scores = self.router(x)
        probabilities = scores.softmax(-1)
        weights, experts = probabilities.topk(self.chosen, dim=-1)
        # With k = 1 the probability is the weight: a weight of 1 would give the router no gradient (Fedus et al. 2021).
        if self.chosen > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        member = torch.zeros_like(scores, dtype=torch.int32).scatter_(2, experts, 1)
        if self.training:
            number = _numbered(member, site, routing)
            row_length = routing.row_length if routing is not None else member.shape[1]
            kept = number.gather(2, experts) <= self.capacity(row_length, member.shape[2])
            weights = torch.where(kept, weights, 0.0)
            if routing is not None:
                sums = _router_sums(scores, probabilities, member, kept, number, routing.counted)
                routing.record(site, number[:, -1], sums)
        order = sort_by_expert(experts.flatten(0, 1), member.sum((0, 1)))
        rows = dispatch(x.flatten(0, 1).to(product_dtype(x)), order)
        return combine(self.experts(rows, order, routing), weights.flatten(0, 1), order).view(x.shape)

    def capacity(self, row_length: int, experts: int) -> int:
        """How many positions of a row of `row_length` an expert takes in training."""
        # Rounding may put the product just above a whole number: 1.2 * 10 * 2 / 8 must be 3, not 4.
        return math.ceil(self.capacity_factor * row_length * self.chosen / experts - 1e-9)


def _counted(member: Tensor, counted: Tensor | None) -> Tensor:
    """`member` [B, T, E] without the positions that do not count."""
    return member if counted is None else member * counted.unsqueeze(-1)


def _numbered(member: Tensor, site: Site, routing: Routing | None) -> Tensor:
    """How often each expert was chosen in the row up to a position, itself and earlier chunks included [B, T, E].

    `member` [B, T, E] is 1 for the experts of a position. A position that does not count uses no capacity.
    """
    number = _counted(member, routing.counted if routing is not None else None).cumsum(1, dtype=torch.int32)
    if routing is None or site not in routing.earlier:
        return number
    return number + routing.earlier[site].unsqueeze(1)


def _router_sums(
    scores: Tensor, probabilities: Tensor, member: Tensor, kept: Tensor, number: Tensor, counted: Tensor | None
) -> RouterSums | None:
    """The sums of the routers' losses; None in an update without gradient."""
    if not torch.is_grad_enabled():
        return None
    squares, left_out = scores.logsumexp(-1).square(), ~kept
    if counted is None:
        positions = torch.full_like(number[:, 0, 0], scores.shape[1])
    else:
        positions, squares = counted.sum(1), squares * counted
        left_out = left_out & counted.unsqueeze(-1)
    return RouterSums(
        positions=positions,
        assigned=_counted(member, counted).sum(1),
        so_far=number[:, -1],
        probability=_counted(probabilities, counted).sum(1),
        squares=squares.sum(1),
        dropped=left_out.sum((1, 2)),
    )
