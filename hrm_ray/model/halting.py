"""When a row or a token has thought enough: the reference's rule for puzzles, `gain` for text.

One job: decisions and their targets as pure functions of tensors. Losses are taken in the objectives.
"""

from __future__ import annotations

import torch
from torch import Tensor


def last_segment(steps: Tensor, halt_max_steps: int) -> Tensor:
    """Rows [B] that have used up their segments; `steps` counts segments, this one included."""
    return steps >= halt_max_steps


def halt_in_training(q_halt: Tensor, q_continue: Tensor, steps: Tensor, last: Tensor, min_steps: Tensor) -> Tensor:
    """Rows [B] that halt after this segment while training (ACTV1_SPEC, section 6.4).

    `min_steps` [B] is the exploration draw: a row goes on until then even if its scores say halt (0 = no draw).
    """
    return (last | (q_halt > q_continue)) & (steps >= min_steps)


def continue_target(next_q_halt: Tensor, next_q_continue: Tensor, last: Tensor) -> Tensor:
    """Bootstrapped target [B] of q_continue from the scores one segment ahead."""
    return torch.sigmoid(torch.where(last, next_q_halt, torch.maximum(next_q_halt, next_q_continue)))


def gain_target(previous_loss: Tensor, loss: Tensor, margin: float) -> Tensor:
    """Target [B, S] of text's halting head: 1 where one more segment did not lower the token's loss by over `margin`.

    Losses in nats. It looks one segment ahead only (ACTV1_SPEC, section 13).
    """
    return (loss >= previous_loss - margin).float()
