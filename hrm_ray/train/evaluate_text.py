"""Held-out figures of text: loss, perplexity, bits per byte, accuracy, and what halting would cost and save.

One job: the sums over one batch, and the figures of the sums of all. Long rows are read a chunk at a time, so that
neither activations nor scores of a whole row are held. Which batches are read is decided in evaluate.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hrm_ray.model.adaptive import adaptive_segments
from hrm_ray.model.chunk_buffer import ChunkBuffer, CopyStream
from hrm_ray.model.chunked import ChunkedTextObjective, ChunkedTransformerObjective
from hrm_ray.model.chunked_rows import BufferedStates, ChunkedRows, run_level, run_without_grad
from hrm_ray.model.objective import Batch
from hrm_ray.model.scoring import Scored, score_tokens
from hrm_ray.model.text_objective import OnePassOnText, RolloutOnText
from hrm_ray.types import IGNORE_LABEL

POSITIONS_AT_ONCE = 2048
"""Longer rows are cut into chunks of so many positions, where training does not say how."""

Sums = dict[str, Tensor]


def rollout_sums(text: RolloutOnText[Any], batch: Batch) -> Sums:
    """Sums over the valid tokens of a batch at the last segment, and read adaptively where the head was trained."""
    rows, stream = _rows(text, batch)
    states = BufferedStates.initial(rows, text.model).copy(stream)
    for _ in range(text.segments_per_step):
        run_without_grad(text.model, rows, states, range(text.model.config.updates_per_segment))
    sums = _token_sums(text, rows, states.z_h)
    if _reads_adaptively(text):
        sums |= _adaptive_sums(text, rows, stream)
    return sums


def _rows(text: RolloutOnText[Any] | OnePassOnText[Any], batch: Batch) -> tuple[ChunkedRows, CopyStream | None]:
    """The rows in chunks, and the stream to host memory if states are kept there."""
    if isinstance(text, ChunkedTextObjective | ChunkedTransformerObjective):
        return text.chunking.rows(text.model, batch), text.chunking.stream(batch)
    # A prompt sees itself fully, so rows that have one are read whole.
    size = batch["inputs"].shape[1] if "prompt" in batch else POSITIONS_AT_ONCE
    return ChunkedRows(text.model, batch, size), None


def _reads_adaptively(text: RolloutOnText[Any]) -> bool:
    return text.model.config.halt_rule == "gain" and text.segments_per_step > 1


def _adaptive_sums(text: RolloutOnText[Any], rows: ChunkedRows, stream: CopyStream | None) -> Sums:
    loss, segments = torch.zeros(()), torch.zeros(())
    for reading in adaptive_segments(text.model, rows, stream):
        for chunk, part in enumerate(rows.parts):
            now = reading.reads[:, part] & (rows.column("labels", chunk) != IGNORE_LABEL)
            scored = _scored(text, rows, reading.states.z_h, chunk)
            loss = loss + torch.where(now, scored.loss, 0.0).sum().cpu()
            segments = segments + reading.segment * now.sum().cpu()
    return {"adaptive_loss": loss, "segments": segments}


def one_pass_sums(text: OnePassOnText[Any], batch: Batch) -> Sums:
    """Sums over the valid tokens of a batch."""
    rows, stream = _rows(text, batch)
    hidden = ChunkBuffer(rows.parts, stream)
    run_level(text.model.stack, rows, rows.injection, hidden, 0, rows.routings())
    return _token_sums(text, rows, hidden)


def _token_sums(text: RolloutOnText[Any] | OnePassOnText[Any], rows: ChunkedRows, hidden: ChunkBuffer) -> Sums:
    scored = [_scored(text, rows, hidden, chunk) for chunk in range(len(rows))]
    return {
        "loss": torch.stack([each.loss.sum() for each in scored]).sum(),
        "hits": torch.stack([each.hit.sum() for each in scored]).sum(),
        "tokens": (rows.batch["labels"] != IGNORE_LABEL).sum(),
        "bytes": rows.batch["label_bytes"].sum(),
    }


def _scored(
    text: RolloutOnText[Any] | OnePassOnText[Any], rows: ChunkedRows, hidden: ChunkBuffer, chunk: int
) -> Scored:
    return score_tokens(hidden.get(chunk), text.model.lm_head.weight, rows.column("labels", chunk), text.loss_kind)


def rollout_names(text: RolloutOnText[Any]) -> list[str]:
    """Names of what `rollout_sums` gives."""
    return one_pass_names(text) + (["adaptive_loss", "segments"] if _reads_adaptively(text) else [])


def one_pass_names(text: RolloutOnText[Any] | OnePassOnText[Any]) -> list[str]:
    """Names of what `one_pass_sums` gives."""
    return ["loss", "hits", "tokens", "bytes"]


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
