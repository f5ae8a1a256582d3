"""A mixture of experts on one row, token by token and expert by expert, in float64.

One job: the yardstick for model/moe.py, with nothing taken from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from hrm_ray.model.config import ModelConfig

FeedForward = Callable[[int, Tensor], Tensor]
"""(expert, x [D]) -> [D]."""


@dataclass
class Told:
    """What a router did on one row: choices and drops that count, summed probabilities and squared logsumexps."""

    chosen: list[int]
    dropped: int = 0
    probability: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    counted: int = 0
    gap: float = math.inf
    """How near the choice of an expert has come to another one's, in probability."""

    @property
    def balance(self) -> Tensor:
        """E * sum_e f_e P_e."""
        count = max(sum(self.chosen), 1)
        shares = [number / count for number in self.chosen]
        parts = [f * p / max(self.counted, 1) for f, p in zip(shares, self.probability, strict=True)]
        return len(shares) * torch.stack(parts).sum()

    @property
    def z(self) -> Tensor:
        return self.squares / max(self.counted, 1)


def naive_experts(
    config: ModelConfig, router: Tensor, feed_forward: FeedForward, x: Tensor, *, training: bool, counted: int
) -> tuple[Tensor, Told]:
    """x [T, D] -> [T, D]; the first `counted` positions count."""
    length, experts, k = len(x), config.num_experts, config.num_experts_per_tok
    limit = math.ceil(Fraction(str(config.moe_capacity_factor)) * length * k / experts)
    told = Told([0] * experts, probability=torch.zeros(experts, dtype=torch.float64), counted=counted)
    outputs = []
    for position, token in enumerate(x):
        scores = router @ token
        probability = torch.exp(scores) / torch.exp(scores).sum()
        ranked = sorted(range(experts), key=lambda expert: -float(probability[expert].detach()))
        best = ranked[:k]
        if k < experts:
            told.gap = min(told.gap, float((probability[ranked[k - 1]] - probability[ranked[k]]).detach()))
        out = torch.zeros_like(token)
        for expert in best:
            counts = position < counted
            told.chosen[expert] += counts
            if training and told.chosen[expert] > limit:
                told.dropped += counts
                continue
            weight = probability[expert] / sum(probability[e] for e in best) if k > 1 else probability[expert]
            out = out + weight * feed_forward(expert, token)
        outputs.append(out)
        if position < counted:
            told.probability = told.probability + probability
            told.squares = told.squares + torch.log(torch.exp(scores).sum()) ** 2
    return torch.stack(outputs), told


def naive_feed_forward(
    config: ModelConfig, weights: Mapping[str, Tensor], bent: Callable[[Tensor], Tensor]
) -> FeedForward:
    """One expert's FFN out of the stacked `weights` by projection; `bent` is the activation."""

    def expert_output(expert: int, x: Tensor) -> Tensor:
        up = weights["up_proj"][expert] @ x
        inner = bent(weights["gate_proj"][expert] @ x) * up if config.swiglu else bent(up)
        return weights["down_proj"][expert] @ inner

    return expert_output
