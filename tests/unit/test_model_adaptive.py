"""Reading token by token with caches gives the numbers of whole-sequence reading, halted tokens included.

Logits within 2e-5: the same float32 arithmetic on other shapes (one query instead of twelve), whose sums are taken in
another order; measured gaps are below 4e-6 at logits of about 1. Halting decisions are compared exactly, and the test
makes sure that no score lies within 1e-3 of the threshold, so that rounding cannot turn one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm_ray.inference.text import DecodingSession
from hrm_ray.model.actv1 import ActV1
from hrm_ray.model.adaptive import adaptive_segments
from hrm_ray.model.chunked_rows import ChunkedRows
from hrm_ray.model.config import ModelConfig
from hrm_ray.model.layers import Context
from hrm_ray.model.scope import CAUSAL, AttentionScope, text_scope
from hrm_ray.model.transformer import Transformer
from tests.support.naive_model import NaiveByToken
from tests.support.tiny_models import tiny_actv1, tiny_config, tiny_model

LENGTH = 12
TOKENS = [(5 * n * n + 3 * n + 1) % 19 for n in range(LENGTH)]
SHAPES: dict[str, dict[str, Any]] = {
    "reference": {},
    "many cycles": {"h_cycles": 3, "l_cycles": 2, "halt_max_steps": 4},
    "many layers": {"h_cycles": 1, "l_cycles": 3, "h_layers": 2, "l_layers": 3, "halt_max_steps": 3},
    "one segment": {"halt_max_steps": 1},
    "five segments": {"halt_max_steps": 5},
    "window": {"halt_max_steps": 3, "window_size": 4},
    "narrowest window": {"halt_max_steps": 2, "window_size": 1},
    "bfloat16": {"forward_dtype": "bfloat16", "halt_max_steps": 3},
}
POSITIONS = ("rope", "learned", "none")


def spread_halting(model: ActV1, scope: AttentionScope, prompt: Tensor | None = None) -> tuple[Tensor, list[int]]:
    """Draws halting heads until TOKENS halt at three different segments (or all there are), no score near 0; then gives
    the logits and segments of whole-sequence reading."""
    segments = model.config.halt_max_steps
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        x = model.embedding(torch.tensor([TOKENS]), None, None)
        first = model.segment(model.initial_states(1, LENGTH), x, Context(scope, model.rotation(0, LENGTH))).z_h[0]
        for _ in range(200):
            direction = torch.randn(model.config.hidden_size, generator=generator)
            model.q_head.weight[0] = direction
            model.q_head.bias[0] = -(first @ direction).quantile(0.6)
            logits, halted_at, margin = whole(model, prompt)
            if len(set(halted_at)) >= min(segments, 3) and (margin > 1e-3 or segments == 1):
                return logits, halted_at
    raise AssertionError("no halting head found that lets tokens halt at different segments")


def whole(model: ActV1, prompt: Tensor | None) -> tuple[Tensor, list[int], float]:
    """Logits [T, V] and segments of adaptive reading on the whole sequence; the least |q| that decided anything."""
    inputs = {"inputs": torch.tensor([TOKENS])}
    # In three chunks where the mask allows it: what is read does not depend on how rows are cut.
    rows = ChunkedRows(model, inputs, 5) if prompt is None else ChunkedRows(model, inputs | {"prompt": prompt}, LENGTH)
    logits, segments = torch.zeros(LENGTH, model.config.vocab_size), [0] * LENGTH
    margin, frozen = float("inf"), torch.zeros(LENGTH, dtype=torch.bool)
    with torch.no_grad():
        for reading in adaptive_segments(model, rows):
            z_h = torch.cat([reading.states.z_h.get(chunk) for chunk in range(len(rows))], dim=1)
            scores = model.logits(z_h)[0].float()
            if reading.segment < model.config.halt_max_steps and not bool(frozen.all()):
                q = model.halting_scores(z_h)[0][0]
                margin = min(margin, float(q[~frozen].abs().min()))
            for place in range(LENGTH):
                if bool(reading.reads[0, place]):
                    assert segments[place] == 0, "a token is read out once"
                    segments[place], logits[place] = reading.segment, scores[place]
            frozen = reading.frozen[0]
    return logits, segments, margin


def by_token(model: ActV1 | Transformer, prompt: int, adaptive: bool) -> tuple[Tensor, list[int], DecodingSession]:
    reader = DecodingSession(model, adaptive)
    pieces = [reader.read(TOKENS[:prompt])] + [reader.read([token]) for token in TOKENS[prompt:]]
    return torch.cat([logits for logits, _ in pieces]).float(), [int(n) for _, ns in pieces for n in ns], reader


def scope_for(config: ModelConfig, prompt: int) -> AttentionScope:
    if config.lm_mask == "causal":
        return text_scope(None, None, config.window_size)
    inside = torch.zeros(1, LENGTH, dtype=torch.bool)
    inside[0, :prompt] = True
    return text_scope(None, inside, config.window_size)


def tolerance(config: ModelConfig) -> float:
    """bfloat16 rounds to 1 in 256: the sums' order shows in the second digit (ACTV1_SPEC, section 8)."""
    return 0.15 if config.forward_dtype == "bfloat16" else 2e-5


@pytest.mark.parametrize(("mask", "prompt"), [("causal", 1), ("causal", 5), ("prefix", 2), ("prefix", 5)])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "bfloat16"])
def test_adaptive_reading_with_caches(shape: str, positions: str, mask: str, prompt: int) -> None:
    config = tiny_config(pos_encodings=positions, lm_mask=mask, **SHAPES[shape])
    model = tiny_actv1(config, seed=4)
    marked = torch.arange(LENGTH).unsqueeze(0) < prompt if mask == "prefix" else None
    logits, segments = spread_halting(model, scope_for(config, prompt), marked)
    if mask == "prefix":
        assert segments[:prompt] == [config.halt_max_steps] * prompt, "a prompt without labels runs all segments"
    got, read_segments, reader = by_token(model, prompt, adaptive=True)
    assert read_segments == segments
    assert float((got - logits).abs().max()) <= tolerance(config)
    per_segment = config.h_cycles * (config.l_cycles * config.l_layers + config.h_layers)
    assert len(reader.caches.caches) == config.halt_max_steps * per_segment
    assert {len(cache) for cache in reader.caches.caches.values()} == {config.window_size or LENGTH}


@pytest.mark.parametrize(("mask", "prompt"), [("causal", 1), ("causal", 5), ("prefix", 5), ("prefix", 12)])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_reading_with_caches(shape: str, positions: str, mask: str, prompt: int) -> None:
    """Without adaptive reading: the last segment of the whole-sequence forward pass, whatever the halting head says."""
    config = tiny_config(pos_encodings=positions, lm_mask=mask, **SHAPES[shape])
    model = tiny_actv1(config, seed=4)
    with torch.no_grad():
        x = model.embedding(torch.tensor([TOKENS]), None, None)
        states = model.initial_states(1, LENGTH)
        for _ in range(config.halt_max_steps):
            states = model.segment(states, x, Context(scope_for(config, prompt), model.rotation(0, LENGTH)))
        want = model.logits(states.z_h)[0].float()
    got, segments, _ = by_token(model, prompt, adaptive=False)
    assert segments == [config.halt_max_steps] * LENGTH
    assert float((got - want).abs().max()) <= tolerance(config)


@pytest.mark.parametrize(("mask", "prompt"), [("causal", 1), ("causal", 5), ("prefix", 5), ("prefix", 12)])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("window", [None, 4])
def test_transformer_with_caches(positions: str, mask: str, prompt: int, window: int | None) -> None:
    base = tiny_config(arch="transformer", h_layers=2, halt_max_steps=1, halt_rule="none", window_size=window)
    config = replace(base, pos_encodings=positions, lm_mask=mask)
    model = tiny_model(config, seed=4)
    assert isinstance(model, Transformer)
    with torch.no_grad():
        x = model.embedding(torch.tensor([TOKENS]), None, None)
        want = model.logits(model(x, Context(scope_for(config, prompt), model.rotation(0, LENGTH))))[0]
    got, segments, reader = by_token(model, prompt, adaptive=False)
    assert segments == [1] * LENGTH and len(reader.caches.caches) == 3
    assert float((got - want).abs().max()) <= tolerance(config)


def test_a_halted_token_leaves_its_last_keys_and_values() -> None:
    """In the caches themselves: from the segment after its halting on, a token's entries are copies."""
    config = tiny_config(halt_max_steps=4)
    model = tiny_actv1(config, seed=4)
    spread_halting(model, CAUSAL)
    _, segments, reader = by_token(model, 5, adaptive=True)
    sites = [(update, 0) for update in range(config.updates_per_segment)]
    for token, halted_at in enumerate(segments):
        for segment in range(1, 4):
            for site in sites:
                keys, values = reader.caches.caches[segment, site].last(LENGTH)
                old_keys, old_values = reader.caches.caches[segment - 1, site].last(LENGTH)
                copied = segment + 1 > halted_at
                assert torch.equal(keys[:, :, token], old_keys[:, :, token]) == copied
                assert torch.equal(values[:, :, token], old_values[:, :, token]) == copied


def test_what_a_window_cannot_show_any_more_is_dropped() -> None:
    model = tiny_actv1(tiny_config(window_size=4), seed=4)
    _, _, reader = by_token(model, 9, adaptive=False)
    assert {len(cache) for cache in reader.caches.caches.values()} == {4}


def test_restart_forgets() -> None:
    model = tiny_actv1(tiny_config(), seed=4)
    reader = DecodingSession(model, adaptive=False)
    first, _ = reader.read(TOKENS[:4])
    reader.restart()
    again, _ = reader.read(TOKENS[:4])
    assert torch.equal(first, again)


@pytest.mark.parametrize("positions", POSITIONS)
def test_adaptive_reading_against_a_naive_model(positions: str) -> None:
    """The rule itself, written anew: float64, token after token, each with lists of keys and values per attention."""
    config = tiny_config(pos_encodings=positions, halt_max_steps=3)
    model = tiny_actv1(config, seed=4)
    logits, segments = spread_halting(model, CAUSAL)
    naive = NaiveByToken(model)
    with torch.no_grad():
        read = [naive.read(token, place) for place, token in enumerate(TOKENS)]
    assert [segment for _, segment in read] == segments and len(set(segments)) == 3
    assert float((torch.stack([scores for scores, _ in read]) - logits).abs().max()) <= 2e-5
