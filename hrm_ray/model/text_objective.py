"""ACT on text: M segments on each batch, next-token loss, and the `gain` halting head (ACTV1_SPEC, section 13).

Every token of every segment is supervised. The halting head of segment m is trained in segment m+1, on the state in the
carry, so that no look-ahead pass is needed and no graph is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_ray.model.actv1 import ActV1, States
from hrm_ray.model.dropout import Draws
from hrm_ray.model.halting import gain_target
from hrm_ray.model.layers import Context
from hrm_ray.model.losses import LossKind
from hrm_ray.model.objective import Batch, CarryT, Objective, SegmentOutput, Term
from hrm_ray.model.router_losses import (
    NO_ROUTER_LOSSES,
    RouterLosses,
    RouterOutcome,
    router_terms,
    router_weights,
    text_routing,
)
from hrm_ray.model.scope import text_scope
from hrm_ray.model.scoring import score_tokens
from hrm_ray.model.transformer import Transformer
from hrm_ray.types import IGNORE_LABEL


@dataclass(frozen=True)
class TextCarry:
    """States [B, S, D] and token losses [B, S] (nats) of the last segment, and the number of segments done."""

    states: States
    token_loss: Tensor
    segments: int


class RolloutOnText(Objective[CarryT]):
    """Base of the objectives of ACT on text: denominators, and the losses of a segment's states."""

    model: ActV1

    def __init__(
        self, model: ActV1, loss: LossKind, halt_margin: float, router_losses: RouterLosses = NO_ROUTER_LOSSES
    ) -> None:
        super().__init__()
        self.model = model
        self.loss_kind = loss
        self.halt_margin = halt_margin
        self.router_losses = router_losses
        self.segments_per_step = model.config.halt_max_steps

    def weights(self, batch: Batch, carry: CarryT) -> dict[str, Tensor]:
        """`tokens`: valid labels, once per segment; `halt_tokens`: the same without the first segment."""
        valid = (batch["labels"] != IGNORE_LABEL).sum()
        return {
            "tokens": valid * self.segments_per_step,
            "halt_tokens": valid * (self.segments_per_step - 1),
            "rows": batch["active"].sum(),
        } | router_weights(self.model.config, batch["active"], self.segments_per_step)

    def supervised(
        self,
        carry: TextCarry,
        states: States,
        labels: Tensor,
        routed: RouterOutcome,
    ) -> SegmentOutput[TextCarry]:
        """The losses of a segment that started from `carry` and ended in `states`, for whole rows or a chunk of them;
        sums over valid tokens. `routed` are the routers' terms and metrics.

        Metrics: `segment_loss` is the token loss of every segment, the main part of the objective; `loss` and
        `token_accuracy` are those of the last segment, as in an evaluation.
        """
        scored = score_tokens(states.z_h, self.model.lm_head.weight, labels, self.loss_kind)
        token_loss, valid = scored.loss, labels != IGNORE_LABEL
        halting, halting_metrics = self._halting_term(carry, token_loss.detach().float(), valid)
        terms = (Term("segment_loss", token_loss.sum(), "tokens"), halting, *routed[0])
        count = valid.sum()
        metrics = routed[1] | halting_metrics
        if self.segments_per_step > 1:
            metrics["segment_loss"] = (token_loss.detach().sum(), count)
        if carry.segments + 1 == self.segments_per_step:
            metrics["loss"] = (token_loss.detach().sum(), count)
            metrics["token_accuracy"] = (scored.hit.sum(), count)
        new_carry = TextCarry(states.detach(), token_loss.detach().float(), carry.segments + 1)
        return SegmentOutput(terms, new_carry, metrics)

    def _halting_term(
        self, carry: TextCarry, token_loss: Tensor, valid: Tensor
    ) -> tuple[Term, dict[str, tuple[Tensor, Tensor]]]:
        """The halting head's loss on the states in the carry; its target is whether this segment lowered their loss."""
        q_halt, q_continue = self.model.halting_scores(carry.states.z_h)
        # In the first segment, and without halting, a zero keeps the head in the graph, since DDP and ZeRO wait for it.
        idle = 0.0 * (q_halt.sum() + q_continue.sum())
        if carry.segments == 0 or self.model.config.halt_rule == "none":
            return Term("q_halt_loss", idle, "halt_tokens", 0.5), {}
        target = gain_target(carry.token_loss, token_loss, self.halt_margin)
        loss = F.binary_cross_entropy_with_logits(q_halt, target, reduction="none")
        total = torch.where(valid, loss, 0.0).sum()
        with torch.no_grad():
            count = valid.sum()
            metrics = {
                "q_halt_loss": (total.detach(), count),
                "q_halt_accuracy": ((valid & ((q_halt > 0) == (target > 0.5))).sum(), count),
                "halt_share": ((valid & (q_halt > 0)).sum(), count),
            }
        return Term("q_halt_loss", total + idle, "halt_tokens", 0.5), metrics


class TextObjective(RolloutOnText[TextCarry]):
    """ACT on whole rows of text."""

    def initial_carry(self, batch: Batch) -> TextCarry:
        rows, length = batch["inputs"].shape
        zeros = torch.zeros(rows, length, device=batch["inputs"].device)
        return TextCarry(self.model.initial_states(rows, length), zeros, 0)

    def forward(self, batch: Batch, carry: TextCarry) -> SegmentOutput[TextCarry]:
        """One segment; its inputs are those of the segment before."""
        model = self.model
        inputs, labels = batch["inputs"], batch["labels"]
        x = model.embedding(inputs, None, batch.get("positions"))
        scope = text_scope(batch.get("documents"), batch.get("prompt"), model.config.window_size)
        routing = text_routing(model.config, labels)
        context = Context(scope, model.rotation(0, inputs.shape[1]), routing=routing, draws=Draws.of(batch))
        states = model.segment(carry.states, x, context)
        return self.supervised(carry, states, labels, router_terms(routing, batch["active"], self.router_losses))


@dataclass(frozen=True)
class NoCarry:
    """The carry of a network without states."""


class OnePassOnText(Objective[CarryT]):
    """Base of the objectives of the baseline transformer: denominators, and the loss of hidden states."""

    model: Transformer

    segments_per_step = 1

    def __init__(self, model: Transformer, loss: LossKind, router_losses: RouterLosses = NO_ROUTER_LOSSES) -> None:
        super().__init__()
        self.model = model
        self.loss_kind = loss
        self.router_losses = router_losses

    def weights(self, batch: Batch, carry: CarryT) -> dict[str, Tensor]:
        """`tokens`: valid labels."""
        own = {"tokens": (batch["labels"] != IGNORE_LABEL).sum(), "rows": batch["active"].sum()}
        return own | router_weights(self.model.config, batch["active"], 1)

    def supervised(
        self, hidden: Tensor, labels: Tensor, routed: RouterOutcome
    ) -> tuple[tuple[Term, ...], dict[str, tuple[Tensor, Tensor]]]:
        """Terms and metrics of `hidden` [B, T, D], for whole rows or a chunk of them; see RolloutOnText."""
        scored = score_tokens(hidden, self.model.lm_head.weight, labels, self.loss_kind)
        token_loss, count = scored.loss, (labels != IGNORE_LABEL).sum()
        metrics = routed[1] | {
            "loss": (token_loss.detach().sum(), count),
            "token_accuracy": (scored.hit.sum(), count),
        }
        return (Term("segment_loss", token_loss.sum(), "tokens"), *routed[0]), metrics


class TransformerObjective(OnePassOnText[NoCarry]):
    """The baseline transformer on whole rows of text."""

    def initial_carry(self, batch: Batch) -> NoCarry:
        return NoCarry()

    def forward(self, batch: Batch, carry: NoCarry) -> SegmentOutput[NoCarry]:
        """The only segment."""
        inputs, labels = batch["inputs"], batch["labels"]
        x = self.model.embedding(inputs, None, batch.get("positions"))
        scope = text_scope(batch.get("documents"), batch.get("prompt"), self.model.config.window_size)
        routing = text_routing(self.model.config, labels)
        rotation, draws = self.model.rotation(0, inputs.shape[1]), Draws.of(batch)
        hidden = self.model(x, Context(scope, rotation, routing=routing, draws=draws))
        routed = router_terms(routing, batch["active"], self.router_losses)
        terms, metrics = self.supervised(hidden, labels, routed)
        return SegmentOutput(terms, carry, metrics)
