"""No output position of a text model sees its own label, a later token, or another document.

Equality is to the bit: what a position may not see has attention weight exactly 0 and must leave no trace.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrm_ray.data.bpe import train_bpe
from hrm_ray.data.packing import RowForm, TextSamples
from hrm_ray.data.rows import Document
from hrm_ray.data.text_store import tokenise
from hrm_ray.model.build import build_objective
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.objective import AnyObjective, Batch
from hrm_ray.train.microbatch import to_batch, wanted_columns
from hrm_ray.types import IGNORE_LABEL
from tests.support.tiny_models import VOCAB, logits_of_segments, text_batch, tiny_config, tiny_model

POSITIONS = ("rope", "learned", "none")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "two cycles": {"h_cycles": 2, "l_cycles": 2, "halt_max_steps": 3},
    "one cycle, two layers": {"h_cycles": 1, "l_cycles": 1, "h_layers": 2, "l_layers": 2},
    "full backward": {"h_cycles": 1, "l_cycles": 3, "bp_steps": 4},
    "bfloat16": {"forward_dtype": "bfloat16"},
    "window": {"window_size": 3},
    "transformer": {"arch": "transformer", "halt_max_steps": 1, "halt_rule": "none", "h_layers": 2, "l_layers": 1},
}


def objective_of(config: ModelConfig) -> AnyObjective:
    model = tiny_model(config)
    return build_objective(model, "softmax", supervision="rollout", halt_margin=0.01).train()


def wanted(batch: Batch, config: ModelConfig) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name in wanted_columns(config)}


def other_token(token: Tensor, seed: int) -> Tensor:
    return (token + 1 + seed % (VOCAB - 1)) % VOCAB


def assert_same_where(before: list[Tensor], after: list[Tensor], unseen: Tensor, seen: tuple[int, int] | None) -> None:
    """Bit-equal logits after every segment where `unseen` [B, S]; as a control, other ones at the place `seen`."""
    for segment, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(old[unseen], new[unseen]), f"segment {segment + 1}"
        if seen is not None:
            assert not torch.equal(old[seen], new[seen]), f"segment {segment + 1}: the change itself had no effect"


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=6)
@given(at=st.integers(0, 11), seed=st.integers(0, 1000))
def test_a_later_token_changes_nothing_before_it(name: str, positions: str, at: int, seed: int) -> None:
    config = tiny_config(pos_encodings=positions, **ARCHITECTURES[name])
    objective = objective_of(config)
    batch = wanted(text_batch(seed, [[12], [12]]), config)
    del batch["documents"]
    changed = batch | {"inputs": batch["inputs"].clone()}
    changed["inputs"][0, at] = other_token(changed["inputs"][0, at], seed)
    unseen = torch.ones(2, 12, dtype=torch.bool)
    unseen[0, at:] = False
    assert_same_where(logits_of_segments(objective, batch), logits_of_segments(objective, changed), unseen, (0, at))


CUTS = st.lists(st.integers(1, 11), min_size=1, max_size=3, unique=True).map(sorted)


def lengths(cuts: list[int]) -> list[int]:
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, 12], strict=True)]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=6)
@given(cuts=CUTS, at=st.integers(0, 11), seed=st.integers(0, 1000))
def test_packed_documents_do_not_see_each_other(name: str, positions: str, cuts: list[int], at: int, seed: int) -> None:
    config = tiny_config(pos_encodings=positions, **ARCHITECTURES[name])
    objective = objective_of(config)
    batch = wanted(text_batch(seed, [lengths(cuts), [5, 7]]), config)
    changed = batch | {"inputs": batch["inputs"].clone()}
    changed["inputs"][0, at] = other_token(changed["inputs"][0, at], seed)
    same = batch["documents"][0] == batch["documents"][0, at]
    unseen = torch.ones(2, 12, dtype=torch.bool)
    unseen[0] = ~(same & (torch.arange(12) >= at))
    assert_same_where(logits_of_segments(objective, batch), logits_of_segments(objective, changed), unseen, (0, at))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["two cycles", "transformer"])
@settings(max_examples=10)
@given(size=st.integers(2, 12), prompt=st.integers(1, 11), at=st.integers(0, 11), seed=st.integers(0, 1000))
def test_prefix_mask(name: str, positions: str, size: int, prompt: int, at: int, seed: int) -> None:
    """A change inside the prompt reaches the whole document, one in the response only what follows it."""
    config = tiny_config(pos_encodings=positions, lm_mask="prefix", **ARCHITECTURES[name])
    objective = objective_of(config)
    prompt, at = min(prompt, size - 1), min(at, size - 1)
    documents = [size, 12 - size] if size < 12 else [12]
    batch = wanted(text_batch(seed, [documents, [12]], prompts=[prompt, 4]), config)
    changed = batch | {"inputs": batch["inputs"].clone()}
    changed["inputs"][0, at] = other_token(changed["inputs"][0, at], seed)
    unseen = torch.ones(2, 12, dtype=torch.bool)
    unseen[0, 0 if at < prompt else at : size] = False
    before, after = logits_of_segments(objective, batch), logits_of_segments(objective, changed)
    assert_same_where(before, after, unseen, (0, at))
    if at < prompt:
        for old, new in zip(before, after, strict=True):
            moved = (old[0, :size] != new[0, :size]).any(-1)
            assert bool(moved.all()), "prompt positions see the whole prompt, the response sees the prompt"


def test_padding_rows_change_nothing() -> None:
    """Rows without a sample leave the others' logits as they are and weigh nothing."""
    config = tiny_config()
    objective = objective_of(config)
    batch = wanted(text_batch(3, [[7, 5], [12], [12]]), config)
    padded = {name: tensor.clone() for name, tensor in batch.items()}
    padded["inputs"][1:], padded["labels"][1:] = 0, IGNORE_LABEL
    padded["active"][1:], padded["documents"][1:] = False, 0
    for old, new in zip(logits_of_segments(objective, batch), logits_of_segments(objective, padded), strict=True):
        assert torch.equal(old[0], new[0])
    alone = {name: tensor[:1] for name, tensor in batch.items()}
    carry = objective.initial_carry(alone)
    weights = objective.weights(padded, objective.initial_carry(padded))
    assert {n: int(w) for n, w in weights.items()} == {n: int(w) for n, w in objective.weights(alone, carry).items()}


def token_at(batch: Batch, row: int, column: int) -> int:
    return int(batch["inputs"][row, column])


TOKENIZER = train_bpe(["abab abab ba"], 258, 10)
DOCUMENTS = ("the quick", "a", "brown fox jumps over", "it", "lazy dogs sleep")
PAIRS = (("what is", " this"), ("a", "b"), ("longer prompt", " yes"), ("", "free"))


def samples(mode: str) -> TextSamples:
    if mode.startswith("prefix"):
        documents = [Document(p + r, "x", n, prompt=p, response=r) for n, (p, r) in enumerate(PAIRS)]
    else:
        documents = [Document(text, "x", n) for n, text in enumerate(DOCUMENTS)]
    prefix = mode.startswith("prefix")
    return TextSamples(tokenise(documents, TOKENIZER, prefix), RowForm(24, "packed" in mode, prefix))


def followers(mode: str) -> list[list[int]]:
    """Every document as its tokens with end-of-text."""
    texts = [p + r for p, r in PAIRS] if mode.startswith("prefix") else list(DOCUMENTS)
    if mode.startswith("prefix"):
        return [
            [*TOKENIZER.encode(p).tolist(), *TOKENIZER.encode(r).tolist(), TOKENIZER.end_of_text_id] for p, r in PAIRS
        ]
    return [[*TOKENIZER.encode(text).tolist(), TOKENIZER.end_of_text_id] for text in texts]


@pytest.mark.parametrize("arch", ["two cycles", "transformer"])
@pytest.mark.parametrize("mode", ["packed", "rows", "prefix packed", "prefix rows"])
def test_real_rows_never_see_their_label(mode: str, arch: str) -> None:
    """Columns of TextSamples: the label of position t is token t+1 of the same document, and changing the input that
    shows it moves no logit up to t."""
    config = tiny_config(
        vocab_size=TOKENIZER.vocab_size,
        seq_len=24,
        lm_mask="prefix" if mode.startswith("prefix") else "causal",
        **ARCHITECTURES[arch],
    )
    objective = objective_of(config)
    data = samples(mode)
    columns = data.rows(np.arange(len(data)))
    batch = to_batch(columns, wanted_columns(config), torch.device("cpu"))
    whole = followers(mode)
    places = np.argwhere(columns["labels"] != IGNORE_LABEL)
    for row, column in places:
        before = columns["inputs"][row, column - columns["positions"][row, column] : column + 1].tolist()
        after = [*before, int(columns["labels"][row, column])]
        assert any(after == d[i : i + len(after)] for d in whole for i in range(len(d))), "label is not the next token"
    reference = logits_of_segments(objective, batch)
    shown = 0
    for row, column in places[:: max(len(places) // 12, 1)]:
        here, there = columns["documents"][row, [column, min(column + 1, 23)]]
        if column == 23 or here != there:
            continue
        shown += 1
        assert token_at(batch, row, column + 1) == int(batch["labels"][row, column])
        changed = batch | {"inputs": batch["inputs"].clone()}
        changed["inputs"][row, column + 1] = (changed["inputs"][row, column + 1] + 7) % 256
        unseen = torch.zeros(batch["inputs"].shape, dtype=torch.bool)
        unseen[row, : column + 1] = True
        assert_same_where(reference, logits_of_segments(objective, changed), unseen, (int(row), int(column) + 1))
    assert shown >= 5
