"""Loss and accuracy of every token, in pieces, so that the logits of a long sequence are never held at once.

Logits [tokens, V] beyond a fixed size are computed piece by piece, and again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_ray.model.autocast import product_dtype
from hrm_ray.model.losses import CROSS_ENTROPIES, LossKind
from hrm_ray.types import IGNORE_LABEL

SCORES_BYTES = 128 * 2**20
"""Float32 logits that are held at once; a sequence whose logits fit is computed whole, without recomputation."""


@dataclass(frozen=True)
class Scored:
    """Per token [B, S]: `loss` in nats (0 where the label is ignored), and `hit`, whether the argmax is the label."""

    loss: Tensor
    hit: Tensor


def score_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, kind: LossKind, bytes_at_once: int | None = None
) -> Scored:
    """Score `hidden` [B, S, D] against `labels` [B, S] with the output head `weight` [V, D].

    Numbers do not depend on `bytes_at_once` (default SCORES_BYTES); beyond it the backward pass computes the logits a
    second time.
    """
    dtype = product_dtype(hidden)
    tokens, vocabulary = labels.numel(), weight.shape[0]
    rows = max(1, (SCORES_BYTES if bytes_at_once is None else bytes_at_once) // (4 * vocabulary))
    if tokens <= rows:
        logits = F.linear(hidden.to(dtype), weight.to(dtype))
        return Scored(CROSS_ENTROPIES[kind](logits, labels), _hits(logits, labels))
    flat = hidden.reshape(tokens, hidden.shape[-1])
    loss, hit = _ScoresInPieces.apply(flat, weight, labels.reshape(tokens), kind, rows, dtype)
    return Scored(loss.view(labels.shape), hit.view(labels.shape))


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return (labels != IGNORE_LABEL) & (logits.argmax(-1) == labels)


class _ScoresInPieces(torch.autograd.Function):
    """Cross entropy over pieces of `rows` tokens; saves hidden states and labels only."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, kind: LossKind, rows: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.kind, ctx.rows, ctx.dtype = kind, rows, dtype
        head = weight.to(dtype)
        losses, hits = [], []
        for piece, wanted in zip(hidden.split(rows), labels.split(rows), strict=True):
            with torch.autocast(hidden.device.type, enabled=False):
                logits = F.linear(piece.to(dtype), head)
            losses.append(CROSS_ENTROPIES[kind](logits, wanted))
            hits.append(_hits(logits, wanted))
        hit = torch.cat(hits)
        ctx.mark_non_differentiable(hit)
        return torch.cat(losses), hit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden, weight, labels = ctx.saved_tensors
        head = weight.to(ctx.dtype)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed in float32 whatever the type of the pieces: the head's gradient is a sum over many of them.
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for first in range(0, hidden.shape[0], ctx.rows):
            part = slice(first, first + ctx.rows)
            piece = hidden[part].to(ctx.dtype)
            to_logits = _gradient_of_logits(F.linear(piece, head), labels[part], ctx.kind, gradients[0][part])
            if to_hidden is not None:
                to_hidden[part] = (to_logits @ head).to(hidden.dtype)
            if to_weight is not None and to_logits.dtype == to_weight.dtype:
                to_weight.addmm_(to_logits.t(), piece)
            elif to_weight is not None:
                to_weight.add_(to_logits.t() @ piece)
        return to_hidden, None if to_weight is None else to_weight.to(weight.dtype), None, None, None, None


def _gradient_of_logits(logits: Tensor, labels: Tensor, kind: LossKind, gradient: Tensor) -> Tensor:
    """The gradient of the loss by the logits [tokens, V], given its `gradient` per token."""
    if kind == "softmax":
        # (p - 1 at the label) x gradient, in one buffer; autograd would save three of this size.
        valid = labels != IGNORE_LABEL
        probabilities = torch.softmax(logits.float(), -1)
        probabilities.scatter_add_(-1, torch.where(valid, labels, 0).long().unsqueeze(-1), -valid.float().unsqueeze(-1))
        return probabilities.mul_(torch.where(valid, gradient, 0.0).unsqueeze(-1)).to(logits.dtype)
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        loss = CROSS_ENTROPIES[kind](leaf, labels)
    return torch.autograd.grad(loss, leaf, gradient)[0]
