"""Log-likelihood of given text under a language model."""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.chunked_rows import ChunkedRows, final_states
from hrm_ray.model.scoring import score_tokens
from hrm_ray.model.transformer import Transformer

POSITIONS_AT_ONCE = 2048
"""Longer texts are computed in chunks of so many positions, so that memory for activations does not grow with them."""


@torch.no_grad()
def token_log_probabilities(model: ActV1 | Transformer, tokens: list[int]) -> Tensor:
    """The log-probability (natural, float32 [T - 1]) of each of `tokens` [T] after the first, given those before it.

    ACTv1 runs all its segments. Attention is causal throughout; no prompt gets full attention. The model must be in
    evaluation mode.
    """
    if not 2 <= len(tokens) <= model.config.seq_len + 1:
        raise ValueError(f"{len(tokens)} tokens; the model scores 2 to {model.config.seq_len + 1}")
    ids = torch.tensor([tokens], device=model.lm_head.weight.device)
    rows = ChunkedRows(model, {"inputs": ids[:, :-1], "labels": ids[:, 1:]}, POSITIONS_AT_ONCE)
    states = final_states(model, rows)
    losses = [
        score_tokens(states.get(chunk), model.lm_head.weight, rows.column("labels", chunk), "softmax").loss[0]
        for chunk in range(len(rows))
    ]
    return -torch.cat(losses).float()
