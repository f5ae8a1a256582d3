"""Answers of a puzzle model.

One job: run the segments on whole puzzles and read each one's answer, at the last segment or where Q says stop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.layers import Context
from hrm_ray.model.scope import FULL


@dataclass(frozen=True)
class Answers:
    """The likeliest token of every cell [B, S] and how many segments each puzzle was thought about [B]."""

    tokens: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]


@torch.no_grad()
def solve(
    model: ActV1, inputs: npt.NDArray[np.int32], identifiers: npt.NDArray[np.int32], *, stop_by_q: bool
) -> Answers:
    """Answer puzzles [B, S]. With `stop_by_q` a puzzle is read at the first segment where q_halt > q_continue."""
    config, device = model.config, model.lm_head.weight.device
    cells = torch.from_numpy(inputs).to(device)
    x = model.embedding(cells, torch.from_numpy(identifiers).to(device), None)
    states = model.initial_states(len(inputs), config.total_positions)
    context = Context(FULL, model.rotation(0, config.total_positions))
    answer = torch.zeros_like(cells)
    segments = torch.zeros(len(inputs), dtype=torch.int32, device=device)
    for segment in range(1, config.halt_max_steps + 1):
        states = model.segment(states, x, context)
        q_halt, q_continue = model.halting_scores(states.z_h[:, 0])
        stops = (q_halt > q_continue) if stop_by_q else torch.zeros_like(segments, dtype=torch.bool)
        if segment == config.halt_max_steps:
            stops = torch.ones_like(stops)
        now = stops & (segments == 0)
        tokens = model.logits(states.z_h).argmax(-1).to(answer.dtype)
        answer = torch.where(now.unsqueeze(-1), tokens, answer)
        segments = torch.where(now, segment, segments)
    return Answers(answer.cpu().numpy(), segments.cpu().numpy())
