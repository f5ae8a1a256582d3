"""Which position may see which, for text and puzzles.

One job: build the attention scope of a batch. Text is causal in every attention of every cycle and segment, so that a
state at position t depends on positions up to t alone (ACTV1_SPEC, section 13); there is no way to ask for full
attention on text.
"""

from __future__ import annotations

from torch import Tensor

from hrm_ray.model.attention import AttentionScope

FULL = AttentionScope()
CAUSAL = AttentionScope(causal=True)


def text_scope(documents: Tensor | None, prompt: Tensor | None, window: int | None = None) -> AttentionScope:
    """The scope of packed text rows, for one pass.

    `documents` [B, S] numbers the documents of a row (None: one document a row); attention stays inside a document.
    `prompt` [B, S] is True inside a prompt (None: plain causal); prompts of one document see each other fully.
    `window` (None: no end) is how many positions back, itself included, a position sees.
    """
    return AttentionScope(causal=True, documents=documents, prompt=prompt, window=window)
