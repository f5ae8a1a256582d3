"""Preparing data once: the tokenizer's choice, the stores, and what a worker opens from the plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hrm_ray.data.packing import TextSamples
from hrm_ray.data.parts import TextSource
from hrm_ray.data.prepare import PreparedText, RowForm, TokenizerChoice, open_samples, prepare_puzzles, prepare_text
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataFault, SettingsError

ANCHOR = Path(__file__).parents[1] / "fixtures" / "sudoku4_minimal.safetensors"
FORM = RowForm(seq_len=8, packing=True, prefix=False)
CHOICE = TokenizerChoice(path=None, vocab_size=270, examples=100, retrain=False)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, count in (("train", 30), ("test", 2)):
        rows = [{"text": f"a {split} text, the {n}th text", "q": "what?" * n, "a": "that"} for n in range(count)]
        rows.append({"text": "", "q": "", "a": ""})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def prepared(
    corpus: Path, choice: TokenizerChoice = CHOICE, form: RowForm = FORM, columns: bool = False
) -> PreparedText:
    pair = {"prompt_column": "q", "response_column": "a"} if columns else {}
    train, test = (TextSource(corpus, split, **pair) for split in ("train", "test"))
    base = corpus.parent / "bundle"
    return prepare_text(train, test, bundle=base, stores=base / "data", choice=choice, form=form)


def test_a_worker_opens_what_was_prepared(corpus: Path) -> None:
    result = prepared(corpus)
    plan = json.loads(json.dumps(result.plan))
    train, held_out = open_samples(plan, corpus.parent / "bundle" / "data")
    assert result.evaluation is not None and held_out is not None
    assert (len(train), len(held_out)) == (result.train.rows, result.evaluation.rows)
    row = train.rows(np.array([0]))["inputs"][0]
    assert "a train text, the 0th text".startswith(result.tokenizer.decode(row))
    assert result.train.meta.documents == 30 and (result.train.folder / "meta.json").is_file()
    assert any("1 documents" in note for note in result.notes)


def test_without_evaluation_there_is_none(corpus: Path) -> None:
    base = corpus.parent / "bundle"
    source = TextSource(corpus)
    result = prepare_text(source, None, bundle=base, stores=base / "data", choice=CHOICE, form=FORM)
    assert result.evaluation is None and open_samples(result.plan, base / "data")[1] is None


def test_the_tokenizer_is_trained_then_used_again_then_trained_anew(corpus: Path) -> None:
    bundle = corpus.parent / "bundle"
    first = prepared(corpus)
    assert first.tokenizer_origin == "trained" and TextTokenizer.load(bundle).fingerprint == first.tokenizer.fingerprint
    larger = replace(CHOICE, vocab_size=280)
    again = prepared(corpus, larger)
    assert again.tokenizer_origin == "reused" and again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert any("270 tokens" in note and "--retrain-tokenizer" in note for note in again.notes)
    anew = prepared(corpus, replace(larger, retrain=True))
    assert anew.tokenizer_origin == "trained" and anew.tokenizer.vocab_size == 280
    assert TextTokenizer.load(bundle).vocab_size == 280


def test_a_given_tokenizer_wins_and_goes_into_the_bundle(corpus: Path, tmp_path: Path) -> None:
    given = TextTokenizer.train(["other words"] * 3, 262, 9)
    given.save(tmp_path / "given")
    prepared(corpus)
    result = prepared(corpus, replace(CHOICE, path=tmp_path / "given"))
    assert result.tokenizer_origin == "loaded" and result.train.meta.tokenizer == given.fingerprint
    assert TextTokenizer.load(tmp_path / "bundle").fingerprint == given.fingerprint


def test_a_smaller_vocabulary_than_asked_for_is_said(corpus: Path) -> None:
    result = prepared(corpus, replace(CHOICE, vocab_size=5000))
    assert any(f"{result.tokenizer.vocab_size} tokens" in note and "5000" in note for note in result.notes)


def test_pairs_and_their_cuts_are_reported(corpus: Path) -> None:
    result = prepared(corpus, form=RowForm(32, True, True), columns=True)
    assert result.train.cut_pairs > 0
    assert any(f"{result.train.cut_pairs} of 30 pairs" in note for note in result.notes)
    samples, _ = open_samples(result.plan, corpus.parent / "bundle" / "data")
    assert isinstance(samples, TextSamples) and samples.prefix


def test_data_that_cannot_be_used_leaves_everything_as_it_was(corpus: Path) -> None:
    bundle = corpus.parent / "bundle"
    result = prepared(corpus)
    with pytest.raises(SettingsError, match="--max-seq-len"):
        prepared(corpus, replace(CHOICE, retrain=True, vocab_size=280), replace(FORM, seq_len=100_000))
    (corpus / "test.jsonl").write_text("[]")
    with pytest.raises(DataFault, match=r"test\.jsonl:1"):
        prepared(corpus, replace(CHOICE, retrain=True, vocab_size=280))
    assert TextTokenizer.load(bundle).fingerprint == result.tokenizer.fingerprint
    assert len(open_samples(result.plan, bundle / "data")[0]) == result.train.rows
    assert sorted(entry.name for entry in bundle.iterdir()) == ["data", "tokenizer.json", "tokenizer_config.json"]


def test_puzzles_are_checked_and_opened(tmp_path: Path) -> None:
    result = prepare_puzzles(TextSource(ANCHOR, "train"), TextSource(ANCHOR, "test"))
    train, held_out = open_samples(json.loads(json.dumps(result.plan)), tmp_path)
    assert held_out is not None and result.evaluation is not None
    assert (len(train), len(held_out)) == (result.train.count, result.evaluation.count) == (20_000, 1_000)
    assert prepare_puzzles(TextSource(ANCHOR), None).evaluation is None
    with pytest.raises(DataFault, match="valid"):
        prepare_puzzles(TextSource(ANCHOR), TextSource(ANCHOR, "valid"))
