"""Preparing text once: the tokenizer's choice, the first chunk, the held-out documents, and a corpus that changed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm_ray.data.bpe import train_bpe
from hrm_ray.data.packing import RowForm, TextSamples
from hrm_ray.data.parts import TextSource
from hrm_ray.data.prepare import (
    PreparedText,
    PrepareRequest,
    PuzzlePlan,
    TokenizerChoice,
    open_puzzle_sets,
    prepare_puzzles,
    prepare_text,
)
from hrm_ray.data.text_data import ChunkingConfig, TextDataDir, TextPlan
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataError, ResourceError, SettingsError

ANCHOR = Path(__file__).parents[1] / "fixtures" / "sudoku4_minimal.safetensors"
FORM = RowForm(seq_len=8)
CHOICE = TokenizerChoice(name=None, vocab_size=270, examples=100, retrain=False)
CUT = ChunkingConfig(
    samples_per_block=20,
    dataset_chunk_size=8,
    dataset_start_offset=0,
    max_train_examples=None,
    ascii_only=False,
    on_bad_row="fail",
    shuffled=False,
    seed=0,
    cache_bytes=1 << 30,
    shuffle_rows=10,
)
WANTED = PrepareRequest(eval_rows=100)


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
    corpus: Path,
    choice: TokenizerChoice = CHOICE,
    form: RowForm = FORM,
    cut: ChunkingConfig = CUT,
    wanted: PrepareRequest = WANTED,
    evaluation: bool = True,
    **columns: str,
) -> PreparedText:
    train, test = (TextSource(corpus, split, **columns) for split in ("train", "test"))
    base = corpus.parent / "bundle"
    return prepare_text(
        train,
        test if evaluation else None,
        bundle=base,
        data=base / "data",
        choice=choice,
        form=form,
        chunking_config=cut,
        request=wanted,
    )


def test_a_worker_opens_what_was_prepared(corpus: Path) -> None:
    result = prepared(corpus, wanted=PrepareRequest(count=True, eval_rows=100))
    plan = TextPlan.from_plain(json.loads(json.dumps(result.plan.plain())))
    assert plan == result.plan
    folder = TextDataDir(corpus.parent / "bundle" / "data")
    pipeline = folder.pipeline(
        plan.chunking_config, plan.source, TextTokenizer.load(corpus.parent / "bundle"), pairs=False, writes=False
    )
    chunks = []
    while (chunk := pipeline.get(len(chunks))) is not None:
        chunks.append(chunk)
    assert [(c.entry.start.block, c.entry.start.chunk, c.entry.rows) for c in chunks] == [
        *((0, 0, 8), (0, 1, 8), (0, 2, 4)),
        *((1, 0, 8), (1, 1, 3)),
    ]
    rows = [len(TextSamples(chunk.store, plan.form)) for chunk in chunks]
    assert result.sequences is not None and (result.sequences.count, result.sequences.estimated) == (sum(rows), False)
    row = TextSamples(chunks[0].store, plan.form).rows(np.array([0]))["inputs"][0]
    assert "a train text, the 0th text".startswith(result.tokenizer.decode(row))
    assert plan.evaluation is not None
    held_out = TextSamples(folder.read_evaluation(plan.evaluation), plan.form)
    assert result.evaluation is not None and len(held_out) == len(TextSamples(result.evaluation, plan.form))
    assert len(list(folder.chunks.iterdir())) == 5


def test_without_evaluation_there_is_none(corpus: Path) -> None:
    result = prepared(corpus, evaluation=False)
    assert result.evaluation is None and not result.plan.evaluation and result.sequences is None


def test_only_the_first_chunk_is_tokenised_before_a_run(corpus: Path) -> None:
    prepared(corpus)
    folder = TextDataDir(corpus.parent / "bundle" / "data")
    assert len(list(folder.chunks.iterdir())) == 1
    assert len(folder.catalog.read_text().splitlines()) == 1


def test_a_large_corpus_is_estimated(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = prepared(corpus, wanted=PrepareRequest(count=True), evaluation=False).sequences
    monkeypatch.setattr("hrm_ray.data.corpus_facts.COUNTED_BYTES", 100)
    estimated = prepared(corpus, wanted=PrepareRequest(count=True), evaluation=False).sequences
    assert counted is not None and estimated is not None
    assert estimated.estimated and abs(estimated.count - counted.count) <= 0.15 * counted.count


def test_held_out_documents_are_read_as_far_as_they_are_needed(corpus: Path) -> None:
    (corpus / "test.jsonl").write_text("\n".join(json.dumps({"text": f"held out number {n}"}) for n in range(2000)))
    whole = prepared(corpus, wanted=PrepareRequest(eval_rows=10**6)).evaluation
    few = prepared(corpus, wanted=PrepareRequest(eval_rows=30)).evaluation
    first = prepared(corpus, wanted=PrepareRequest(eval_rows=10**6, max_val_examples=7)).evaluation
    assert whole is not None and few is not None and first is not None
    assert whole.documents == 2000 and first.documents == 7
    assert len(TextSamples(few, FORM)) >= 30 and few.documents < 300
    assert np.array_equal(few.tokens, whole.tokens[: len(few.tokens)])


def test_held_out_documents_are_kept_and_damage_is_noticed(corpus: Path) -> None:
    first = prepared(corpus).evaluation
    keeping = PrepareRequest(eval_rows=100, keep_evaluation=True)
    (corpus / "test.jsonl").write_text("[]")
    kept = prepared(corpus, wanted=keeping).evaluation
    assert first is not None and kept is not None and np.array_equal(first.tokens, kept.tokens)
    (file,) = (corpus.parent / "bundle" / "data").glob("eval-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"eval-.*\.safetensors"):
        prepared(corpus, wanted=keeping)


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
    given = train_bpe(["other words"] * 3, 262, 9)
    given.save(tmp_path / "given")
    prepared(corpus)
    result = prepared(corpus, replace(CHOICE, name=str(tmp_path / "given")))
    assert result.tokenizer_origin == "loaded" and result.tokenizer.fingerprint == given.fingerprint
    assert TextTokenizer.load(tmp_path / "bundle").fingerprint == given.fingerprint


def test_a_smaller_vocabulary_than_asked_for_is_said(corpus: Path) -> None:
    result = prepared(corpus, replace(CHOICE, vocab_size=5000))
    assert any(f"{result.tokenizer.vocab_size} tokens" in note and "5000" in note for note in result.notes)


def test_data_that_cannot_be_used_leaves_everything_as_it_was(corpus: Path) -> None:
    bundle = corpus.parent / "bundle"
    result = prepared(corpus)
    with pytest.raises(SettingsError, match="--max-seq-len"):
        prepared(corpus, replace(CHOICE, retrain=True, vocab_size=280), replace(FORM, seq_len=100_000))
    (corpus / "test.jsonl").write_text("[]")
    with pytest.raises(DataError, match=r"test\.jsonl:1"):
        prepared(corpus, replace(CHOICE, retrain=True, vocab_size=280))
    assert TextTokenizer.load(bundle).fingerprint == result.tokenizer.fingerprint
    assert result.plan.evaluation is not None
    assert TextDataDir(bundle / "data").read_evaluation(result.plan.evaluation).documents == 2
    assert sorted(entry.name for entry in bundle.iterdir()) == ["data", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize(
    ("cut", "names"),
    [
        ({"dataset_start_offset": 31}, ("--dataset-start-offset 31",)),
        ({"start_block": 2}, ("--start-block-id 2", "2 blocks")),
        ({"start_chunk": 3}, ("--start-chunk-id 3", "3 chunks", "2 or less")),
        ({"ascii_only": True}, ("--ascii-only", "30 of 31 rows")),
    ],
)
def test_nothing_to_begin_with(corpus: Path, cut: dict[str, Any], names: tuple[str, ...]) -> None:
    if "ascii_only" in cut:
        rows = [{"text": f"é{n}"} for n in range(30)]
        (corpus / "train.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {"text": ""}]))
    with pytest.raises((SettingsError, DataError)) as caught:
        prepared(corpus, choice=replace(CHOICE, vocab_size=300), cut=replace(CUT, **cut))
    assert all(name in str(caught.value) for name in names), caught.value


def test_a_small_cache_cannot_hold_everything(corpus: Path) -> None:
    with pytest.raises(ResourceError, match="--no-streaming.*--cache-gb"):
        prepared(corpus, cut=replace(CUT, streaming=False, cache_bytes=500))
    held = prepared(corpus, cut=replace(CUT, streaming=False))
    assert held.sequences is not None and not held.sequences.estimated


@pytest.mark.parametrize("change", ["row", "longer", "new", "gone", "renamed"])
def test_a_corpus_that_changed_is_refused(corpus: Path, change: str) -> None:
    for name in ("a", "b"):
        (corpus / "train").mkdir(exist_ok=True)
        (corpus / "train" / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": f"{name} {n}"}) for n in range(9))
        )
    (corpus / "train.jsonl").unlink()
    prepared(corpus)
    prepared(corpus)
    file = corpus / "train" / "a.jsonl"
    if change == "row":
        file.write_text(file.read_text().replace("a 3", "a 4"))
    elif change == "longer":
        file.write_text(file.read_text() + "\n")
    elif change == "new":
        (corpus / "train" / "aa.jsonl").write_text('{"text": "x"}')
    elif change == "gone":
        (corpus / "train" / "b.jsonl").unlink()
    else:
        file.rename(corpus / "train" / "c.jsonl")
    with pytest.raises(DataError, match="not what the run was trained on") as caught:
        prepared(corpus)
    assert "--student-init" in str(caught.value)


def test_a_corpus_that_was_copied_is_the_same(corpus: Path, tmp_path: Path) -> None:
    prepared(corpus)
    content = (corpus / "train.jsonl").read_bytes()
    os.utime(corpus / "train.jsonl", ns=(1, 1))
    assert (corpus / "train.jsonl").read_bytes() == content
    prepared(corpus)


def test_puzzles_are_checked_and_opened() -> None:
    result = prepare_puzzles(TextSource(ANCHOR, "train"), TextSource(ANCHOR, "test"))
    train, held_out = open_puzzle_sets(PuzzlePlan.from_plain(json.loads(json.dumps(result.plan.to_plain()))))
    assert held_out is not None and result.evaluation is not None
    assert (len(train), len(held_out)) == (result.train.count, result.evaluation.count) == (20_000, 1_000)
    assert prepare_puzzles(TextSource(ANCHOR), None).evaluation is None
    with pytest.raises(DataError, match="valid"):
        prepare_puzzles(TextSource(ANCHOR), TextSource(ANCHOR, "valid"))
