"""The size of an architecture: parameters by part, and FLOPs per token.

Parameters are counted from the modules themselves on PyTorch's meta device, so nothing is allocated.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from hrm_ray.model.build import build_model
from hrm_ray.model.config import ModelConfig

_PARTS = {
    "token embedding": "embedding.embed_tokens.",
    "position embedding": "embedding.embed_pos.",
    "puzzle embedding": "embedding.puzzle_emb.",
    "H level": "H_level.",
    "L level": "L_level.",
    "transformer stack": "stack.",
    "output head": "lm_head.",
    "halting head": "q_head.",
}


@dataclass(frozen=True)
class ParameterCount:
    """Trained values by part, the puzzle table included; `idle` of them belong to experts that a token does not use."""

    by_part: dict[str, int]
    idle: int = 0

    @property
    def total(self) -> int:
        return sum(self.by_part.values())

    @property
    def active(self) -> int:
        """Values that one token is computed with."""
        return self.total - self.idle


@dataclass(frozen=True)
class Summary:
    """Parameters and FLOPs of one architecture.

    FLOPs count a multiply and an add as two, matrix products only; per token of the sequence, for all segments.
    """

    config: ModelConfig
    parameters: dict[str, int]
    total_parameters: int
    active_parameters: int
    forward_flops_per_token: int
    training_flops_per_token: int

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    def as_text(self) -> str:
        """A table for a terminal."""
        width = max(len(part) for part in self.parameters)
        lines = [f"{part:<{width}}  {count:>15,}" for part, count in self.parameters.items()]
        lines += [
            f"{'total':<{width}}  {self.total_parameters:>15,}",
            *([f"{'active':<{width}}  {self.active_parameters:>15,}  (per token)"] if self.config.num_experts else []),
            "",
            f"forward, all segments         {self.forward_flops_per_token / 1e6:,.2f} MFLOP per token",
            f"training, all segments        {self.training_flops_per_token / 1e6:,.2f} MFLOP per token",
            f"(sequence {self.config.seq_len}, vocabulary {self.config.vocab_size}, "
            f"{self.config.halt_max_steps} segment(s) of {self.config.updates_per_segment} updates)",
        ]
        return "\n".join(lines)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the values that training changes, without allocating them."""
    with torch.device("meta"):
        model = build_model(config)
    counted = {name: p.numel() for name, p in model.named_parameters()}
    counted |= {name: b.numel() for name, b in model.named_buffers() if name.endswith("puzzle_emb.weights")}
    parts = {
        part: sum(count for name, count in counted.items() if name.startswith(prefix))
        for part, prefix in _PARTS.items()
    }
    idle = 0
    if config.num_experts:
        experts = sum(count for name, count in counted.items() if ".mlp.experts." in name)
        idle = experts // config.num_experts * (config.num_experts - config.num_experts_per_tok)
    return ParameterCount({part: count for part, count in parts.items() if count}, idle)


def layer_flops(config: ModelConfig) -> int:
    """Forward FLOPs of one block for one token: projections, and attention over the whole sequence or the window.

    With experts: the router and the experts that a token uses; dropped choices are computed too. The work for the
    prefix positions of a puzzle embedding is spread over the tokens.
    """
    matrices = (3 if config.swiglu else 2) * (config.num_experts_per_tok if config.num_experts else 1)
    projections = 4 * config.hidden_size**2 + matrices * config.hidden_size * config.intermediate_size
    projections += config.num_experts * config.hidden_size
    seen = config.total_positions if config.window_size is None else min(config.window_size, config.total_positions)
    position = 2 * projections + 4 * seen * config.hidden_size
    return position * config.total_positions // config.seq_len


def segment_flops(config: ModelConfig) -> tuple[int, int]:
    """(forward, backward) FLOPs of one segment for one token, look-ahead not counted.

    A backward pass costs twice its forward, and only the updates that carry gradient have one.
    """
    head = 2 * config.hidden_size * config.vocab_size
    layer = layer_flops(config)
    if config.arch == "transformer":
        stack = (config.h_layers + config.l_layers) * layer
        return stack + head, 2 * (stack + head)
    order = ["L"] * config.l_cycles + ["H"]
    updates = order * config.h_cycles
    cost = {"H": config.h_layers * layer, "L": config.l_layers * layer}
    forward = sum(cost[kind] for kind in updates) + head
    backward = 2 * (sum(cost[kind] for kind in updates[-config.bp_steps :]) + head)
    return forward, backward


def training_flops(config: ModelConfig, supervision: str) -> int:
    """FLOPs of one weight update for one token: every segment, and for puzzles the look-ahead."""
    forward, backward = segment_flops(config)
    segments = config.halt_max_steps if supervision == "rollout" else 1
    ahead = 0
    if config.task == "puzzle" and config.halt_max_steps > 1:
        ahead = forward - 2 * config.hidden_size * config.vocab_size
    return segments * (forward + backward + ahead)


def summarise(config: ModelConfig) -> Summary:
    """Parameters and FLOPs of an architecture."""
    count = count_parameters(config)
    forward, _ = segment_flops(config)
    return Summary(
        config=config,
        parameters=count.by_part,
        total_parameters=count.total,
        active_parameters=count.active,
        forward_flops_per_token=forward * config.halt_max_steps,
        training_flops_per_token=training_flops(config, "rollout"),
    )
