"""ACTV1_SPEC sections 3 to 5 and 13 once more, in float64, one row at a time, with nothing taken from the model.

One job: the yardstick for the model's outputs and gradients. Slow and plain on purpose: attention is a table of
allowed pairs, rotation is a complex product, and what carries no gradient is detached by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.transformer import Transformer
from tests.support.naive_moe import Told, naive_experts, naive_feed_forward


def causal_table(length: int) -> Tensor:
    return torch.tensor([[key <= query for key in range(length)] for query in range(length)])


def full_table(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool)


def text_table(documents: Sequence[int], prompt: Sequence[bool]) -> Tensor:
    """Who sees whom in a packed row, by two loops."""
    length = len(documents)
    return torch.tensor(
        [
            [documents[q] == documents[k] and (k <= q or (prompt[q] and prompt[k])) for k in range(length)]
            for q in range(length)
        ]
    )


@dataclass
class NaiveState:
    z_h: Tensor
    z_l: Tensor


class NaiveModel:
    """Works on single rows [T, D]; `weights` are float64 leaves by the model's own names.

    With experts, `told` is what the routers of the last segment's updates with gradient did, `counted` how many
    positions of the row count, and `training` whether the capacity acts.
    """

    training = True
    counted: int | None = None

    def __init__(self, model: ActV1 | Transformer) -> None:
        self.config = model.config
        self.weights = {
            name: tensor.detach().double().clone().requires_grad_() for name, tensor in model.state_dict().items()
        }

    def embed(self, tokens: Tensor, positions: Tensor | None = None, identifier: int | None = None) -> Tensor:
        config = self.config
        vectors = [self.weights["embedding.embed_tokens.weight"][int(token)] for token in tokens]
        if config.puzzle_emb_ndim:
            assert identifier is not None
            row = self.weights["embedding.puzzle_emb.weights"][identifier]
            missing = config.prefix_positions * config.hidden_size - config.puzzle_emb_ndim
            row = torch.cat((row, torch.zeros(missing, dtype=torch.float64)))
            vectors = [*row.split(config.hidden_size), *vectors]
        x = torch.stack(vectors)
        if config.pos_encodings == "learned":
            places = range(len(x)) if positions is None else positions.tolist()
            x = 0.707106781 * (x + torch.stack([self.weights["embedding.embed_pos.weight"][p] for p in places]))
        return x * config.hidden_size**0.5

    def start(self, length: int) -> NaiveState:
        if self.config.arch == "transformer":
            return NaiveState(torch.zeros(0), torch.zeros(0))
        return NaiveState(
            torch.stack([self.weights["H_init"].detach()] * length),
            torch.stack([self.weights["L_init"].detach()] * length),
        )

    def segment(self, state: NaiveState, x: Tensor, allowed: Tensor) -> NaiveState:
        """The last `bp_steps` updates keep their graph; every earlier result is cut off."""
        config = self.config
        self.told: list[Told] = []
        if config.arch == "transformer":
            layers = config.h_layers + config.l_layers
            return NaiveState(self._level("stack", layers, x, allowed), torch.zeros(0))
        z_h, z_l = state.z_h.detach(), state.z_l.detach()
        kinds = (["L"] * config.l_cycles + ["H"]) * config.h_cycles
        for number, kind in enumerate(kinds):
            if kind == "L":
                z_l = self._level("L_level", config.l_layers, z_l + z_h + x, allowed)
            else:
                z_h = self._level("H_level", config.h_layers, z_h + z_l, allowed)
            if number < len(kinds) - config.bp_steps:
                z_h, z_l = z_h.detach(), z_l.detach()
                self.told = []
        return NaiveState(z_h, z_l)

    def logits(self, state: NaiveState) -> Tensor:
        return state.z_h[self.config.prefix_positions :] @ self.weights["lm_head.weight"].T

    def q(self, z_h: Tensor) -> Tensor:
        """[..., 2]: halt, continue."""
        return z_h @ self.weights["q_head.weight"].T + self.weights["q_head.bias"]

    def _level(self, name: str, layers: int, x: Tensor, allowed: Tensor) -> Tensor:
        for number in range(layers):
            at = f"{name}.layers.{number}"
            x = self._norm(f"{at}.attn_norm", x + self._attention(f"{at}.self_attn", x, allowed))
            x = self._norm(f"{at}.mlp_norm", x + self._feed_forward(f"{at}.mlp", x))
        return x

    def _feed_forward(self, at: str, x: Tensor) -> Tensor:
        if self.config.num_experts:
            return self._experts(at, x)
        up = x @ self.weights[f"{at}.up_proj.weight"].T
        inner = self._bent(up) if not self.config.swiglu else self._bent(x @ self.weights[f"{at}.gate_proj.weight"].T)
        return (inner * up if self.config.swiglu else inner) @ self.weights[f"{at}.down_proj.weight"].T

    def _experts(self, at: str, x: Tensor) -> Tensor:
        stacks = {
            name: self.weights[f"{at}.experts.{name}.weight"]
            for name in ("gate_proj", "up_proj", "down_proj")
            if name != "gate_proj" or self.config.swiglu
        }
        expert_output = naive_feed_forward(self.config, stacks, self._bent)
        counted = len(x) if self.counted is None else self.counted
        router = self.weights[f"{at}.router.weight"]
        out, told = naive_experts(self.config, router, expert_output, x, training=self.training, counted=counted)
        self.told.append(told)
        return out

    def _bent(self, x: Tensor) -> Tensor:
        if self.config.activation == "silu":
            return x / (1 + torch.exp(-x))
        return x * (x > 0) if self.config.activation == "relu" else x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def _norm(self, at: str, x: Tensor) -> Tensor:
        if self.config.rmsnorm:
            return x / ((x**2).mean(-1, keepdim=True) + self.config.rms_norm_eps) ** 0.5
        x = x - x.mean(-1, keepdim=True)
        x = x / ((x**2).mean(-1, keepdim=True) + self.config.rms_norm_eps) ** 0.5
        return x * self.weights[f"{at}.weight"] + self.weights[f"{at}.bias"]

    def _attention(self, at: str, x: Tensor, allowed: Tensor) -> Tensor:
        width = self.config.head_dim
        q, k, v = (x @ self.weights[f"{at}.{part}_proj.weight"].T for part in "qkv")
        heads = []
        for head in range(self.config.num_heads):
            own = slice(head * width, (head + 1) * width)
            qs, ks = q[:, own], k[:, own]
            if self.config.pos_encodings == "rope":
                qs, ks = self._turned(qs), self._turned(ks)
            scores = (qs @ ks.T / math.sqrt(width)).masked_fill(~allowed, -math.inf)
            heads.append(scores.softmax(-1) @ v[:, own])
        return torch.cat(heads, dim=-1) @ self.weights[f"{at}.o_proj.weight"].T

    def _turned(self, x: Tensor) -> Tensor:
        """Rotation of the pairs (x_j, x_{j+d/2}) as a product of complex numbers."""
        half = self.config.head_dim // 2
        speeds = torch.tensor([self.config.rope_theta ** (-2 * j / self.config.head_dim) for j in range(half)])
        angles = torch.arange(len(x)).double().unsqueeze(1) * speeds.double()
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * angles)
        return torch.cat((turned.real, turned.imag), dim=-1)


class NaiveByToken(NaiveModel):
    """One token at a time: `memory[segment][attention]` is a list of (input of the attention) of the tokens before.

    Keys and values follow from that input and the token's place; so a halted token's copy is the copied input.
    `margin` is how near to the threshold a halting score has come.
    """

    def __init__(self, model: ActV1) -> None:
        super().__init__(model)
        self.memory: list[list[list[Tensor]]] = [[] for _ in range(self.config.halt_max_steps)]
        self.margin = math.inf

    def read(self, token: int, place: int) -> tuple[Tensor, int]:
        x = self.embed(torch.tensor([token]), torch.tensor([place]))
        state, answer, halted_at = self.start(1), torch.zeros(0), 0
        for segment in range(self.config.halt_max_steps):
            self.segment_memory = self.memory[segment]
            self.attention_number = 0
            if halted_at:
                for number, inputs in enumerate(self.segment_memory or [[] for _ in self.memory[segment - 1]]):
                    if number >= len(self.segment_memory):
                        self.segment_memory.append(inputs)
                    self.segment_memory[number].append(self.memory[segment - 1][number][-1])
                continue
            state = self.segment(state, x, causal_table(1))
            score, last = float(self.q(state.z_h[0])[0]), segment == self.config.halt_max_steps - 1
            self.margin = self.margin if last else min(self.margin, abs(score))
            if score > 0 or last:
                answer, halted_at = self.logits(state)[0], segment + 1
        return answer, halted_at

    def _attention(self, at: str, x: Tensor, allowed: Tensor) -> Tensor:
        if self.attention_number == len(self.segment_memory):
            self.segment_memory.append([])
        inputs = self.segment_memory[self.attention_number]
        inputs.append(x[0])
        self.attention_number += 1
        return super()._attention(at, torch.stack(inputs), causal_table(len(inputs)))[-1:]


def cross_entropies(logits: Tensor, labels: Sequence[int], kind: str) -> list[Tensor | None]:
    """Per position, None where there is no label."""
    losses: list[Tensor | None] = []
    for scores, label in zip(logits, labels, strict=True):
        if label < 0:
            losses.append(None)
            continue
        if kind == "softmax":
            losses.append(torch.logsumexp(scores, 0) - scores[label])
        else:
            s = torch.stack([x + 1 if x >= 0 else 1 / (1 - x + 1e-30) for x in scores])
            losses.append(-torch.log(s[label] / s.sum()))
    return losses
