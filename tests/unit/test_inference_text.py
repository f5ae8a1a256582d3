"""Drawing tokens by exact small distributions, and writing text with caches.

Whether cached reading equals whole-sequence reading is in test_model_adaptive.py.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hrm_ray.errors import SettingsError
from hrm_ray.inference.text import (
    Completion,
    DecodingSession,
    SampledToken,
    Sampling,
    TextModel,
    draw,
    generate,
    sample_text,
)
from hrm_ray.model.layers import Context
from hrm_ray.model.scope import AttentionScope
from hrm_ray.train.assemble import assemble
from hrm_ray.train.world import World
from tests.support.splits import Cut, Rows, config_for, settings_for
from tests.support.tiny_models import VOCAB, between, tiny_actv1, tiny_config, tiny_model

CHANCES = [0.5, 0.25, 0.125, 0.125]
LOGITS = torch.log(torch.tensor(CHANCES))


def counted(sampling: Sampling, logits: torch.Tensor = LOGITS, draws: int = 2000) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    seen = Counter(draw(logits, sampling, generator) for _ in range(draws))
    return [seen[token] / draws for token in range(len(logits))]


def assert_chances(sampling: Sampling, want: list[float]) -> None:
    """2000 draws: 4 sigma are 0.045 at most; a token that is cut never comes."""
    got = counted(sampling)
    assert got == pytest.approx(want, abs=0.045)
    assert [share == 0 for share in got] == [chance == 0 for chance in want]


def test_plain_draws_follow_the_scores() -> None:
    assert_chances(Sampling(temperature=1.0), CHANCES)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_an_exponent(temperature: float) -> None:
    powers = [chance ** (1 / temperature) for chance in CHANCES]
    assert_chances(Sampling(temperature=temperature), [power / sum(powers) for power in powers])


def test_temperature_zero_is_the_likeliest_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    scores = torch.tensor([0.1, 5.0, 4.999, -3.0])
    assert {draw(scores, Sampling(temperature=0.0, top_k=3, top_p=0.5), generator) for _ in range(20)} == {1}
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-9])
def test_the_smallest_temperatures_take_the_likeliest(temperature: float) -> None:
    assert counted(Sampling(temperature=temperature), torch.tensor([3.0, -2.0, 2.9]), 20) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("top_k", "want"),
    [(1, [1.0, 0, 0, 0]), (2, [2 / 3, 1 / 3, 0, 0]), (0, CHANCES), (4, CHANCES), (99, CHANCES)],
)
def test_top_k(top_k: int, want: list[float]) -> None:
    assert_chances(Sampling(temperature=1.0, top_k=top_k), want)


def test_top_k_of_equal_scores_keeps_k() -> None:
    got = counted(Sampling(temperature=1.0, top_k=2), torch.zeros(4), 200)
    assert sum(share > 0 for share in got) == 2


@pytest.mark.parametrize(
    ("top_p", "want"),
    [
        (1e-9, [1.0, 0, 0, 0]),
        (0.3, [1.0, 0, 0, 0]),
        (0.5, [1.0, 0, 0, 0]),
        (0.51, [2 / 3, 1 / 3, 0, 0]),
        (0.75, [2 / 3, 1 / 3, 0, 0]),
        (1.0, CHANCES),
    ],
)
def test_top_p(top_p: float, want: list[float]) -> None:
    """The fewest likeliest tokens whose mass reaches top_p. Logits in double, so that the masses are exact."""
    sampling = Sampling(temperature=1.0, top_p=top_p)
    got = counted(sampling, torch.log(torch.tensor(CHANCES, dtype=torch.float64)))
    assert got == pytest.approx(want, abs=0.045)
    assert [share == 0 for share in got] == [chance == 0 for chance in want]


def test_top_p_counts_the_mass_after_top_k_and_temperature() -> None:
    """Left by top_k 3: 4/7, 2/7, 1/7. 0.8 is reached by two of them; of all four it would take three."""
    assert_chances(Sampling(temperature=1.0, top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0])
    # At temperature 1/2 the chances are 32/44, 8/44, 2/44, 2/44: the first is enough for 0.7.
    assert_chances(Sampling(temperature=0.5, top_p=0.7), [1.0, 0, 0, 0])


@settings(max_examples=50)
@given(
    scores=st.lists(st.floats(-50, 50), min_size=1, max_size=8),
    temperature=st.floats(0, 5),
    top_k=st.integers(0, 9),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 100),
)
def test_any_sampling_gives_a_token_it_may_give(
    scores: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits = torch.tensor(scores)
    token = draw(logits, Sampling(temperature, top_k, top_p), torch.Generator().manual_seed(seed))
    better = sum(float(other) > float(logits[token]) for other in logits)
    assert 0 <= token < len(scores)
    if top_k:
        assert better < top_k
    if temperature == 0:
        assert better == 0


def written(prompt: list[int], count: int, **changes: Any) -> list[SampledToken]:
    settings_ = {"seed": 3, "end_of_text_id": VOCAB, "sampling": Sampling(1.0), "adaptive": False} | changes
    config = settings_.pop("config", tiny_config(seq_len=6))
    return list(generate(tiny_model(config), prompt, max_new_tokens=count, **settings_))


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_same_seed_the_same_text(adaptive: bool) -> None:
    first = written([1, 2], 12, adaptive=adaptive)
    torch.manual_seed(99)
    assert written([1, 2], 12, adaptive=adaptive) == first
    assert [d.token for d in written([1, 2], 12, seed=4, adaptive=adaptive)] != [d.token for d in first]


def test_text_ends_at_end_of_text_and_at_the_limit() -> None:
    free = [d.token for d in written([1], 10)]
    assert len(free) == 10
    stop = free[4]
    assert [d.token for d in written([1], 10, end_of_text_id=stop)] == free[: free.index(stop)]
    assert written([1], 0) == []


CONTEXTS: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned": {"pos_encodings": "learned"},
    "prefix": {"lm_mask": "prefix"},
    "odd length": {"seq_len": 5, "pos_encodings": "learned"},
    "two positions": {"seq_len": 2},
    "transformer": {"arch": "transformer", "halt_rule": "none", "halt_max_steps": 1, "pos_encodings": "learned"},
}


@pytest.mark.parametrize("case", CONTEXTS)
@pytest.mark.parametrize("prompt_length", [1, 6, 9])
def test_a_full_context_is_halved_and_read_again(case: str, prompt_length: int) -> None:
    """Greedy text equals that of reading, for every token, the context that the rule leaves. Under a prefix mask it
    ends where the context is full."""
    config = tiny_config(**({"seq_len": 6} | CONTEXTS[case]))
    prompt = [(3 * n + 1) % VOCAB for n in range(prompt_length)]
    greedy = Sampling(temperature=0.0)
    got = [d.token for d in written(prompt, 15, config=config, sampling=greedy)]
    model = tiny_model(config)
    limit, context, first = config.seq_len, prompt[-config.seq_len :], min(prompt_length, config.seq_len)
    for number, token in enumerate(got):
        # The part read at once, which a prefix mask shows to itself, then one token after the other.
        reader = DecodingSession(model, adaptive=False)
        logits, _ = reader.read(context[:first])
        for late in context[first:]:
            logits, _ = reader.read([late])
        assert int(logits[-1].argmax()) == token, f"token {number}"
        context = [*context, token]
        if len(context) > limit:
            context = context[-(limit // 2) :]
            first = len(context)
    room = limit - min(prompt_length, limit) + 1
    assert len(got) == (room if config.lm_mask == "prefix" else 15)


def test_drawn_tells_the_segments_of_the_position_before() -> None:
    fixed = written([1, 2], 8, config=tiny_config(halt_max_steps=3, seq_len=12))
    assert {d.segments for d in fixed} == {3}
    model = tiny_actv1(tiny_config(halt_max_steps=3, seq_len=12))
    with torch.no_grad():
        states = model.initial_states(1, VOCAB)
        x = model.embedding(torch.arange(VOCAB).unsqueeze(0), None, None)
        states = model.segment(states, x, Context(AttentionScope(documents=torch.arange(VOCAB).unsqueeze(0)), None))
        model.q_head.bias[0] -= between(model.halting_scores(states.z_h)[0])
    seen = set()
    for prompt in ([1, 2], [2, 1], [3, 4], [5, 6], [7, 8]):
        read = DecodingSession(model, adaptive=True).read(prompt)[1].tolist()
        options = {"sampling": Sampling(0.0), "max_new_tokens": 1, "end_of_text_id": VOCAB, "seed": 1}
        (drawn,) = generate(model, prompt, adaptive=True, **options)
        assert drawn.segments == read[-1]
        seen.add(tuple(read))
    assert any(first != last for first, last in seen), "no prompt whose first token halts elsewhere than its last"


def test_scores_of_a_bfloat16_model_can_be_drawn() -> None:
    assert len(written([1, 2], 4, config=tiny_config(forward_dtype="bfloat16", seq_len=8))) == 4
    assert math.isclose(sum(counted(Sampling(1.0), LOGITS.bfloat16(), 50)), 1.0)


class CopiedBytes(TorchDispatchMode):
    """Counts the bytes that copies and concatenations write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.copy_, torch.ops.aten.clone):
            self.total += result.numel() * result.element_size()
        return result


@pytest.mark.parametrize("window", [None, 32])
def test_what_a_token_copies_does_not_grow_with_the_text(window: int | None) -> None:
    """Eight times as many tokens copy about eight times as much: a token does not copy the earlier keys and values."""
    config = tiny_config(seq_len=512, window_size=window, halt_max_steps=1, h_cycles=1, l_cycles=1)
    totals = []
    for count in (64, 512):
        with CopiedBytes() as copied:
            written([1], count - 1, config=config)
        totals.append(copied.total)
    assert totals[1] < 1.5 * 8 * totals[0]


BYTES = "aé€😀 b\n"
"""Characters of one to four bytes; the stub's tokens are single bytes."""


class ByteTokenizer:
    """Decodes bytes. A space at the beginning is left out, as decoders of word pieces do."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace").removeprefix(" ")


@pytest.mark.parametrize("text", [BYTES, " a b", "€"])
def test_pieces_are_whole_characters_and_add_up_to_the_text(text: str) -> None:
    tokens = [SampledToken(byte, 2) for byte in text.encode()]
    completion = Completion(ByteTokenizer(), iter(tokens), [])  # type: ignore[arg-type]
    pieces = list(completion)
    assert "".join(pieces) == text.removeprefix(" ")
    assert not any("\ufffd" in piece for piece in pieces)
    assert completion.segments == [2] * len(tokens)


def test_a_character_cut_off_is_shown_at_the_end() -> None:
    tokens = [SampledToken(byte, 1) for byte in "a€".encode()[:-1]]
    assert "".join(Completion(ByteTokenizer(), iter(tokens), [])) == "a\ufffd"  # type: ignore[arg-type]


def test_decoding_does_not_start_over_for_each_piece() -> None:
    """Bytes decoded for 8 times the text are 8 times as many."""
    decoded = []
    for count in (64, 512):
        tokenizer, total = ByteTokenizer(), 0

        def decode(ids: list[int], original: Any = tokenizer.decode) -> str:
            nonlocal total
            total += len(ids)
            return original(ids)

        tokenizer.decode = decode  # type: ignore[method-assign]
        list(Completion(tokenizer, iter([SampledToken(97, 1)] * count), []))  # type: ignore[arg-type]
        decoded.append(total)
    assert decoded[1] <= 8.5 * decoded[0]


class SmallTokenizer(ByteTokenizer):
    """Encodes bytes as the tokens of a tiny model."""

    end_of_text_id = 0

    def encode(self, text: str) -> list[int]:
        return [1 + byte % 18 for byte in text.encode()]


def completion(prompt: str = "abc", count: int = 4, adaptive: bool = False, **config: Any) -> Completion:
    model = TextModel(tiny_model(tiny_config(**({"seq_len": 4} | config))), SmallTokenizer())  # type: ignore[arg-type]
    return model.complete(prompt, sampling=Sampling(0.0), max_new_tokens=count, seed=1, adaptive=adaptive)


def test_what_the_context_cannot_hold_is_said() -> None:
    assert completion("abcd").notes == []
    assert completion("abcdefg").notes == ["the prompt has 7 tokens; only the last 4 are used"]
    assert completion("abc", 2, lm_mask="prefix").notes == []
    (note,) = completion("abc", 3, lm_mask="prefix").notes
    assert "room for 2" in note


def test_an_empty_prompt_starts_at_end_of_text() -> None:
    assert len(list(completion("", 3))) >= 1


@pytest.mark.parametrize(
    "config",
    [
        {"halt_max_steps": 1},
        {"halt_rule": "none"},
        {"arch": "transformer", "halt_rule": "none", "halt_max_steps": 1},
    ],
)
def test_adaptive_decoding_needs_a_trained_halting_head(config: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="--adaptive"):
        completion(adaptive=True, **config)
    assert completion(adaptive=True).notes == []


def test_a_prompt_that_is_no_text() -> None:
    with pytest.raises(SettingsError, match="UTF-8"):
        completion("\ud800")


@pytest.mark.parametrize("scenario", ["text-experts", "transformer"])
def test_sampling_between_steps_leaves_training_as_it_is(scenario: str) -> None:
    """A loop with dropout takes the same steps, to the bit, with a text sampled after each."""

    def trained(samples: bool) -> tuple[list[Tensor], list[str]]:
        chosen = settings_for(scenario, "sgd", Cut(1, 1, 8))
        chosen = chosen.model_copy(update={"model": chosen.model.model_copy(update={"dropout_rate": 0.2})})
        config = config_for(chosen)
        loop = assemble(chosen, config, Rows(config.task), World.here("cpu", 1), 10)
        model, texts = loop.parts.objective.model, []
        for _ in range(3):
            assert loop.step() is not None
            if samples:
                before = torch.random.get_rng_state()
                texts.append(sample_text(model, SmallTokenizer(), "ab", sampling=Sampling(1.0), max_new_tokens=9))
                assert torch.equal(torch.random.get_rng_state(), before)
                assert all(module.training for module in model.modules())
        return [tensor.clone() for tensor in model.state_dict().values()], texts

    with_samples, texts = trained(samples=True)
    without, _ = trained(samples=False)
    assert all(map(torch.equal, with_samples, without))
    assert len(texts) == 3 and all(texts)
