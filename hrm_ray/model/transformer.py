"""The baseline: a causal transformer of the same post-norm blocks, in one pass, without cycles, carry or halting."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hrm_ray.model.config import ModelConfig
from hrm_ray.model.embedding import InputEmbedding
from hrm_ray.model.initialise import draw_parameter_
from hrm_ray.model.layers import Context, Level, RotaryTable, Rotation, linear


class Transformer(nn.Module):
    """`h_layers + l_layers` blocks over the same input embedding, with its own output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = InputEmbedding(config)
        self.stack = Level(config.h_layers + config.l_layers, config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = (
            RotaryTable(config.total_positions, config.head_dim, config.rope_theta)
            if config.pos_encodings == "rope"
            else None
        )

    def initialise(self, seed: int) -> None:
        """Draw the starting weights by the same rule as ACTv1."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            draw_parameter_(name, parameter, generator)

    def rotation(self, start: int, stop: int) -> Rotation | None:
        return None if self.rotary is None else self.rotary.at(start, stop)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, S, D] -> hidden states [B, S, D]."""
        hidden: Tensor = self.stack(x, None, context)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Token scores [B, S, V]."""
        return linear(hidden, self.lm_head.weight)
