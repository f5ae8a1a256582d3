"""What enters the network: token vectors, puzzle prefix, learned positions, the common scale.

One job: ACTV1_SPEC section 3 and the training look-up of section 10. The sparse update of the puzzle table lives
with the optimizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_ray.model.config import ModelConfig

FORWARD_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types of the activations by the name that a configuration has for them."""


@dataclass(frozen=True)
class TakenRows:
    """Rows looked up in a puzzle table for one backward pass: identifiers [B], the leaf [B, E] that gets gradient, and
    which rows [B] are active (None: all)."""

    identifiers: Tensor
    leaf: Tensor
    active: Tensor | None

    def used(self) -> tuple[Tensor, Tensor] | None:
        """(identifiers [K], gradients [K, E]) of the active rows; None where no backward pass has come by.

        An idle slot's identifier is left out: it would decay although no puzzle used it.
        """
        gradient = self.leaf.grad
        if gradient is None or self.active is None:
            return None if gradient is None else (self.identifiers, gradient)
        return self.identifiers[self.active], gradient[self.active]


class PuzzleTable(nn.Module):
    """One vector per puzzle identifier, trained by its own sparse rule; a buffer, not a parameter.

    `taken` collects what the backward passes since the last weight update used; the sparse optimizer empties it. With
    `trained` False the table is a constant.
    """

    def __init__(self, identifiers: int, ndim: int) -> None:
        super().__init__()
        self.weights: Tensor
        self.register_buffer("weights", torch.zeros(identifiers, ndim))
        self.taken: list[TakenRows] = []
        self.trained = True

    def forward(self, identifiers: Tensor, active: Tensor | None) -> Tensor:
        """identifiers [B] -> rows [B, E], which in a training pass with gradient are a fresh leaf.

        `active` [B] says which of them are in work (None: all).
        """
        rows = self.weights[identifiers.long()]
        if self.trained and self.training and torch.is_grad_enabled():
            self.taken.append(TakenRows(identifiers, rows.requires_grad_(), active))
        return rows


class InputEmbedding(nn.Module):
    """Tokens (and a puzzle identifier) to the injection x [B, P+S, D] that every L update receives."""

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

        `identifiers` [B] is needed with a puzzle table, and in training `active` [B], the rows that are no padding.
        `positions` [B or 1, P+S] chooses learned positions; None counts from 0.
        """
        config = self.config
        x = F.embedding(inputs, self.embed_tokens.weight.to(self.dtype))
        if self.puzzle_emb is not None:
            assert identifiers is not None
            row = self.puzzle_emb(identifiers, active).to(self.dtype)
            pad = config.prefix_positions * config.hidden_size - config.puzzle_emb_ndim
            prefix = F.pad(row, (0, pad)).view(-1, config.prefix_positions, config.hidden_size)
            x = torch.cat((prefix, x), dim=1)
        if self.embed_pos is not None:
            table = self.embed_pos.weight.to(self.dtype)
            places = table[: x.shape[1]] if positions is None else F.embedding(positions, table)
            x = 0.707106781 * (x + places)
        return math.sqrt(config.hidden_size) * x
