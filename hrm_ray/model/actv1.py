"""The ACTv1 network: two levels and their cycles, one segment at a time (ACTV1_SPEC, sections 3 to 5).

Halting, losses and carries belong to the objectives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hrm_ray.model.config import ModelConfig
from hrm_ray.model.embedding import InputEmbedding
from hrm_ray.model.initialise import draw_parameter_, truncated_normal_
from hrm_ray.model.layers import Context, Level, RotaryTable, Rotation, linear


@dataclass(frozen=True)
class States:
    """The two hidden states z_H and z_L, each [B, T, D]."""

    z_h: Tensor
    z_l: Tensor

    def detach(self) -> States:
        return States(self.z_h.detach(), self.z_l.detach())

    def map(self, change: Callable[[Tensor], Tensor]) -> States:
        return States(change(self.z_h), change(self.z_l))


class ActV1(nn.Module):
    """The inner network of HRM (ACTv1), for puzzles (full attention) and text (causal or prefix attention).

    Source: sapientinc/HRM, `HierarchicalReasoningModel_ACTV1_Inner`; here with separate projections.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = InputEmbedding(config)
        self.H_level = Level(config.h_layers, config)
        self.L_level = Level(config.l_layers, config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.q_head = nn.Linear(config.hidden_size, 2, bias=True)
        self.rotary = (
            RotaryTable(config.total_positions, config.head_dim, config.rope_theta)
            if config.pos_encodings == "rope"
            else None
        )
        self.H_init: Tensor
        self.L_init: Tensor
        self.register_buffer("H_init", torch.zeros(config.hidden_size, dtype=self.embedding.dtype))
        self.register_buffer("L_init", torch.zeros(config.hidden_size, dtype=self.embedding.dtype))

    def initialise(self, seed: int) -> None:
        """Draw the starting weights of ACTV1_SPEC section 2; the same seed gives the same weights."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name == "q_head.bias":
                nn.init.constant_(parameter, -5.0)
            elif name == "q_head.weight":
                nn.init.zeros_(parameter)
            else:
                draw_parameter_(name, parameter, generator)
        for start in (self.H_init, self.L_init):
            wide = torch.empty(start.shape)
            start.copy_(truncated_normal_(wide, 1.0, generator))

    def initial_states(self, batch_size: int, length: int) -> States:
        """Both levels' starting states at every position, each [B, length, D]."""
        shape = (batch_size, length, self.config.hidden_size)
        return States(self.H_init.expand(shape), self.L_init.expand(shape))

    def rotation(self, start: int, stop: int) -> Rotation | None:
        return None if self.rotary is None else self.rotary.at(start, stop)

    def segment(self, states: States, x: Tensor, context: Context) -> States:
        """One segment: h_cycles times (l_cycles L updates, then one H update). All [B, T, D].

        The last `bp_steps` updates, in time order, carry gradient; earlier ones run without a graph. The result is part
        of the graph: detach it before it becomes a carry.
        """
        first = self.config.updates_per_segment - self.config.bp_steps
        with torch.no_grad():
            states = self.updates(states, x, context, 0, first)
        return self.updates(states, x, context, first, self.config.updates_per_segment)

    def updates(self, states: States, x: Tensor, context: Context, first: int, stop: int) -> States:
        """Run the updates `first` to `stop` (exclusive) of a segment, in time order, in the current gradient mode."""
        z_h, z_l = states.z_h, states.z_l
        if torch.is_grad_enabled() and torch.is_autocast_enabled(x.device.type):
            # Autocast caches the weights' casts; those made without a graph would cut off the weights' gradients.
            torch.clear_autocast_cache()
        for number in range(first, stop):
            if self.is_l_update(number):
                z_l = self.L_level(z_l, z_h + x, context.at(number))
            else:
                z_h = self.H_level(z_h, z_l, context.at(number))
        if torch.is_grad_enabled() and stop == self.config.updates_per_segment and self.config.bp_steps == 1:
            z_h = z_h + self._zero_of_l_level(x)
        return States(z_h, z_l)

    def is_l_update(self, number: int) -> bool:
        """Whether update `number` of a segment is one of L; every `l_cycles` L updates are followed by one H update."""
        return number % (self.config.l_cycles + 1) < self.config.l_cycles

    def _zero_of_l_level(self, x: Tensor) -> Tensor:
        """A zero that depends on `x` and the L level, which get no other gradient if the last update alone (H) carries
        gradient: DDP and ZeRO would wait for it."""
        trained = (p.sum(dtype=torch.float32) for p in self.L_level.parameters() if p.requires_grad)
        return 0.0 * torch.stack([x.sum(dtype=torch.float32), *trained]).sum()

    def logits(self, z_h: Tensor) -> Tensor:
        """Token scores [B, S, V] at the token positions of `z_h` [B, P+S, D]."""
        return linear(z_h[:, self.config.prefix_positions :], self.lm_head.weight)

    def halting_scores(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """(q_halt, q_continue) in float32 from states [..., D]."""
        q = nn.functional.linear(state, self.q_head.weight.to(state.dtype), self.q_head.bias.to(state.dtype)).float()
        return q[..., 0], q[..., 1]
