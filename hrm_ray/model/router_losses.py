"""The routers' losses, which balance the experts' load and keep router logits small, and metrics of their usage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_ray.model.config import ModelConfig
from hrm_ray.model.losses import sum_over_active
from hrm_ray.model.objective import Term
from hrm_ray.model.routing import RouterSums, Routing
from hrm_ray.types import IGNORE_LABEL

_ROWS = "routed_rows"
"""Denominator of the routers' losses."""


@dataclass(frozen=True)
class RouterLosses:
    """Coefficients of the load-balance loss and of the router z-loss."""

    balance: float
    z: float


NO_ROUTER_LOSSES = RouterLosses(0.0, 0.0)

RouterOutcome = tuple[tuple[Term, ...], dict[str, tuple[Tensor, Tensor]]]
"""The routers' loss terms and metrics of a pass."""


def router_weights(config: ModelConfig, active: Tensor, segments: int) -> dict[str, Tensor]:
    """The routers' denominator: `active` rows [B], once per segment of the step; empty for a dense model."""
    return {_ROWS: active.sum() * segments} if config.num_experts else {}


def text_routing(config: ModelConfig, labels: Tensor) -> Routing | None:
    """The record for a pass over whole rows of text with these `labels` [B, S]; None for a dense model."""
    return Routing(labels.shape[1], positions_that_count(labels)) if config.num_experts else None


def positions_that_count(labels: Tensor) -> Tensor:
    """Whether each position [B, S] of text counts for the routers: those up to the last label of their row do.

    What follows is padding, or a last token without a label, and must not be balanced.
    """
    return (labels != IGNORE_LABEL).flip(1).cummax(1).values.flip(1)


def router_terms(
    routing: Routing | None, active: Tensor, losses: RouterLosses, row_positions: Tensor | None = None
) -> RouterOutcome:
    """The routers' loss terms of one pass and metrics of the experts' usage; empty where no router recorded anything.

    Load balance (Fedus et al. 2021; per sequence as in DeepSeek-V3, 2024): E * sum_e f_e P_e with f_e the expert's
    share of the row's choices before drops and P_e the row's mean routing probability. Router z-loss (Zoph et al.
    2022): the mean of the squared logsumexp of the logits. Both are means over the routers whose update carries
    gradient, summed over the rows that are `active` [B].

    `row_positions` [B] is the number of positions that count in the whole row; without it the pass is the whole row. A
    chunk adds its positions' part of the means, with f the share up to its end, since later choices are not known.
    """
    sites = list(routing.routed.values()) if routing is not None else []
    if not sites:
        return (), {}
    experts = sites[0].assigned.shape[1]
    whole = (sites[0].positions if row_positions is None else row_positions).clamp(min=1)
    balance, squares = [], []
    for site in sites:
        share = site.so_far / site.so_far.sum(-1, keepdim=True).clamp(min=1)
        balance.append(experts * (share * site.probability).sum(-1) / whole)
        squares.append(site.squares / whole)
    terms = (
        Term("moe_balance_loss", sum_over_active(active, torch.stack(balance).mean(0)), _ROWS, losses.balance),
        Term("router_z_loss", sum_over_active(active, torch.stack(squares).mean(0)), _ROWS, losses.z),
    )
    with torch.no_grad():
        rows = sum_over_active(active, sites[0].positions / whole)
        metrics = {term.name: (term.total.detach(), rows) for term in terms} | _usage(sites, active)
    return terms, metrics


def _usage(sites: list[RouterSums], active: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Shares of the choices and mean probabilities, both [E], and the dropped share, over all routers."""
    assigned = torch.stack([sum_over_active(active, site.assigned) for site in sites]).sum(0)
    probability = torch.stack([sum_over_active(active, site.probability) for site in sites]).sum(0)
    dropped = torch.stack([sum_over_active(active, site.dropped) for site in sites]).sum()
    choices = assigned.sum()
    return {
        "expert_usage_share": (assigned, choices),
        "expert_usage_probability": (probability, sum_over_active(active, sites[0].positions) * len(sites)),
        "expert_usage_dropped": (dropped, choices),
    }
