"""Training a BPE: a vocabulary is the beginning of any larger one, and the data decides its size by a rule."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data import bpe, tokenizer
from hrm_ray.data.bpe import LEAST_SAMPLE_COUNTS, LEAST_VOCABULARY, SizeBounds, train_bpe, train_sized_bpe
from hrm_ray.data.readers import TextSource, read_documents
from hrm_ray.data.rows import Document
from hrm_ray.data.text_store import load_store, save_store, tokenise
from hrm_ray.data.tokenizer import TextTokenizer, text_slices
from hrm_ray.errors import DataError

WORDS = ["".join(np.random.default_rng(number).choice(list("abcdefgh"), 6)) for number in range(200)]


def corpus(documents: int, seed: int = 0) -> list[str]:
    """Documents of words of which a few are common and most are rare."""
    drawn = np.random.default_rng(seed).zipf(1.3, (documents, 30)) % len(WORDS)
    return [" ".join(WORDS[word] for word in row) for row in drawn]


def merges_of(tokenizer: TextTokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(tokenizer._backend.to_str())["model"]["merges"]
    return merges


def counts_when_made(texts: list[str], merges: list[list[str]]) -> list[int]:
    """Written apart from the trainer: how often each pair stands side by side when its turn comes. Words are letters
    only, so those of a document are split at the spaces, which belong to the word after them."""
    words = Counter(("Ġ" if number else "") + word for text in texts for number, word in enumerate(text.split(" ")))
    split = {word: list(word) for word in words}
    counts = []
    for left, right in merges:
        made = 0
        for word, parts in split.items():
            made += words[word] * sum(pair == (left, right) for pair in itertools.pairwise(parts))
            for at in range(len(parts) - 1):
                if parts[at : at + 2] == [left, right]:
                    parts[at : at + 2] = [left + right]
        counts.append(made)
    return counts


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), halved=st.integers(LEAST_VOCABULARY, 330))
def test_a_vocabulary_is_the_beginning_of_a_larger_one(seed: int, halved: int) -> None:
    texts = corpus(20, seed)
    small, large = (merges_of(train_bpe(texts, size, 99)) for size in (halved, 340))
    assert len(small) == halved - LEAST_VOCABULARY and large[: len(small)] == small


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), documents=st.integers(20, 80))
def test_every_merge_stands_in_the_text_often_enough_and_the_next_would_not(seed: int, documents: int) -> None:
    texts = corpus(documents, seed)
    sized = train_sized_bpe(lambda: texts, SizeBounds(LEAST_VOCABULARY, 5000, 0), 10**6)
    chosen, further = merges_of(sized.tokenizer), merges_of(train_bpe(texts, 5000, 10**6))
    counts = counts_when_made(texts, further[: len(chosen) + 1])
    assert all(count >= 100 for count in counts[: len(chosen)]) and counts[len(chosen)] < 100
    assert counts == sorted(counts, reverse=True)
    assert f"{sized.tokenizer.vocab_size} tokens" in sized.account and "at least 100 times in all" in sized.account


def test_a_sample_counts_for_as_much_text_as_there_is() -> None:
    texts = corpus(400)
    size = sum(len(text.encode()) for text in texts[:100])
    alone = train_sized_bpe(lambda: texts[:100], SizeBounds(260, 5000, 4 * size), 100)
    assert alone.tokenizer.vocab_size == train_bpe(texts[:100], 5000, 100, 100).vocab_size, "it is all there is"
    quarter = train_sized_bpe(lambda: texts, SizeBounds(260, 5000, 4 * size), 100)
    assert quarter.tokenizer.vocab_size == train_bpe(texts, 5000, 100, 25).vocab_size > alone.tokenizer.vocab_size
    assert "at least 25 times in a sample" in quarter.account and "1/4.0 of it" in quarter.account
    of_much = train_sized_bpe(lambda: texts, SizeBounds(260, 5000, 10**12), 100)
    assert of_much.tokenizer.vocab_size == train_bpe(texts, 5000, 100, LEAST_SAMPLE_COUNTS).vocab_size
    limited = train_sized_bpe(lambda: texts, SizeBounds(260, 5000, 10**12, corpus_documents=400), 100)
    assert limited.tokenizer.vocab_size == quarter.tokenizer.vocab_size
    compressed = train_sized_bpe(lambda: texts, SizeBounds(260, 5000, size // 4), 100)
    assert compressed.tokenizer.vocab_size == alone.tokenizer.vocab_size and "unknown" in compressed.account


def test_the_bounds_hold_and_are_named() -> None:
    texts = corpus(60)
    free = train_sized_bpe(lambda: texts, SizeBounds(LEAST_VOCABULARY, 5000, 0), 99).tokenizer.vocab_size
    low = train_sized_bpe(lambda: texts, SizeBounds(free + 20, 5000, 0), 99)
    assert low.tokenizer.vocab_size == free + 20
    assert f"gives {free} tokens" in low.account and f"--min-vocab-size {free + 20}" in low.account
    high = train_sized_bpe(lambda: texts, SizeBounds(260, free - 5, 0), 99)
    assert high.tokenizer.vocab_size == free - 5 and f"--max-vocab-size {free - 5}" in high.account


def test_the_same_data_gives_the_same_vocabulary_from_any_iterator() -> None:
    texts = corpus(50)

    def per_parameter() -> Iterator[str]:
        yield from texts

    bounds = SizeBounds(300, 400, 0)
    first, second = (train_sized_bpe(read, bounds, 40) for read in (per_parameter, lambda: texts))
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint and first.account == second.account


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(DataError, match="no text"):
        train_sized_bpe(lambda: ["", ""], SizeBounds(300, 400, 0), 9)


def test_a_vocabulary_of_150000(tmp_path: Path) -> None:
    """Trained, saved, loaded, and every token of it encoded into a store: ids past 16 bits come back."""
    letters = np.random.default_rng(0).integers(97, 123, (47_000, 9)).astype(np.uint8)
    words = [row.tobytes().decode() for row in letters]
    train_bpe([" ".join(words)], 150_000, 1).save(tmp_path)
    tokenizer = TextTokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 150_000
    text = " ".join(words[:2000])
    (tmp_path / "some.txt").write_text(text)
    save_store(tokenise(read_documents(TextSource(tmp_path / "some.txt")), tokenizer), tmp_path / "store")
    tokens = load_store(tmp_path / "store").tokens
    assert tokens.max() > 2**17 and tokenizer.decode(tokens[:-1]) == text


def test_the_sample_has_a_bound_in_bytes_and_long_texts_are_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_SLICE_CHARACTERS", 40)
    lines = [f"{text}\n" for text in corpus(30)]
    text = "".join(lines)
    whole = train_bpe(lines, 400, 99)
    pieces = [Document(text[at : at + 500], "", 0, piece=at // 500) for at in range(0, len(text), 500)]
    assert merges_of(train_bpe([text], 400, 1)) == merges_of(whole)
    # What comes in pieces is one document, and a second one is not read.
    assert (
        len(pieces) > 5
        and merges_of(train_bpe([*pieces, Document("zzzz" * 99, "", 1)], 400, 1))[:9] == (merges_of(whole)[:9])
    )
    monkeypatch.setattr(bpe, "SAMPLE_BYTES", len(text) // 2)
    half = next(at for at in itertools.accumulate(len(line) for line in lines) if at >= len(text) // 2)
    assert merges_of(train_bpe(lines, 400, 99)) == merges_of(train_bpe([text[:half]], 400, 99))
    sized = train_sized_bpe(lambda: [text, "not read"], SizeBounds(260, 400, len(text)), 99)
    assert "in 1 document, 1/" in sized.account and "a sample of the text" in sized.account


@given(st.text("ab \n", max_size=60))
def test_slices_are_the_text(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hrm_ray.data.tokenizer._SLICE_CHARACTERS", 7)
        slices = list(text_slices(text))
    assert "".join(slices) == text and all(len(each) <= 7 for each in slices)
