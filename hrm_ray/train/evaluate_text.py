"""Held-out metrics of text: loss, perplexity, bits per byte, accuracy, and the loss and segments with adaptive halting.

Long rows are read a chunk at a time, so that activations and scores of a whole row never exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.adaptive import adaptive_segments
from hrm_ray.model.chunk_buffer import ChunkBuffer, CopyStream
from hrm_ray.model.chunked import ChunkedTextObjective, ChunkedTransformerObjective
from hrm_ray.model.chunked_rows import ChunkedRows, final_states
from hrm_ray.model.objective import Batch
from hrm_ray.model.scoring import Scored, score_tokens
from hrm_ray.model.text_objective import OnePassOnText, RolloutOnText
from hrm_ray.model.transformer import Transformer
from hrm_ray.types import IGNORE_LABEL

POSITIONS_AT_ONCE = 2048
"""Chunk size of longer rows, where the training objective has none."""

Sums = dict[str, Tensor]
TextObjectives: TypeAlias = RolloutOnText[Any] | OnePassOnText[Any]


def text_sums(text: TextObjectives, batch: Batch) -> Sums:
    """Sums over the valid tokens of a batch at the last segment, and of adaptive reading if the head was trained."""
    rows, stream = _rows(text, batch)
    hidden = final_states(text.model, rows, stream)
    scored = [_scored(text, rows, hidden, chunk) for chunk in range(len(rows))]
    sums = {
        "loss": torch.stack([each.loss.sum() for each in scored]).sum(),
        "hits": torch.stack([each.hit.sum() for each in scored]).sum(),
        "tokens": (batch["labels"] != IGNORE_LABEL).sum(),
        "bytes": batch["label_bytes"].sum(),
    }
    if _has_halting_head(text.model):
        sums |= _adaptive_sums(text, text.model, rows, stream)
    return sums


def text_names(text: TextObjectives) -> list[str]:
    """Names of what `text_sums` gives."""
    return ["loss", "hits", "tokens", "bytes"] + (
        ["adaptive_loss", "segments"] if _has_halting_head(text.model) else []
    )


def _rows(text: TextObjectives, batch: Batch) -> tuple[ChunkedRows, CopyStream | None]:
    """The rows in chunks, and the stream to host memory if states are kept there."""
    if isinstance(text, ChunkedTextObjective | ChunkedTransformerObjective):
        return text.chunking.rows(text.model, batch), text.chunking.stream(batch)
    # A prompt sees itself fully, so rows that have one are read whole.
    size = batch["inputs"].shape[1] if "prompt" in batch else POSITIONS_AT_ONCE
    return ChunkedRows(text.model, batch, size), None


def _has_halting_head(model: ActV1 | Transformer) -> TypeGuard[ActV1]:
    """Whether the model has a trained halting head."""
    return model.config.halt_rule == "gain" and model.config.halt_max_steps > 1


def _adaptive_sums(text: TextObjectives, model: ActV1, rows: ChunkedRows, stream: CopyStream | None) -> Sums:
    loss, segments = torch.zeros(()), torch.zeros(())
    for reading in adaptive_segments(model, rows, stream):
        for chunk, part in enumerate(rows.parts):
            now = reading.reads[:, part] & (rows.column("labels", chunk) != IGNORE_LABEL)
            scored = _scored(text, rows, reading.states.z_h, chunk)
            loss = loss + torch.where(now, scored.loss, 0.0).sum().cpu()
            segments = segments + reading.segment * now.sum().cpu()
    return {"adaptive_loss": loss, "segments": segments}


def _scored(text: TextObjectives, rows: ChunkedRows, hidden: ChunkBuffer, chunk: int) -> Scored:
    return score_tokens(hidden.get(chunk), text.model.lm_head.weight, rows.column("labels", chunk), text.loss_kind)


def text_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Nats per token, perplexity, bits per UTF-8 byte of the predicted text, token accuracy; halting's if it is on."""
    tokens = sums["tokens"]
    loss = sums["loss"] / tokens
    figures = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": sums["hits"] / tokens,
        "tokens": tokens,
    }
    if sums["bytes"] > 0:
        figures["bits_per_byte"] = sums["loss"] / math.log(2) / sums["bytes"]
    if "adaptive_loss" in sums:
        figures |= {"adaptive_loss": sums["adaptive_loss"] / tokens, "mean_segments": sums["segments"] / tokens}
    return figures
