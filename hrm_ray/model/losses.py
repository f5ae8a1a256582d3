"""Cross entropies per token."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_ray.types import IGNORE_LABEL

LossKind = Literal["softmax", "stablemax"]


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-token cross entropy [B, S] in float32; 0 where the label is ignored."""
    flat = F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]),
        labels.reshape(-1).long(),
        ignore_index=IGNORE_LABEL,
        reduction="none",
    )
    return flat.view(labels.shape)


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-token cross entropy [B, S] of stablemax, in float64; 0 where the label is ignored.

    s(x) = x + 1 for x >= 0, 1 / (1 - x + 1e-30) below; p = s / sum s (sapientinc/HRM, `stablemax_cross_entropy`).
    """
    wide = logits.double()
    # The unused branch of `where` must stay finite, or its gradient makes the used one NaN; the clamp ensures it.
    below = 1 / (1 - wide.clamp(max=0) + 1e-30)
    score = torch.where(wide < 0, below, wide + 1)
    valid = labels != IGNORE_LABEL
    index = torch.where(valid, labels, 0).long().unsqueeze(-1)
    picked = torch.log(score.gather(-1, index)) - torch.log(score.sum(-1, keepdim=True))
    return torch.where(valid, -picked.squeeze(-1), 0.0)


def sum_over_active(active: Tensor, rows: Tensor) -> Tensor:
    """Sum of `rows` [B] or [B, E] over the `active` ones [B]."""
    # By selection, so that a NaN of an inactive row cannot reach the loss.
    return torch.where(active if rows.dim() == 1 else active.unsqueeze(-1), rows, 0).sum(0)


CROSS_ENTROPIES = {"softmax": softmax_cross_entropy, "stablemax": stablemax_cross_entropy}
"""By the name that `--loss` takes."""
