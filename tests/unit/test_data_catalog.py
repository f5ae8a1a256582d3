"""The catalog and the cache: what is known of a corpus is true wherever reading begins, and damage is noticed."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data import corpus as corpus_module
from hrm_ray.data.catalog import Catalog, ChunkEntry, check_parts
from hrm_ray.data.chunk_source import ChunkPipeline, EpochOrder, LocalChunks, _Prefetcher
from hrm_ray.data.chunks import read_chunks
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.text_store import ChunkCache, load_store
from hrm_ray.errors import DataError
from hrm_ray.types import StopReason, StopRequested
from tests.support.numbered_corpora import TOKENIZER, texts_of, write_corpus


def corpus_of(path: Path, chunk_size: int = 5, **changes: Any) -> Corpus:
    source = TextSource(str(path))
    return Corpus(source, list_parts(source).parts, changes.pop("samples_per_block", 100), chunk_size, **changes)


def entries_of(corpus: Corpus) -> list[ChunkEntry]:
    return [chunk.entry for chunk in read_chunks(corpus)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.sampled_from(["text", "bad", "other"]), min_size=1, max_size=30),
    files=st.integers(1, 6),
    chunk_size=st.integers(1, 8),
    block=st.integers(1, 20),
    offset=st.integers(0, 6),
)
def test_a_chunk_is_the_same_wherever_reading_begins(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], files: int, chunk_size: int, block: int, offset: int
) -> None:
    """Bad rows, files of other columns (which break off at once) and borders of files at those of chunks included."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = {"text": '{"text": "a"}', "bad": "not json", "other": '{"other": 1}'}
    for number in range(files):
        own = rows[number::files]
        if number % 3 == 2:
            (folder / f"{number}.csv").write_text("other\n" + "1\n" * len(own))
        else:
            (folder / f"{number}.jsonl").write_text("".join(lines[row] + "\n" for row in own))
    corpus = corpus_of(folder, chunk_size, samples_per_block=block, on_bad_row="skip", offset=offset)
    found = entries_of(corpus)
    for entry in found:
        assert next(read_chunks(corpus, entry.start)).entry == entry
    assert [entry.number for entry in found] == list(range(len(found)))


def test_a_file_that_breaks_off_is_told_and_counted(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(json.dumps({"text": f"{n} " * 50}) for n in range(400)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    chunks = list(read_chunks(corpus_of(tmp_path, 50, on_bad_row="skip")))
    told = [note for chunk in chunks for note in chunk.notes]
    assert len(told) == 1 and "a.jsonl.gz" in told[0] and "The rest of this file is skipped" in told[0]
    assert chunks[-1].documents[-1].text == "b"
    for chunk in chunks:
        assert next(read_chunks(corpus_of(tmp_path, 50, on_bad_row="skip"), chunk.entry.start)).entry == chunk.entry


def catalog_of(path: Path, corpus: Corpus) -> list[ChunkEntry]:
    catalog = Catalog(path, writes=True)
    found = entries_of(corpus)
    for entry in found:
        catalog.add(entry)
    catalog.end()
    catalog.close()
    return found


def test_a_catalog_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "catalog.jsonl"
    found = catalog_of(path, corpus_of(write_corpus(tmp_path / "c", texts_of([3] * 23), files=3)))
    again = Catalog(path, writes=False)
    assert list(again.entries) == found and again.ended and again.block_sizes() == [5]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    torn = Catalog(path, writes=True)
    assert len(torn) == 5 or len(torn) == 4
    for entry in found[len(torn) :]:
        torn.add(entry)
    torn.end()
    torn.close()
    assert list(Catalog(path, writes=False).entries) == found


def test_two_writers_do_not_double_a_chunk(tmp_path: Path) -> None:
    path = tmp_path / "catalog.jsonl"
    found = catalog_of(path, corpus_of(write_corpus(tmp_path / "c", texts_of([3] * 23))))
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n{line}\n" for line in lines))
    assert list(Catalog(path, writes=False).entries) == found
    path.write_text("".join(f"{line}\n" for line in [lines[0], *lines[2:]]))
    with pytest.raises(DataError, match="found chunk 2, expected chunk 1"):
        Catalog(path, writes=False)
    path.write_text("not json\n")
    with pytest.raises(DataError, match="not an entry of a catalog"):
        Catalog(path, writes=False)


def test_a_catalog_without_ends_of_chunks_is_read_on(tmp_path: Path) -> None:
    """Version 0.1 wrote none; the last chunk is read again to find where the next one begins."""
    corpus = corpus_of(write_corpus(tmp_path / "c", texts_of([3] * 23), files=3))
    found = catalog_of(tmp_path / "whole.jsonl", corpus)
    lines = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    (tmp_path / "catalog.jsonl").write_text("".join(json.dumps(line[:7]) + "\n" for line in lines[:2]))
    pipeline = pipeline_of(tmp_path, corpus)
    pipeline.scan()
    assert list(pipeline.catalog.entries) == found and pipeline.catalog.entries[1].next is None


def test_other_members_held_out_of_an_archive_are_noticed(tmp_path: Path) -> None:
    (part,) = list_parts(TextSource(str(write_corpus(tmp_path / "c", texts_of([3])) / "0000.jsonl"))).parts
    assert check_parts([part], [part]) == []
    with pytest.raises(DataError, match="held out"):
        check_parts([replace(part, apart="a")], [replace(part, apart="b")])


def pipeline_of(folder: Path, corpus: Corpus, limit_bytes: int = 10**9) -> ChunkPipeline:
    catalog = Catalog(folder / "catalog.jsonl", writes=True)
    return ChunkPipeline(
        corpus, TOKENIZER, catalog, ChunkCache(folder / "chunks", limit_bytes, writes=True), pairs=False
    )


def test_a_damaged_chunk_is_made_anew(tmp_path: Path) -> None:
    corpus = corpus_of(write_corpus(tmp_path / "c", texts_of([3] * 5)))
    first = pipeline_of(tmp_path, corpus).get(0)
    (file,) = (tmp_path / "chunks").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    again = pipeline_of(tmp_path, corpus).get(0)
    assert first is not None and again is not None
    assert first.store.tokens.tolist() == again.store.tokens.tolist()
    assert load_store(file) is not None


def test_a_chunk_that_is_not_awaited_any_more_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop does not wait for the rest of a chunk, and the same pipeline reads it again from its start."""
    corpus = corpus_of(write_corpus(tmp_path / "c", texts_of([3] * 5)))
    (tmp_path / "other").mkdir()
    whole = pipeline_of(tmp_path / "other", corpus).get(0)
    rows, second_row, closing = [], threading.Event(), threading.Event()
    real, close = corpus_module.read_part, _Prefetcher.close

    def paused(*words: Any, **named: Any) -> Iterator[Any]:
        for row in real(*words, **named):
            rows.append(row)
            if len(rows) == 2:
                second_row.set()
                assert closing.wait(60)
            yield row

    def closed(ahead: _Prefetcher) -> None:
        closing.set()
        close(ahead)

    monkeypatch.setattr(corpus_module, "read_part", paused)
    monkeypatch.setattr(_Prefetcher, "close", closed)
    pipeline = pipeline_of(tmp_path, corpus)
    stop = StopReason.SIGTERM
    chunks = LocalChunks(pipeline, EpochOrder(0, shuffled=False), lambda: stop if second_row.is_set() else None)
    with pytest.raises(StopRequested):
        next(chunks.chunks(0, 0))
    assert len(rows) == 2 and len(pipeline.catalog) == 0
    again = pipeline.get(0)
    assert whole is not None and again is not None and again.store.tokens.tolist() == whole.store.tokens.tolist()


def test_a_pipeline_reads_again_after_a_close_that_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(ahead: _Prefetcher) -> None:
        real(ahead)
        raise KeyboardInterrupt

    real = _Prefetcher.close
    monkeypatch.setattr(_Prefetcher, "close", interrupted)
    pipeline = pipeline_of(tmp_path, corpus_of(write_corpus(tmp_path / "c", texts_of([3] * 20))))
    chunks = LocalChunks(pipeline, EpochOrder(0, shuffled=False)).chunks(0, 0)
    next(chunks)
    with pytest.raises(KeyboardInterrupt):
        chunks.close()
    assert pipeline.get(3) is not None


def test_a_full_cache_keeps_what_it_has_and_says_so_once(tmp_path: Path) -> None:
    corpus = corpus_of(write_corpus(tmp_path / "c", texts_of([30] * 25)))
    pipeline = pipeline_of(tmp_path, corpus, limit_bytes=2500)
    chunks = [chunk for number in range(5) if (chunk := pipeline.get(number)) is not None]
    notes = [note for chunk in chunks for note in chunk.notes]
    assert len(chunks) == 5 and len(notes) == 1 and "--cache-gb" in notes[0]
    kept = sum(file.stat().st_size for file in (tmp_path / "chunks").iterdir())
    assert 0 < kept <= 2500
    again = pipeline_of(tmp_path, corpus, limit_bytes=2500)
    assert again.is_cached(0) and not again.is_cached(4)


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    corpus = corpus_of(write_corpus(tmp_path / "c", texts_of([3] * 20)))
    pipeline_of(tmp_path, corpus, limit_bytes=0).scan()
    file = tmp_path / "c" / "0000.jsonl"
    file.write_text(file.read_text().replace("7:xxx", "7:yyy"))
    again = pipeline_of(tmp_path, corpus, limit_bytes=0)
    assert again.get(0) is not None
    with pytest.raises(DataError, match="not what the run was trained on"):
        again.get(1)
