"""Which position may see which, for text and puzzles.

One job: build the attention scope of a batch. Text is causal in every attention of every cycle and segment, so that a
state at position t depends on positions up to t alone (ACTV1_SPEC, section 13); there is no way to ask for full
attention on text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_ray.model.layers import AttentionScope

FULL = AttentionScope()
CAUSAL = AttentionScope(causal=True)


def text_scope(length: int, documents: Tensor | None, prompt: Tensor | None) -> AttentionScope:
    """The scope of packed text rows.

    `documents` [B, S] numbers the documents of a row (None: one document a row); attention stays inside a document.
    `prompt` [B, S] is True inside a prompt (None: plain causal); prompts of one document see each other fully.
    """
    if documents is None and prompt is None:
        return CAUSAL
    given = documents if documents is not None else prompt
    assert given is not None
    mask = torch.ones(length, length, dtype=torch.bool, device=given.device).tril().unsqueeze(0)
    if prompt is not None:
        mask = mask | (prompt.unsqueeze(2) & prompt.unsqueeze(1))
    if documents is not None:
        mask = mask & (documents.unsqueeze(2) == documents.unsqueeze(1))
    return AttentionScope(mask=mask.unsqueeze(1))
