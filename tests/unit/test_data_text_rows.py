"""Plain text: what a row is, and documents that are longer than a piece or a chunk."""

from __future__ import annotations

import gzip
import re
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data import chunks
from hrm_ray.data.bpe import train_bpe
from hrm_ray.data.chunks import CorpusHead, RawChunk, read_chunks
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.formats import texts as text_files
from hrm_ray.data.inspection.text import inspect_text
from hrm_ray.data.packing import RowForm, TextSamples
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.rows import Document, OnBadRow, TextRows
from hrm_ray.data.text_store import TextStore, tokenise
from hrm_ray.data.timer import Timer
from hrm_ray.settings.data import DataSettings
from hrm_ray.settings.options import options
from tests.support.corpora import faults_of, rows_of, texts_of, write, write_zip

TOKENIZER = train_bpe(["the cat sat on the mat, 0123456789\n"], 300, 1)
LETTERS = st.text("ab \n\rö🙂", max_size=80)


def corpus_of(path: Path, text_rows: TextRows = "document", on_bad_row: OnBadRow = "fail", **cut: Any) -> Corpus:
    source = TextSource(str(path), text_rows=text_rows)
    sizes = {"samples_per_block": 1000, "chunk_size": 100, **cut}
    return Corpus(source, list_parts(source).parts, on_bad_row=on_bad_row, **sizes)


def ends_of_text(store: TextStore) -> int:
    return int((store.tokens == TOKENIZER.end_of_text_id).sum())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 16 bytes, chunks of 64."""
    monkeypatch.setattr(text_files, "PIECE_BYTES", 16)
    monkeypatch.setattr(chunks, "CHUNK_TEXT_BYTES", 64)


def test_lines_and_paragraphs_are_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffone\r\ntwo\r\n \r\n\r\nthree  \nfour\n\n\n")
    assert texts_of(path, text_rows="line") == ["one", "two", "three  ", "four"]
    assert texts_of(path, text_rows="paragraph") == ["one\r\ntwo", "three  \nfour"]
    assert [row.where for row in rows_of(path, text_rows="line")] == [f"{path}:{line}" for line in (1, 2, 5, 6)]
    assert [row.where for row in rows_of(path, text_rows="paragraph")] == [f"{path}:1", f"{path}:5"]
    zipped = write_zip(tmp_path / "a.zip", {"a.md": b"x\ny", "b.txt": b"", "c.txt.gz": gzip.compress(b"z\n\nz")})
    assert texts_of(zipped, text_rows="line") == ["x", "y", "z", "z"]
    assert texts_of(zipped) == ["x\ny", "", "z\n\nz"]


@settings(max_examples=40, deadline=None)
@given(LETTERS, st.sampled_from([*get_args(TextRows)]))
def test_rows_hold_the_whole_text(text: str, text_rows: TextRows) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "PIECE_BYTES", 16)
        rows = rows_of(write(Path(folder) / "a.txt", text), text_rows=text_rows)
    joined: list[str] = []
    for row in rows:
        assert isinstance(row, Document) and len(row.text.encode()) <= 16
        joined = [*joined[:-1], joined[-1] + row.text] if row.piece else [*joined, row.text]
    lines = text.split("\n")
    if text_rows == "line":
        expected = [line for line in lines if line.strip()]
        assert [line.rstrip("\r") for line in joined] == [line.rstrip("\r") for line in expected]
    elif text_rows == "paragraph":
        blocks = re.split(r"\n(?:\s*\n)+", "\n" + "\n".join(line if line.strip() else "" for line in lines) + "\n\n")
        assert [block.strip("\r\n") for block in joined] == [block.strip("\r\n") for block in blocks if block.strip()]
    else:
        assert "".join(joined) == text and (text_rows == "mebibyte" or len(joined) == 1)


@pytest.mark.usefixtures("small_pieces")
def test_a_long_file_is_one_document_across_pieces_and_chunks(tmp_path: Path) -> None:
    text = "".join(f"the {number}th line\n" for number in range(40))
    write(tmp_path / "c" / "a.txt", text)
    write(tmp_path / "c" / "b.txt", "the last\n")
    corpus = corpus_of(tmp_path / "c")
    found = list(read_chunks(corpus))
    rows = [chunk.entry.rows for chunk in found]
    assert len(found) > 5 and not any(rows[:5]) and sum(rows) == 2
    stores = [tokenise(chunk.documents, TOKENIZER) for chunk in found]
    assert [ends_of_text(store) for store in stores] == rows
    assert "".join(TOKENIZER.decode(store.tokens) for store in stores) == text + "the last\n"
    for chunk in found:
        again = next(read_chunks(corpus, chunk.entry.start))
        assert again.entry == chunk.entry and again.documents == chunk.documents
    # As version 0.1 read it.
    older = list(read_chunks(corpus_of(tmp_path / "c", "mebibyte")))
    assert sum(chunk.entry.rows for chunk in older) == sum(len(chunk.documents) for chunk in found)


@pytest.mark.usefixtures("small_pieces")
def test_every_label_of_a_document_in_pieces_is_there_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "the cat sat on the mat\n" * 12)
    for chunk in read_chunks(corpus_of(path)):
        store = tokenise(chunk.documents, TOKENIZER)
        for form in (RowForm(8), RowForm(8, packing=False), RowForm(8, stride=3)):
            samples = TextSamples(store, form)
            rows = samples.rows(np.arange(len(samples), dtype=np.int64))
            labels = rows["labels"][rows["labels"] != -100]
            assert sorted(labels.tolist()) == sorted(store.tokens[1:].tolist())
            assert (rows["labels"] != -100).any(axis=1).all()


def rows_used(corpus: Corpus) -> list[str]:
    return [document.text for chunk in read_chunks(corpus) for document in chunk.documents]


@pytest.mark.usefixtures("small_pieces")
def test_limits_count_rows_of_the_chosen_kind(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / "c" / f"{name}.txt", "".join(f"{name}{line} and more\n" for line in range(10)))
    lines = rows_used(corpus_of(tmp_path / "c", "line", offset=3, max_rows=15))
    assert [line[:2] for line in lines] == [*(f"a{n}" for n in range(3, 10)), *(f"b{n}" for n in range(8))]
    text = "".join(rows_used(corpus_of(tmp_path / "c", offset=1, max_rows=1)))
    assert text == "".join(f"b{line} and more\n" for line in range(10))
    blocks = [chunk.entry for chunk in read_chunks(corpus_of(tmp_path / "c", samples_per_block=1))]
    assert [entry.start.block for entry in blocks if entry.ends_block] == [0, 1, 2]
    sizes = [chunk.entry.rows for chunk in read_chunks(corpus_of(tmp_path / "c", "line", chunk_size=2))]
    assert sizes == [2] * 15


def notes_of(found: list[RawChunk]) -> list[str]:
    return [note for chunk in found for note in chunk.notes]


def test_a_line_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\ncaf\xe9\nthree\n")
    assert texts_of(path, text_rows="line") == ["one", "<bad>", "three"]
    assert f"{path}:2: byte 7 (0xe9)" in faults_of(path, text_rows="line")[0]
    (chunk,) = read_chunks(corpus_of(path, "line", "skip"))
    assert (chunk.entry.rows, chunk.entry.bad) == (3, 1)
    assert texts_of(path) == ["<bad>"]


@pytest.mark.usefixtures("small_pieces")
def test_a_lost_piece_costs_its_own_text_and_counts_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"first piece...\nsecond \xff....\nthird piece...\nfourth \xff....\nlast\n")
    (chunk,) = read_chunks(corpus_of(path, on_bad_row="skip", max_rows=1))
    assert (chunk.entry.rows, chunk.entry.bad) == (1, 1) and len(notes_of([chunk])) == 1
    store = tokenise(chunk.documents, TOKENIZER)
    # What does not follow on another text is another document.
    assert [document.text.strip() for document in chunk.documents] == ["first piece...", "third piece...", "last"]
    assert store.documents == ends_of_text(store) == 3
    path = write(tmp_path / "b.txt", "first piece...\nsecond \u00f6....\nlast")
    (chunk,) = read_chunks(corpus_of(path, ascii_only=True))
    assert (chunk.entry.rows, chunk.entry.left_out) == (1, 1) and len(chunk.documents) == 2


def test_a_document_cut_in_its_compression_ends_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "PIECE_BYTES", 1 << 10)
    packed = gzip.compress("".join(f"{number**9}\n" for number in range(40_000)).encode())
    write(tmp_path / "c" / "a.txt.gz", packed[: len(packed) // 2])
    write(tmp_path / "c" / "b.txt", "after it\n")
    (chunk,) = read_chunks(corpus_of(tmp_path / "c", on_bad_row="skip"))
    assert (chunk.entry.rows, chunk.entry.bad) == (2, 1) and len(chunk.documents) > 20
    assert ends_of_text(tokenise(chunk.documents, TOKENIZER)) == 2


@pytest.mark.usefixtures("small_pieces")
def test_inspect_and_the_estimate_count_documents(tmp_path: Path) -> None:
    write(tmp_path / "c" / "a.txt", "the cat sat on the mat\n" * 20)
    write(tmp_path / "c" / "b.txt", "mat\n")
    corpus = corpus_of(tmp_path / "c")
    facts = inspect_text(corpus, list_parts(corpus.source), Timer(60.0), tokenizer=TOKENIZER)
    assert (facts.rows.value, facts.rows_read, facts.tokens.tokenised_rows) == (2, 2, 2)
    assert facts.longest is not None and facts.longest.bytes == 460 and len(facts.samples) == 2
    assert facts.tokens.count.value == sum(len(tokenise(c.documents, TOKENIZER).tokens) for c in read_chunks(corpus))
    head = CorpusHead(corpus, lambda _: None)
    assert 380 <= head.estimate_text_bytes() < 600
    lines = corpus_of(tmp_path / "c", "line")
    assert inspect_text(lines, list_parts(lines.source), Timer(60.0)).rows.value == 21


def test_older_runs_keep_their_rows() -> None:
    assert options()["data.text_rows"].traits.legacy_default == "mebibyte"
    assert DataSettings().text_rows == "document"
