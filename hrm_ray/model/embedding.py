"""The input embedding: token vectors, puzzle prefix, learned positions and their scale (ACTV1_SPEC, sections 3, 10).

The optimizer of the puzzle table is in train/optimizers.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_ray.model.config import ModelConfig

FORWARD_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The activations' type by its name in a configuration."""


@dataclass(frozen=True)
class TakenRows:
    """Rows of a puzzle table looked up in one pass: identifiers [B], the leaf tensor [B, E] that receives gradient, and
    which rows [B] are active (None: all)."""

    identifiers: Tensor
    leaf: Tensor
    active: Tensor | None

    def used(self) -> tuple[Tensor, Tensor] | None:
        """(identifiers [K], gradients [K, E]) of the active rows; None before the backward pass."""
        gradient = self.leaf.grad
        if gradient is None or self.active is None:
            return None if gradient is None else (self.identifiers, gradient)
        # An inactive row's identifier must not decay, since no puzzle used it.
        return self.identifiers[self.active], gradient[self.active]


class PuzzleTable(nn.Module):
    """One vector per puzzle identifier; a buffer, not a parameter, with a sparse optimizer of its own.

    `taken` collects the rows that passes since the last weight update used; the sparse optimizer empties it. With
    `trained` False the table is a constant.
    """

    def __init__(self, identifiers: int, ndim: int) -> None:
        super().__init__()
        self.weights: Tensor
        self.register_buffer("weights", torch.zeros(identifiers, ndim))
        self.taken: list[TakenRows] = []
        self.trained = True

    def forward(self, identifiers: Tensor, active: Tensor | None) -> Tensor:
        """identifiers [B] -> rows [B, E], in a training pass with gradient a new leaf tensor. `active` [B]: see
        TakenRows."""
        rows = self.weights[identifiers.long()]
        if self.trained and self.training and torch.is_grad_enabled():
            self.taken.append(TakenRows(identifiers, rows.requires_grad_(), active))
        return rows


class InputEmbedding(nn.Module):
    """Embeds tokens (and a puzzle identifier) as the injection x [B, P+S, D] of every L update."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_pos = (
            nn.Embedding(config.total_positions, config.hidden_size) if config.pos_encodings == "learned" else None
        )
        self.puzzle_emb = (
            PuzzleTable(config.num_puzzle_identifiers, config.puzzle_emb_ndim) if config.puzzle_emb_ndim else None
        )
        self.dtype = FORWARD_TYPES[config.forward_dtype]

    def forward(
        self, inputs: Tensor, identifiers: Tensor | None, positions: Tensor | None, active: Tensor | None = None
    ) -> Tensor:
        """inputs [B, S] -> x [B, P+S, D].

        A puzzle table needs `identifiers` [B], and in training `active` [B], the rows that are not padding.
        `positions` [B or 1, P+S] are those of learned position vectors; None counts from 0.
        """
        config = self.config
        x = F.embedding(inputs, self.embed_tokens.weight.to(self.dtype))
        if self.puzzle_emb is not None:
            if identifiers is None:
                raise ValueError("a model with a puzzle table needs puzzle identifiers")
            row = self.puzzle_emb(identifiers, active).to(self.dtype)
            pad = config.prefix_positions * config.hidden_size - config.puzzle_emb_ndim
            prefix = F.pad(row, (0, pad)).view(-1, config.prefix_positions, config.hidden_size)
            x = torch.cat((prefix, x), dim=1)
        if self.embed_pos is not None:
            table = self.embed_pos.weight.to(self.dtype)
            vectors = table[: x.shape[1]] if positions is None else F.embedding(positions, table)
            x = 0.707106781 * (x + vectors)
        return math.sqrt(config.hidden_size) * x
