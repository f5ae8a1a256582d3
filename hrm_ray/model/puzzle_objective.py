"""ACT on puzzles: carry, halting with look-ahead, and the reference's losses (ACTV1_SPEC, sections 6 and 7).

A row is replaced by the batch's row only when it has halted, so one forward serves both carried supervision (a segment
per step) and rollout (all segments of a batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_ray.model.actv1 import ActV1, States
from hrm_ray.model.dropout import Draws
from hrm_ray.model.halting import continue_target, halt_in_training, last_segment
from hrm_ray.model.layers import Context
from hrm_ray.model.losses import CROSS_ENTROPIES, LossKind, sum_over_active
from hrm_ray.model.objective import Batch, Objective, SegmentOutput, Term
from hrm_ray.model.router_losses import NO_ROUTER_LOSSES, RouterLosses, router_terms, router_weights
from hrm_ray.model.routing import Routing
from hrm_ray.model.scope import FULL
from hrm_ray.types import IGNORE_LABEL

ROW_FIELDS = ("inputs", "labels", "puzzle_identifiers", "active")
"""Columns of the batch that stay with a row until it halts."""


@dataclass(frozen=True)
class PuzzleCarry:
    """Per slot: states [B, T, D], segments run int32 [B], whether its row has halted bool [B], and the row itself."""

    states: States
    steps: Tensor
    halted: Tensor
    data: Batch

    @classmethod
    def joined(cls, carries: Sequence[PuzzleCarry]) -> PuzzleCarry:
        """The carries of several micro-batches as one."""
        return cls(
            states=States(
                torch.cat([carry.states.z_h for carry in carries]), torch.cat([carry.states.z_l for carry in carries])
            ),
            steps=torch.cat([carry.steps for carry in carries]),
            halted=torch.cat([carry.halted for carry in carries]),
            data={name: torch.cat([carry.data[name] for carry in carries]) for name in ROW_FIELDS},
        )

    def split(self, rows: int) -> list[PuzzleCarry]:
        """One carry for every `rows` rows."""
        return [
            PuzzleCarry(
                states=self.states.map(lambda state, part=part: state[part]),  # type: ignore[misc]
                steps=self.steps[part],
                halted=self.halted[part],
                data={name: values[part] for name, values in self.data.items()},
            )
            for part in (slice(first, first + rows) for first in range(0, len(self.halted), rows))
        ]


@dataclass(frozen=True)
class PuzzleView:
    """What a segment computes, for losses and evaluation; logits [B, S, V], the rest [B]."""

    logits: Tensor
    q_halt: Tensor
    q_continue: Tensor
    target_q_continue: Tensor | None
    carry: PuzzleCarry
    routing: Routing | None


class PuzzleObjective(Objective[PuzzleCarry]):
    """The ACT wrapper and loss head for puzzles."""

    model: ActV1

    def __init__(
        self, model: ActV1, loss: LossKind, *, rollout: bool, router_losses: RouterLosses = NO_ROUTER_LOSSES
    ) -> None:
        super().__init__()
        self.model = model
        self.cross_entropy = CROSS_ENTROPIES[loss]
        self.rollout = rollout
        self.router_losses = router_losses
        self.segments_per_step = model.config.halt_max_steps if rollout else 1

    def initial_carry(self, batch: Batch) -> PuzzleCarry:
        """All slots halted, so that the first segment takes every row of the batch."""
        rows, device = batch["inputs"].shape[0], batch["inputs"].device
        states = self.model.initial_states(rows, self.model.config.total_positions)
        return PuzzleCarry(
            states=states.map(torch.zeros_like),
            steps=torch.zeros(rows, dtype=torch.int32, device=device),
            halted=torch.ones(rows, dtype=torch.bool, device=device),
            data={name: torch.zeros_like(batch[name]) for name in ROW_FIELDS},
        )

    def split_carries(self, carries: list[PuzzleCarry], rows: int) -> list[PuzzleCarry]:
        return PuzzleCarry.joined(carries).split(rows)

    def weights(self, batch: Batch, carry: PuzzleCarry) -> dict[str, Tensor]:
        """`rows`: active rows, once per segment of the step."""
        active = torch.where(carry.halted, batch["active"], carry.data["active"])
        own = {"rows": active.sum() * self.segments_per_step}
        return own | router_weights(self.model.config, active, self.segments_per_step)

    def refill(self, batch: Batch, carry: PuzzleCarry) -> PuzzleCarry:
        """Halted slots take the row of the batch and restart; the others keep theirs."""
        fresh = carry.halted
        return PuzzleCarry(
            states=self._restarted_where(fresh, carry.states),
            steps=torch.where(fresh, 0, carry.steps),
            halted=fresh,
            data={
                name: torch.where(fresh.view(-1, *[1] * (batch[name].dim() - 1)), batch[name], carry.data[name])
                for name in ROW_FIELDS
            },
        )

    def restarted(self, carry: PuzzleCarry) -> PuzzleCarry:
        """Rows whose states are not finite start again with the same puzzle."""
        broken = ~(carry.states.z_h.isfinite().all(-1).all(-1) & carry.states.z_l.isfinite().all(-1).all(-1))
        states = self._restarted_where(broken, carry.states)
        return replace(carry, states=states, steps=torch.where(broken, 0, carry.steps))

    def _restarted_where(self, chosen: Tensor, states: States) -> States:
        """The starting states in the rows that are `chosen` [B], else `states`."""
        start = self.model.initial_states(len(chosen), self.model.config.total_positions)
        wide = chosen.view(-1, 1, 1)
        return States(torch.where(wide, start.z_h, states.z_h), torch.where(wide, start.z_l, states.z_l))

    def segment(self, batch: Batch, carry: PuzzleCarry) -> PuzzleView:
        """One ACT step: refill halted slots, run one segment, decide which rows halt (ACTV1_SPEC, section 6)."""
        model, config = self.model, self.model.config
        carry = self.refill(batch, carry)
        x = model.embedding(carry.data["inputs"], carry.data["puzzle_identifiers"], None, carry.data["active"])
        routing = Routing(config.total_positions) if config.num_experts else None
        draws = Draws.of(batch)
        context = Context(FULL, model.rotation(0, config.total_positions), routing=routing, draws=draws)
        states = model.segment(carry.states, x, context)
        q_halt, q_continue = model.halting_scores(states.z_h[:, 0])
        steps = carry.steps + 1
        last = last_segment(steps, config.halt_max_steps)
        halted, target = last, None
        if self.training and config.halt_max_steps > 1:
            with torch.no_grad():
                # In rollout every row runs all segments, so neither scores nor exploration decide.
                if not self.rollout:
                    halted = halt_in_training(q_halt, q_continue, steps, last, batch["min_steps"])
                # The look-ahead must not add to the routers' losses.
                apart = replace(
                    context,
                    routing=routing.detached() if routing is not None else None,
                    draws=draws.looking_ahead() if draws is not None else None,
                )
                ahead = model.segment(states.detach(), x.detach(), apart)
                target = continue_target(*model.halting_scores(ahead.z_h[:, 0]), last)
        # A slot of padding halts, so that it can take a row of the next epoch at once.
        halted = halted | ~carry.data["active"]
        new_carry = PuzzleCarry(states.detach(), steps, halted, carry.data)
        return PuzzleView(model.logits(states.z_h), q_halt, q_continue, target, new_carry, routing)

    def forward(self, batch: Batch, carry: PuzzleCarry) -> SegmentOutput[PuzzleCarry]:
        """One segment and its losses (ACTV1_SPEC, section 7); sums over active rows."""
        view = self.segment(batch, carry)
        labels, active = view.carry.data["labels"], view.carry.data["active"]
        supervised = labels != IGNORE_LABEL
        counts = supervised.sum(-1)
        loss_rows = self.cross_entropy(view.logits, labels).sum(-1) / counts.clamp(min=1)
        hit = supervised & (view.logits.argmax(-1) == labels)
        correct = hit.sum(-1) == counts
        halt_rows = _bce_rows(view.q_halt, correct.float())
        terms = [
            Term("segment_loss", sum_over_active(active, loss_rows), "rows"),
            Term("q_halt_loss", sum_over_active(active, halt_rows), "rows", 0.5),
        ]
        if view.target_q_continue is not None:
            continue_rows = _bce_rows(view.q_continue, view.target_q_continue)
            terms.append(Term("q_continue_loss", sum_over_active(active, continue_rows), "rows", 0.5))
        routed, router_metrics = router_terms(view.routing, active, self.router_losses)
        rows = active.sum()
        metrics = {term.name: (term.total.detach(), rows) for term in terms} | router_metrics
        with torch.no_grad():
            metrics |= _halted_metrics(view, active & (counts > 0), loss_rows, hit, counts, correct)
        return SegmentOutput((*terms, *routed), view.carry, metrics)


def _bce_rows(scores: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, target, reduction="none")


def _halted_metrics(
    view: PuzzleView, valid: Tensor, loss_rows: Tensor, hit: Tensor, counts: Tensor, correct: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over rows that halted after this segment and have supervised labels, each with their number.

    Like those of an evaluation they describe the answer that a row ends with.
    """
    done = view.carry.halted & valid
    number = done.sum()
    return {
        "loss": (sum_over_active(done, loss_rows), number),
        "cell_accuracy": (sum_over_active(done, hit.float().sum(-1) / counts.clamp(min=1)), number),
        "exact_accuracy": ((done & correct).sum(), number),
        "q_halt_accuracy": ((done & ((view.q_halt >= 0) == correct)).sum(), number),
        "act_steps": (torch.where(done, view.carry.steps, 0).sum(), number),
    }
