"""Which samples a run sees, option by option: told by the rows in its batches, not by what the run says of itself."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hrm_ray.ledger import read_ledger
from hrm_ray.ledger.verify import violations
from hrm_ray.rundir import RunDir
from hrm_ray.train.loaders import HaltedSlots
from hrm_ray.train.stream_loader import StreamLoader
from hrm_ray.types import Columns
from tests.support.numbered_corpora import TOKENIZER, texts_of, write_corpus
from tests.support.runs import TINY, hrm, puzzle_file, records, refused, train

WORDS = (
    *TINY,
    "--max-seq-len",
    "32",
    "--batch-size",
    "4",
    "--log-every",
    "1",
    "--no-packing",
    "--lr-schedule",
    "constant",
)
"""Without packing a row of the corpus is a row of a batch, as long as it is short."""

Seen = Callable[[], list[str]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """What runs in this test were given to train on since the last call, as texts."""
    rows: list[str] = []
    real = StreamLoader.next_batch

    def offering(loader: StreamLoader, halted: HaltedSlots, step: int) -> list[Columns]:
        micro_batches = real(loader, halted, step)
        for columns in micro_batches:
            for tokens, active in zip(columns["inputs"].tolist(), columns["active"].tolist(), strict=True):
                if active:
                    text = TOKENIZER.decode(tokens)
                    rows.append(text)
        return micro_batches

    monkeypatch.setattr(StreamLoader, "next_batch", offering)

    def taken() -> list[str]:
        found = rows.copy()
        rows.clear()
        return found

    yield taken


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    TOKENIZER.save(tmp_path / "tokenizer")
    return write_corpus(tmp_path / "corpus", texts_of([3] * 25), files=3)


TEXTS = texts_of([3] * 25)


def run(corpus: Path, *words: object, name: str = "b") -> Path:
    bundle = corpus.parent / name
    train(corpus, bundle, *WORDS, "--tokenizer-path", corpus.parent / "tokenizer", *words)
    return bundle


def again(bundle: Path, *words: object) -> None:
    ran = hrm("train", "--bundle-dir", bundle, "--resume", *words)
    assert ran.code == 0, ran.err


def sound(bundle: Path) -> int:
    """Sequences in the ledger of a run, which must hold."""
    with read_ledger(RunDir(bundle).ledger) as ledger:
        assert list(violations(ledger)) == []
        assert ledger.head is not None
        return ledger.head.total_sequences


def test_steps_take_the_first_rows_in_order(corpus: Path, seen: Seen) -> None:
    bundle = run(corpus, "--steps", "3")
    assert seen() == TEXTS[:12]
    again(bundle, "--steps", "5")
    assert seen() == TEXTS[12:20]
    assert sound(bundle) == 20


@pytest.mark.parametrize("words", [(), ("--no-linear-dataset",), ("--no-linear-dataset", "--shuffle-buffer-size", "4")])
@pytest.mark.parametrize("streaming", [(), ("--no-streaming",), ("--cache-gb", "0")])
def test_epochs_take_every_row_once(
    corpus: Path, seen: Seen, words: tuple[str, ...], streaming: tuple[str, ...]
) -> None:
    bundle = run(corpus, "--epochs", "2", "--dataset-chunk-size", "6", "--samples-per-block", "12", *words, *streaming)
    rows = seen()
    for epoch in (rows[:25], rows[25:]):
        assert Counter(epoch) == Counter(TEXTS)
        assert (epoch == TEXTS) == (not words)
    assert sound(bundle) == 50
    if words:
        assert rows[:25] != rows[25:]


def test_steps_end_epochs_and_epochs_end_steps(corpus: Path, seen: Seen) -> None:
    run(corpus, "--epochs", "3", "--steps", "4")
    assert seen() == TEXTS[:16]
    bundle = run(corpus, "--epochs", "1", "--steps", "400", name="c")
    assert seen() == TEXTS
    assert records(bundle)[-1]["step"] == 7


def test_offset_and_limit(corpus: Path, seen: Seen) -> None:
    bundle = run(corpus, "--epochs", "1", "--dataset-start-offset", "5", "--max-train-examples", "9")
    assert seen() == TEXTS[5:14]
    assert sound(bundle) == 9


def test_the_first_epoch_begins_at_a_block_and_a_chunk(corpus: Path, seen: Seen) -> None:
    cut = ("--samples-per-block", "10", "--dataset-chunk-size", "4", "--epochs", "2")
    bundle = run(corpus, *cut, "--start-block-id", "1", "--start-chunk-id", "2")
    assert seen() == [*TEXTS[18:], *TEXTS]
    assert sound(bundle) == 7 + 25
    run(corpus, *cut, "--start-chunk-id", "1", name="c")
    assert seen() == [*TEXTS[4:], *TEXTS]


def test_block_by_block(corpus: Path, seen: Seen) -> None:
    bundle = run(corpus, "--samples-per-block", "10", "--dataset-chunk-size", "4", "--stop-after-block")
    assert seen() == TEXTS[:10]
    again(bundle)
    assert seen() == TEXTS[10:20]
    again(bundle)
    assert seen() == TEXTS[20:]
    again(bundle)
    assert seen() == TEXTS[:10]
    assert records(bundle)[-1]["epoch"] == 1 and sound(bundle) == 35


def test_epoch_by_epoch(corpus: Path, seen: Seen) -> None:
    bundle = run(corpus, "--stop-after-epoch")
    assert seen() == TEXTS
    again(bundle)
    assert seen() == TEXTS and records(bundle)[-1]["epoch"] == 1


def test_epochs_that_are_over_and_one_more(corpus: Path, seen: Seen) -> None:
    bundle = run(corpus, "--epochs", "1")
    seen()
    again(bundle)
    assert seen() == []
    told = [event["message"] for event in records(bundle, "event") if event["level"] == "WARNING"]
    assert any("all epochs of the run are over" in message for message in told)
    again(bundle, "--force-train")
    assert seen() == TEXTS and sound(bundle) == 50


def test_it_iterates_until_it_is_stopped(corpus: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.runs import stop_at

    stop_at(monkeypatch, 17)
    bundle = run(corpus, "--iterate")
    assert seen() == [*TEXTS, *TEXTS, *TEXTS[:12]]
    assert sound(bundle) == 62


def test_only_ascii(corpus: Path, seen: Seen) -> None:
    texts = [f"{n}é" if n % 3 == 0 else f"{n}" * 3 for n in range(1, 20)]
    odd = write_corpus(corpus.parent / "odd", texts)
    bundle = run(odd, "--epochs", "1", "--ascii-only", name="o")
    assert seen() == [text for text in texts if text.isascii()]
    assert records(bundle)[-1]["left_out_rows"] == 6


def test_pairs(corpus: Path, seen: Seen) -> None:
    file = corpus.parent / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"q": f"q{n}?", "a": f"a{n}."}) for n in range(9)))
    pairs = ("--lm-mask", "prefix", "--prompt-column", "q", "--response-column", "a")
    run(file, "--epochs", "1", *pairs, name="p")
    # The last token of a row is a label only.
    assert seen() == [f"q{n}?a{n}." for n in range(9)]


def test_windows_overlap(corpus: Path, seen: Seen) -> None:
    run(corpus, "--epochs", "1", "--packing", "--max-seq-len", "16", "--stride", "8", "--max-train-examples", "12")
    rows = seen()
    assert len(rows) == 9
    whole = "".join(TEXTS[:12])
    # End-of-text marks do not print: a window of 16 tokens prints 13 or 14 letters, and begins inside the one before.
    places = [whole.index(row) for row in rows[:-1]]
    assert places == sorted(places) and all(0 < b - a < len(rows[0]) for a, b in itertools.pairwise(places))


def test_a_split_is_held_out_and_limited(corpus: Path, seen: Seen) -> None:
    bundle = run(corpus, "--epochs", "1", "--val-split", "0002", "--max-val-examples", "3")
    assert seen() == TEXTS[:17]
    assert records(bundle, "eval")[-1]["tokens"] == sum(len(text) for text in TEXTS[17:20])


def test_bad_rows(corpus: Path, seen: Seen) -> None:
    file = corpus / "0001.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], "not json", '{"text": 5}', '{"other": "x"}', *lines[3:]]))
    words = ("--epochs", "1", "--dataset-chunk-size", "10")
    tokenizer = ("--tokenizer-path", corpus.parent / "tokenizer")
    naming = ("0001.jsonl:4", "not JSON")
    refused(
        5,
        "train",
        "--dataset-file",
        corpus,
        "--bundle-dir",
        corpus.parent / "b",
        *WORDS,
        *tokenizer,
        *words,
        naming=naming,
    )
    assert not (corpus.parent / "b").exists()
    seen()
    bundle = run(corpus, *words, "--on-bad-row", "skip")
    assert seen() == TEXTS and sound(bundle) == 25
    assert records(bundle)[-1]["bad_rows"] == 3
    told = [event["message"] for event in records(bundle, "event") if event["level"] == "WARNING"]
    assert any("3 bad rows" in message and "0001.jsonl:4" in message for message in told)


@pytest.mark.parametrize("chunk", [2, 3, 4, 7])
def test_a_run_that_met_a_bad_row_goes_on_without_it(corpus: Path, seen: Seen, chunk: int) -> None:
    """Also where the step that could not be taken had some of its rows already."""
    file = corpus / "0002.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], "not json", *lines[3:]]))
    words = ("--steps", "7", "--dataset-chunk-size", chunk, "--save-every", "0", "--cache-gb", "0")
    start = ("train", "--dataset-file", corpus, "--bundle-dir", corpus.parent / "b", *WORDS, *words, "--tokenizer-path")
    steps = (20 // chunk * chunk) // 4
    naming = ("0002.jsonl", "--on-bad-row skip", f"step {steps} is saved", "--resume")
    refused(5, *start, corpus.parent / "tokenizer", naming=naming)
    assert seen() == TEXTS[: 4 * steps]
    again(corpus.parent / "b", "--on-bad-row", "skip")
    assert seen() == TEXTS[4 * steps :] and sound(corpus.parent / "b") == 25


def test_bad_rows_of_held_out_data_are_told(corpus: Path, seen: Seen) -> None:
    file = corpus / "0002.jsonl"
    file.write_text("not json\n" + file.read_text())
    bundle = run(corpus, "--steps", "1", "--val-split", "0002", "--on-bad-row", "skip")
    told = [event["message"] for event in records(bundle, "event") if event["level"] == "WARNING"]
    assert any("held-out data: 1 bad row" in message for message in told)


def test_a_refused_launch_leaves_the_held_out_data(corpus: Path, seen: Seen) -> None:
    bundle = run(corpus, "--steps", "2", "--val-split", "0002")
    before = records(bundle, "eval")[-1]["tokens"]
    other = corpus.parent / "other.jsonl"
    other.write_text('{"text": "something else"}')
    refused(
        2, "train", "--bundle-dir", bundle, "--resume", "--eval-file", other, "--warmup-steps", "99", naming=("99",)
    )
    again(bundle, "--steps", "3")
    assert records(bundle, "eval")[-1]["tokens"] == before


def test_the_schedule_is_that_of_the_rest(corpus: Path, seen: Seen) -> None:
    words = ("--samples-per-block", "10", "--epochs", "1", "--lr-schedule", "linear", "--lr-min-ratio", "0")
    bundle = run(corpus, *words, "--start-block-id", "1")
    rates = [record["lr"] for record in records(bundle)]
    assert len(rates) == 4 and rates[-1] < 0.3 * rates[0]


def test_a_stream_is_shuffled_within_its_buffer(corpus: Path, seen: Seen) -> None:
    """A compressed file can only be read in its order; that is said, and refused under --strict."""
    file = corpus.parent / "all.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(json.dumps({"text": text}) for text in TEXTS).encode()))
    words = ("--epochs", "1", "--no-linear-dataset", "--dataset-chunk-size", "5", "--shuffle-buffer-size", "10")
    bundle = run(file, *words, name="z")
    rows = seen()
    assert rows != TEXTS and Counter(rows) == Counter(TEXTS)
    assert Counter(rows[:10]) == Counter(TEXTS[:10]) and Counter(rows[10:20]) == Counter(TEXTS[10:20])
    told = [event["message"] for event in records(bundle, "event") if event["level"] == "WARNING"]
    assert any("only be read in its order" in message for message in told)
    tokenizer = ("--tokenizer-path", corpus.parent / "tokenizer")
    strict = (
        "train",
        "--dataset-file",
        file,
        "--bundle-dir",
        corpus.parent / "s",
        *WORDS,
        *tokenizer,
        *words,
        "--strict",
    )
    refused(2, *strict, naming=("--strict", "only be read in its order"))


def test_a_changed_corpus_is_not_gone_on_with(corpus: Path, seen: Seen) -> None:
    bundle = run(corpus, "--steps", "2")
    file = corpus / "0000.jsonl"
    file.write_text(file.read_text().replace("3:xxx", "3:yyy"))
    refused(5, "train", "--bundle-dir", bundle, "--resume", "--steps", "4", naming=("not what the run was trained on",))


def test_a_file_that_vanishes_while_it_is_trained_on(corpus: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    real = StreamLoader.next_batch

    def vanishing(loader: StreamLoader, halted: Any, step: int) -> list[Columns]:
        if step == 2:
            (corpus / "0002.jsonl").unlink(missing_ok=True)
        return real(loader, halted, step)

    monkeypatch.setattr(StreamLoader, "next_batch", vanishing)
    words = ("--epochs", "1", "--steps", "9", "--dataset-chunk-size", "1", "--cache-gb", "0", "--tokenizer-path")
    start = ("train", "--dataset-file", corpus, "--bundle-dir", corpus.parent / "b", *WORDS, *words)
    refused(5, *start, corpus.parent / "tokenizer", naming=("0002.jsonl",))


def test_the_first_puzzles_only(tmp_path: Path) -> None:
    words = ("--batch-size", "4", "--log-every", "1", "--halt-max-steps", "2", "--epochs", "1", *TINY)
    train(puzzle_file(tmp_path), tmp_path / "b", *words, "--max-train-examples", "8", "--supervision", "rollout")
    assert records(tmp_path / "b")[-1]["step"] == 2
