"""A document of any length costs the memory of its pieces, and a large chunk is not made twice ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hrm_ray.data import text_store
from hrm_ray.data.bpe import train_bpe
from hrm_ray.data.catalog import ChunkEntry, RowPosition
from hrm_ray.data.chunk_source import _AHEAD_BYTES, AHEAD, Chunk, _Prefetcher
from hrm_ray.data.chunks import FIRST
from hrm_ray.data.rows import Document
from hrm_ray.data.text_store import TextStore, load_store, save_store, tokenise
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.types import StopReason, StopRequested

LINES = "".join(f"line {number} of a long document\n" for number in range(20_000))


def pieces_of(text: str, size: int) -> list[Document]:
    cuts = range(0, len(text), size)
    return [
        Document(text[cut : cut + size], "x", 0, piece=number, continues=cut + size < len(text))
        for number, cut in enumerate(cuts)
    ]


def test_a_piece_goes_to_the_tokenizer_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is much longer than its bound, however long a piece is; the tokens are those of the text."""
    tokenizer = train_bpe([LINES[:20_000]], 300, 10)
    batches: list[int] = []
    real = TextTokenizer.encode_documents

    def counted(self: TextTokenizer, texts: list[str]) -> list[object]:
        batches.append(sum(map(len, texts)))
        return real(self, texts)  # type: ignore[return-value]

    monkeypatch.setattr(TextTokenizer, "encode_documents", counted)
    store = tokenise(pieces_of(LINES, 500_000), tokenizer)
    short = tokenise(pieces_of(LINES, 70_000), tokenizer)
    assert max(batches) < text_store._BATCH_CHARACTERS + (1 << 16)
    for each in (store, short):
        assert each.documents == 1 and tokenizer.decode(each.tokens) == LINES
        assert each.token_bytes.sum() == len(LINES)


@pytest.mark.parametrize("size, kind", [(300, np.uint16), (70_000, np.int32)])
def test_tokens_are_as_wide_as_the_vocabulary_needs(size: int, kind: type, tmp_path: Path) -> None:
    tokenizer = train_bpe([LINES[:20_000]], 300, 10)
    tokenizer.vocab_size = size
    store = tokenise([Document("line 7 of it", "x", 0), Document("\n", "x", 1)], tokenizer)
    assert store.tokens.dtype == kind
    save_store(store, tmp_path / "store")
    again = load_store(tmp_path / "store")
    assert again is not None and again.tokens.dtype == kind and again.tokens.tolist() == store.tokens.tolist()
    assert again.starts.tolist() == store.starts.tolist() and again.token_bytes.tolist() == store.token_bytes.tolist()


@pytest.mark.parametrize("size_bytes, ahead", [(_AHEAD_BYTES, 1), (64, AHEAD)])
def test_fewer_large_chunks_are_made_ahead(size_bytes: int, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large ones the next is begun when the one before it was taken, and none is kept here."""
    monkeypatch.setattr(TextStore, "memory_bytes", size_bytes)
    store = tokenise([Document("a text", "x", 0)], train_bpe([LINES[:999]], 300, 10))
    entry = ChunkEntry(FIRST, 1, 0, 0, 6, "", True, RowPosition(1, 0))
    waits, made = threading.Semaphore(0), []

    def items() -> Iterator[Chunk]:
        for number in range(4):
            made.append(number)
            yield Chunk(entry, store, position=number)

    class Watched(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            if threading.current_thread().name == "chunks":
                waits.release()
            return super().wait(timeout)

    monkeypatch.setattr(threading, "Condition", Watched)
    prefetcher = _Prefetcher(items(), lambda: None)
    for taken, chunk in enumerate(prefetcher):
        assert chunk.position == taken
        if taken + ahead < 4:
            while len(made) < taken + 1 + ahead:
                assert waits.acquire(timeout=60)
        assert len(made) <= taken + 1 + ahead
    prefetcher.close()
    assert made == [0, 1, 2, 3]


@pytest.mark.parametrize("reason", [StopReason.RESIZE, StopReason.SIGTERM])
def test_a_wait_for_a_chunk_ends_for_a_stop_and_not_for_a_resize(reason: StopReason) -> None:
    asked = threading.Event()
    store = tokenise([Document("a text", "x", 0)], train_bpe([LINES[:999]], 300, 10))

    def stop() -> StopReason:
        asked.set()
        return reason

    def items() -> Iterator[Chunk]:
        assert asked.wait(60)
        yield Chunk(ChunkEntry(FIRST, 1, 0, 0, 6, "", True, RowPosition(1, 0)), store, position=0)

    prefetcher = _Prefetcher(items(), stop)
    if reason is StopReason.RESIZE:
        assert len(list(prefetcher)) == 1
    else:
        with pytest.raises(StopRequested):
            list(prefetcher)
    prefetcher.close()
