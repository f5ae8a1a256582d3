"""Cuts the rows of a corpus into chunks, starting at any chunk, each with its catalog entry.

A chunk is at most `chunk_size` rows and about 16 MiB of text, whichever is reached first, and never lies in two blocks;
a block is `samples_per_block` rows. A text that comes in pieces may go on in the next chunk; it counts where it ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from hrm_ray.data.catalog import ChunkEntry, ChunkStart, RowPosition
from hrm_ray.data.corpus import Corpus, CorpusReading, PlacedRow
from hrm_ray.data.rows import BadRow, Document, skippable
from hrm_ray.errors import DataError, Fault

CHUNK_TEXT_BYTES = 16 << 20
"""A chunk of long documents ends before its number of rows is reached, so that memory stays bounded."""
HEAD_BYTES = 64 << 20
"""Text of the first chunks that is kept in memory before a run (64 MiB; the default sample of a tokenizer fits)."""
_SHOWN_FAULTS = 3


@dataclass(frozen=True)
class RawChunk:
    """A chunk's entry, its documents, warnings about rows that were skipped, the first faults of those, and the faults
    of parts that are `broken` off."""

    entry: ChunkEntry
    documents: tuple[Document, ...]
    notes: tuple[str, ...]
    faults: tuple[Fault, ...] = ()
    broken: tuple[Fault, ...] = ()


FIRST = ChunkStart(0, 0, 0, 0, 0, RowPosition(0, 0))
"""The first chunk of any corpus (rows before the offset are skipped on the way to it)."""


def read_chunks(
    corpus: Corpus, start: ChunkStart = FIRST, rows: Iterable[PlacedRow] | None = None
) -> Iterator[RawChunk]:
    """The chunks from `start`; none if the corpus ends there. `rows` may be a reading of the corpus that is already at
    `start`. Raises DataError for a bad row, unless such rows are skipped."""
    begun = _OpenChunk(corpus, start)
    first_row = start.first_row
    for row, after in CorpusReading(corpus, start.place) if rows is None else rows:
        if start == FIRST and first_row < corpus.offset:
            first_row += not row.continues
            begun = _OpenChunk(corpus, ChunkStart(0, 0, 0, 0, first_row, after))
            continue
        if corpus.max_rows is not None and begun.rows_before - corpus.offset >= corpus.max_rows:
            break
        begun.take(row)
        if begun.is_full:
            chunk = begun.closed(after)
            yield chunk
            begun = _OpenChunk(corpus, _next(chunk))
    if begun.taken:
        yield begun.closed(RowPosition(len(corpus.parts), 0))


def _next(chunk: RawChunk) -> ChunkStart:
    start = chunk.entry.next
    if start is None:
        raise RuntimeError("the chunk that was just read has no end")
    return start


class CorpusHead:
    """The chunks of a corpus from its beginning, re-iterable: the first HEAD_BYTES of text are kept, the rest is read
    again."""

    def __init__(self, corpus: Corpus, on_read: Callable[[CorpusReading], None]) -> None:
        self.corpus, self.on_read = corpus, on_read
        self.reading = CorpusReading(corpus, on_read=on_read)
        self._unread = read_chunks(corpus, rows=self.reading)
        self.chunks: list[RawChunk] = []
        """Those that were read and kept."""
        self._kept_bytes = 0

    def __iter__(self) -> Iterator[RawChunk]:
        number = 0
        while number < len(self.chunks) or self._read_one():
            yield self.chunks[number]
            number += 1
        if self._kept_bytes >= HEAD_BYTES:
            start = _next(self.chunks[-1])
            rows = CorpusReading(self.corpus, start.place, self.on_read)
            yield from read_chunks(self.corpus, start, rows)

    def documents(self) -> Iterator[Document]:
        """All documents that can be used, in their order."""
        return (document for chunk in self for document in chunk.documents)

    def estimate_text_bytes(self) -> float:
        """Bytes of text in the corpus, judged by the chunks that were kept and the share of all rows that they are.
        Reads on until that share is known, and to the end of the corpus where it stays unknown."""
        corpus, reading = self.corpus, self.reading
        while (not self.chunks or reading.share is None) and self._read_one():
            pass
        rows = sum(chunk.entry.rows for chunk in self.chunks)
        text_bytes = sum(chunk.entry.text_bytes for chunk in self.chunks)
        if reading.share is not None and not rows and corpus.max_rows is None:
            return text_bytes / reading.share
        if reading.share is None or not rows:
            return sum(chunk.entry.text_bytes for chunk in self)
        usable = reading.rows_read / reading.share - corpus.offset
        return text_bytes / rows * (usable if corpus.max_rows is None else min(usable, corpus.max_rows))

    def _read_one(self) -> bool:
        """Read one more chunk and keep it; False at the end of the corpus or once HEAD_BYTES are kept."""
        chunk = next(self._unread, None) if self._kept_bytes < HEAD_BYTES else None
        if chunk is not None:
            self.chunks.append(chunk)
            self._kept_bytes += chunk.entry.text_bytes
        return chunk is not None


class _OpenChunk:
    """A chunk that is being read."""

    def __init__(self, corpus: Corpus, start: ChunkStart) -> None:
        self._corpus, self._start = corpus, start
        self._digest = hashlib.blake2b(digest_size=16)
        self._documents: list[Document] = []
        self._faults: list[Fault] = []
        self._broken: list[Fault] = []
        self._left_out = self._text_bytes = self._bad = 0
        self._lost = False
        self.rows = 0
        self.taken = False
        """Whether it holds a row, or a piece of one."""

    @property
    def rows_before(self) -> int:
        """Rows of the corpus before the next one that is taken."""
        return self._start.first_row + self.rows

    @property
    def is_full(self) -> bool:
        return self.rows == self._corpus.chunk_size or self._block_is_full or self._text_bytes >= CHUNK_TEXT_BYTES

    @property
    def _block_is_full(self) -> bool:
        return self._start.block_rows + self.rows == self._corpus.samples_per_block

    def take(self, row: Document | BadRow) -> None:
        self.taken = True
        self.rows += not row.continues
        # Of a text in pieces only the first one that is lost counts.
        lost, self._lost = self._lost, self._lost and row.continues
        if isinstance(row, BadRow):
            if self._corpus.on_bad_row == "fail":
                raise DataError(skippable(row.fault))
            self._lose(row)
            self._digest.update(b"\xff")
            if row.ends_part:
                self._bad += 1
                self._broken.append(row.fault)
            elif not lost:
                self._bad += 1
                self._faults.append(row.fault)
                del self._faults[_SHOWN_FAULTS:]
            return
        if row.continues:
            self._digest.update(b"\xfe")
        texts = (row.text,) if row.prompt is None or row.response is None else (row.prompt, row.response)
        for text in texts:
            content = text.encode("utf-8")
            self._text_bytes += len(content)
            self._digest.update(len(content).to_bytes(8, "little") + content)
        if self._corpus.ascii_only and not row.text.isascii():
            self._lose(row)
            self._left_out += not lost
            return
        self._documents.append(row)

    def _lose(self, row: Document | BadRow) -> None:
        """Leave out a row or a piece; the text before it ends there."""
        self._lost = row.continues
        if self._documents and self._documents[-1].continues:
            self._documents[-1] = replace(self._documents[-1], continues=False)

    def closed(self, after: RowPosition) -> RawChunk:
        entry = ChunkEntry(
            self._start,
            self.rows,
            self._bad,
            self._left_out,
            self._text_bytes,
            self._digest.hexdigest(),
            self._block_is_full,
            after,
        )
        return RawChunk(entry, tuple(self._documents), tuple(self._notes()), tuple(self._faults), tuple(self._broken))

    def _notes(self) -> Iterator[str]:
        bad = self._bad - len(self._broken)
        if bad:
            shown = "; ".join(f"{fault.value}: {fault.reason}" for fault in self._faults)
            more = f"; and {bad - len(self._faults)} more" if bad > len(self._faults) else ""
            name = f"block {self._start.block}, chunk {self._start.chunk}"
            yield f"{bad} bad row(s) skipped in {name} ({shown}{more})."
        for fault in self._broken:
            yield f"{fault.value}: {fault.reason}. The rest of this file is skipped; its row count is unknown."


def reread(
    corpus: Corpus, entries: Sequence[ChunkEntry], on_read: Callable[[CorpusReading], None]
) -> Iterator[ChunkEntry]:
    """Each of `entries` (rising) as the corpus gives it now."""
    reading: Iterator[RawChunk] | None = None
    expected = -1
    for entry in entries:
        if reading is None or entry.number != expected:
            reading = read_chunks(corpus, entry.start, CorpusReading(corpus, entry.start.place, on_read))
        found = next(reading, None)
        if found is not None:
            yield found.entry
        expected = entry.number + 1
