"""Loss and correctness of every token, without ever holding the scores of a long sequence over a large vocabulary.

One job: from hidden states to a loss per token. Scores [tokens, V] beyond a fixed size are made piece by piece and made
again in the backward pass. Which tokens weigh how much is the objective's.
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
"""Scores in float32 that are held at once; a sequence whose scores fit is computed in one go, without recomputation."""


@dataclass(frozen=True)
class Scored:
    """Per token: `loss` in nats (0 where the label is ignored) and whether the likeliest token was the `hit` [B, S]."""

    loss: Tensor
    hit: Tensor


def score_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, kind: LossKind, bytes_at_once: int | None = None
) -> Scored:
    """Score `hidden` [B, S, D] against `labels` [B, S] with the output head `weight` [V, D].

    The same numbers whatever `bytes_at_once` (SCORES_BYTES if not said) is; beyond it the backward pass computes the
    scores a second time.
    """
    dtype = product_dtype(hidden)
    tokens, vocabulary = labels.numel(), weight.shape[0]
    rows = max(1, (SCORES_BYTES if bytes_at_once is None else bytes_at_once) // (4 * vocabulary))
    if tokens <= rows:
        logits = F.linear(hidden.to(dtype), weight.to(dtype))
        return Scored(CROSS_ENTROPIES[kind](logits, labels), _hits(logits, labels))
    flat = hidden.reshape(tokens, hidden.shape[-1])
    loss, hit = _Pieces.apply(flat, weight, labels.reshape(tokens), kind, rows, dtype)
    return Scored(loss.view(labels.shape), hit.view(labels.shape))


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return (labels != IGNORE_LABEL) & (logits.argmax(-1) == labels)


class _Pieces(torch.autograd.Function):
    """Cross entropy over pieces of `rows` tokens; keeps hidden states and labels only."""

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
        # Added up in float32 whatever the pieces are computed in: a vocabulary's gradient is a sum over many pieces.
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for first in range(0, hidden.shape[0], ctx.rows):
            part = slice(first, first + ctx.rows)
            piece = hidden[part].to(ctx.dtype)
            to_logits = _gradient_of_scores(F.linear(piece, head), labels[part], ctx.kind, gradients[0][part])
            if to_hidden is not None:
                to_hidden[part] = (to_logits @ head).to(hidden.dtype)
            if to_weight is not None:
                _add_product(to_weight, to_logits, piece)
        return to_hidden, None if to_weight is None else to_weight.to(weight.dtype), None, None, None, None


def _gradient_of_scores(logits: Tensor, labels: Tensor, kind: LossKind, gradient: Tensor) -> Tensor:
    """The loss's gradient by the scores [tokens, V], given its `gradient` per token."""
    if kind == "softmax":
        # (p - 1 at the label) x gradient, in one buffer; autograd would keep three of this size.
        valid = labels != IGNORE_LABEL
        by_score = torch.softmax(logits.float(), -1)
        by_score.scatter_add_(-1, torch.where(valid, labels, 0).long().unsqueeze(-1), -valid.float().unsqueeze(-1))
        return by_score.mul_(torch.where(valid, gradient, 0.0).unsqueeze(-1)).to(logits.dtype)
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        loss = CROSS_ENTROPIES[kind](leaf, labels)
    return torch.autograd.grad(loss, leaf, gradient)[0]


def _add_product(total: Tensor, to_logits: Tensor, piece: Tensor) -> None:
    """total [V, D] += to_logits^T piece, in place where the types allow it."""
    if to_logits.dtype == total.dtype:
        total.addmm_(to_logits.t(), piece)
    else:
        total.add_(to_logits.t() @ piece)
