"""Small models and batches of random tokens, for tests of the model's mathematics.

One job: make them. What is held against them is in the tests; the naive reference is in naive_model.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrm_ray.model import text_objective
from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.build import build_model
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.dropout import COLUMN, row_keys
from hrm_ray.model.objective import AnyObjective, Batch
from hrm_ray.model.scoring import Scored
from hrm_ray.model.transformer import Transformer
from hrm_ray.types import IGNORE_LABEL

VOCAB = 19


def tiny_config(**changes: Any) -> ModelConfig:
    """A text model of width 16 with two cycles of each kind and two segments, unless `changes` say otherwise."""
    base: dict[str, Any] = {
        "task": "lm",
        "vocab_size": VOCAB,
        "seq_len": 12,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "h_layers": 1,
        "l_layers": 1,
        "h_cycles": 2,
        "l_cycles": 2,
        "halt_max_steps": 2,
    }
    return ModelConfig(**(base | changes))


def tiny_model(config: ModelConfig, seed: int = 0) -> ActV1 | Transformer:
    """Weights drawn from `seed`; the halting head too, so that about half of the tokens halt at each segment."""
    torch.set_num_threads(1)
    model = build_model(config)
    model.initialise(seed)
    if isinstance(model, ActV1):
        generator = torch.Generator().manual_seed(seed + 1000)
        with torch.no_grad():
            model.q_head.weight.copy_(torch.randn(2, config.hidden_size, generator=generator))
            model.q_head.bias.copy_(torch.randn(2, generator=generator) * 0.3)
            if model.embedding.puzzle_emb is not None:
                table = model.embedding.puzzle_emb.weights
                table.copy_(torch.randn(table.shape, generator=generator) * 0.3)
    return model


def tiny_actv1(config: ModelConfig, seed: int = 0) -> ActV1:
    model = tiny_model(config, seed)
    assert isinstance(model, ActV1)
    return model


def between(scores: Tensor) -> float:
    """A threshold in the widest gap of the middle half of `scores`, so that no score is on it."""
    ordered = scores.detach().double().flatten().sort().values
    middle = ordered[len(ordered) // 4 : -(len(ordered) // 4)]
    widest = int(middle.diff().argmax())
    return float(middle[widest : widest + 2].mean())


def text_batch(seed: int, rows: Sequence[Sequence[int]], *, prompts: Sequence[int] | None = None) -> Batch:
    """Packed rows: `rows[r]` are the lengths of row r's documents. `prompts[r]` positions of its first document are a
    prompt, and labels before its last prompt position are ignored. Labels follow the memo of types.Columns."""
    rng = np.random.default_rng(seed)
    batch, length = len(rows), sum(rows[0])
    inputs = rng.integers(0, VOCAB, (batch, length))
    documents, positions = np.zeros((batch, length), int), np.zeros((batch, length), int)
    labels = np.full((batch, length), IGNORE_LABEL)
    prompt = np.zeros((batch, length), bool)
    for row, lengths in enumerate(rows):
        start = 0
        for number, size in enumerate(lengths):
            stop = start + size
            documents[row, start:stop], positions[row, start:stop] = number, np.arange(size)
            labels[row, start : stop - 1] = inputs[row, start + 1 : stop]
            start = stop
        if prompts is not None:
            prompt[row, : prompts[row]] = True
            labels[row, : max(prompts[row] - 1, 0)] = IGNORE_LABEL
    plain = {"inputs": inputs, "labels": labels, "documents": documents, "positions": positions}
    made: Batch = {name: torch.from_numpy(values.astype(np.int32)) for name, values in plain.items()}
    if prompts is not None:
        made["prompt"] = torch.from_numpy(prompt)
    return made | {"active": torch.ones(batch, dtype=torch.bool), "label_bytes": (made["labels"] >= 0).int() * 3}


def puzzle_batch(seed: int, rows: int, config: ModelConfig) -> Batch:
    """Random puzzles, some cells without a label, no exploration."""
    rng = np.random.default_rng(seed)
    inputs, labels = rng.integers(0, config.vocab_size, (2, rows, config.seq_len))
    labels[rng.random(labels.shape) < 0.2] = IGNORE_LABEL
    labels[:, 0] = 1
    return {
        "inputs": torch.from_numpy(inputs.astype(np.int32)),
        "labels": torch.from_numpy(labels.astype(np.int32)),
        "puzzle_identifiers": torch.from_numpy(rng.integers(0, config.num_puzzle_identifiers, rows).astype(np.int32)),
        "active": torch.ones(rows, dtype=torch.bool),
        "min_steps": torch.zeros(rows, dtype=torch.int32),
    }


def drawing(batch: Batch, seed: int = 0) -> Batch:
    """The batch with what its rows draw from in training."""
    return batch | {COLUMN: row_keys(seed, 1, 0, torch.arange(len(batch["active"])))}


@contextmanager
def recorded_logits(model: ActV1 | Transformer) -> Iterator[list[Tensor]]:
    """The logits of every state that is scored inside the context, so that an objective's pass can be looked into."""
    seen: list[Tensor] = []
    logits, score = model.logits, text_objective.score_tokens

    def listening(hidden: Tensor) -> Tensor:
        seen.append(logits(hidden))
        return seen[-1]

    def scoring(hidden: Tensor, *others: Any) -> Scored:
        seen.append(logits(hidden))
        return score(hidden, *others)

    model.logits = listening  # type: ignore[method-assign]
    text_objective.score_tokens = scoring
    try:
        yield seen
    finally:
        del model.logits
        text_objective.score_tokens = score


def logits_of_segments(objective: AnyObjective, batch: Batch) -> list[Tensor]:
    """Logits after every segment of the training forward pass."""
    with recorded_logits(objective.model) as seen, torch.no_grad():
        carry = objective.initial_carry(batch)
        for _ in range(objective.segments_per_step):
            carry = objective(batch, carry).carry
    assert len(seen) == objective.segments_per_step
    return seen


def backward_all(objective: AnyObjective, batch: Batch) -> float:
    """The loop's gradient of one batch: every segment's share of the loss, each with its own backward; the loss."""
    from hrm_ray.train.loop import weighted_loss

    objective.zero_grad(set_to_none=True)
    carry = objective.initial_carry(batch)
    totals = {name: float(weight) for name, weight in objective.weights(batch, carry).items()}
    total = 0.0
    for _ in range(objective.segments_per_step):
        output = objective(batch, carry)
        loss = weighted_loss(output, totals)
        loss.backward()
        total += float(loss.detach())
        carry = output.carry
    return total
