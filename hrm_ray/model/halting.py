"""When a row or a token halts, and targets of the halting head: the reference's rule for puzzles, `gain` for text."""

from __future__ import annotations

import torch
from torch import Tensor


def last_segment(steps: Tensor, halt_max_steps: int) -> Tensor:
    """Whether each row [B] has run all its segments; `steps` counts them, including the current one."""
    return steps >= halt_max_steps


def halt_in_training(q_halt: Tensor, q_continue: Tensor, steps: Tensor, last: Tensor, min_steps: Tensor) -> Tensor:
    """Whether each row [B] halts after this segment of training (ACTV1_SPEC, section 6.4).

    `min_steps` [B] is the exploration: a row runs at least so many segments, whatever its scores (0: no exploration).
    """
    return (last | (q_halt > q_continue)) & (steps >= min_steps)


def continue_target(next_q_halt: Tensor, next_q_continue: Tensor, last: Tensor) -> Tensor:
    """Bootstrapped target [B] of q_continue, from the scores one segment ahead (ACTV1_SPEC, section 7)."""
    return torch.sigmoid(torch.where(last, next_q_halt, torch.maximum(next_q_halt, next_q_continue)))


def gain_target(previous_loss: Tensor, loss: Tensor, margin: float) -> Tensor:
    """Target [B, S] of the halting head for text: 1 where one more segment lowered the token's loss (nats) by no more
    than `margin` (ACTV1_SPEC, section 13)."""
    return (loss >= previous_loss - margin).float()
