"""Rows of a corpus, chunk by chunk.

One job: parts -> RawChunk, from any chunk on, each with its catalog entry. A chunk is at most `chunk_size` rows and
about 16 MiB of text, whichever is reached first, and never lies in two blocks; a block is `samples_per_block` rows. It
does not tokenise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from hrm_ray.data.catalog import ChunkEntry, ChunkStart, RowPosition
from hrm_ray.data.parts import Part, TextSource
from hrm_ray.data.readers import read_part
from hrm_ray.data.rows import BadRow, Document, OnBadRow, Row
from hrm_ray.data.streams import ReadingWatch
from hrm_ray.errors import DataError, Fault

PlacedRow: TypeAlias = tuple[Row, RowPosition]
"""A row, and the place after it."""

CHUNK_TEXT_BYTES = 16 << 20
"""A chunk of long documents ends before its number of rows is reached, so that memory stays bounded."""
_SHOWN_FAULTS = 3


@dataclass(frozen=True)
class Corpus:
    """What is read, and how it is cut: rows before `offset` are no part of it, nor are those after `max_rows` of the
    rest. With `ascii_only` rows with other characters are left out and counted; with `on_bad_row` "skip" so are rows
    that cannot be read."""

    source: TextSource
    parts: tuple[Part, ...]
    samples_per_block: int
    chunk_size: int
    offset: int = 0
    max_rows: int | None = None
    ascii_only: bool = False
    on_bad_row: OnBadRow = "fail"

    @property
    def random_access(self) -> bool:
        """Whether reading may begin anywhere without reading what lies before."""
        return all(part.random_access for part in self.parts)


@dataclass(frozen=True)
class RawChunk:
    """A chunk's documents, its entry, what is to be said of rows that were skipped, where the next one begins, the
    first faults of skipped rows, and those of parts that are `broken` off."""

    entry: ChunkEntry
    documents: tuple[Document, ...]
    notes: tuple[str, ...]
    next: ChunkStart
    faults: tuple[Fault, ...] = ()
    broken: tuple[Fault, ...] = ()


FIRST = ChunkStart(0, 0, 0, 0, 0, RowPosition(0, 0))
"""The first chunk of any corpus (rows before the offset are skipped on the way to it)."""


def read_chunks(
    corpus: Corpus, start: ChunkStart = FIRST, rows: Iterable[PlacedRow] | None = None
) -> Iterator[RawChunk]:
    """The chunks from `start` on; none where the corpus ends there. `rows` are those of the corpus from there on,
    where the caller has them. Raises DataError for a bad row, unless such rows are skipped."""
    begun = _Open(corpus, start)
    first_row = start.first_row
    for row, after in corpus_rows(corpus, start) if rows is None else rows:
        if start == FIRST and first_row < corpus.offset:
            first_row += 1
            begun = _Open(corpus, ChunkStart(0, 0, 0, 0, first_row, after))
            continue
        if corpus.max_rows is not None and begun.rows_before - corpus.offset >= corpus.max_rows:
            break
        begun.take(row)
        if begun.is_full:
            chunk = begun.closed(after)
            yield chunk
            begun = _Open(corpus, chunk.next)
    if begun.rows:
        yield begun.closed(RowPosition(len(corpus.parts), 0))


def corpus_rows(corpus: Corpus, start: ChunkStart = FIRST, watch: ReadingWatch | None = None) -> Iterator[PlacedRow]:
    """Every row from `start` on, those before the offset included, and the place after it."""
    place = start.place
    for number in range(place.part, len(corpus.parts)):
        part = corpus.parts[number]
        from_row, mark = (place.row, place.mark) if number == place.part else (0, None)
        for row in read_part(part, corpus.source, from_row, mark, watch=watch):
            # A part that breaks off is over: read from behind its last row, it would break off once more.
            over = isinstance(row, BadRow) and row.ends_part
            yield row, RowPosition(number + 1, 0) if over else RowPosition(number, row.row + 1, row.mark)


class _Open:
    """A chunk that is being read."""

    def __init__(self, corpus: Corpus, start: ChunkStart) -> None:
        self._corpus, self._start = corpus, start
        self._digest = hashlib.blake2b(digest_size=16)
        self._documents: list[Document] = []
        self._faults: list[Fault] = []
        self._broken: list[Fault] = []
        self._left_out = self._text_bytes = self._bad = 0
        self.rows = 0

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
        self.rows += 1
        if isinstance(row, BadRow):
            if self._corpus.on_bad_row == "fail":
                passed_over = "or pass over what cannot be read with --on-bad-row skip"
                raise DataError(replace(row.fault, hint=f"{row.fault.hint}, {passed_over}"))
            self._bad += 1
            if row.ends_part:
                self._broken.append(row.fault)
            else:
                self._faults.append(row.fault)
            del self._faults[_SHOWN_FAULTS:]
            self._digest.update(b"\xff")
            return
        texts = (row.text,) if row.prompt is None or row.response is None else (row.prompt, row.response)
        for text in texts:
            content = text.encode("utf-8")
            self._text_bytes += len(content)
            self._digest.update(len(content).to_bytes(8, "little") + content)
        if self._corpus.ascii_only and not row.text.isascii():
            self._left_out += 1
            return
        self._documents.append(row)

    def closed(self, after: RowPosition) -> RawChunk:
        start, full = self._start, self._block_is_full
        entry = ChunkEntry(
            start, self.rows, self._bad, self._left_out, self._text_bytes, self._digest.hexdigest(), full
        )
        follower = ChunkStart(
            number=start.number + 1,
            block=start.block + full,
            chunk=0 if full else start.chunk + 1,
            block_rows=0 if full else start.block_rows + self.rows,
            first_row=self.rows_before,
            place=after,
        )
        faults, broken = tuple(self._faults), tuple(self._broken)
        return RawChunk(entry, tuple(self._documents), tuple(self._notes()), follower, faults, broken)

    def _notes(self) -> Iterator[str]:
        bad = self._bad - len(self._broken)
        if bad:
            shown = "; ".join(f"{fault.value}: {fault.reason}" for fault in self._faults)
            more = f"; and {bad - len(self._faults)} more" if bad > len(self._faults) else ""
            name = f"block {self._start.block}, chunk {self._start.chunk}"
            yield f"{bad} bad row(s) skipped in {name} ({shown}{more})."
        for fault in self._broken:
            yield f"{fault.value}: {fault.reason}. The rest of it is left out, nobody knows how many rows."


def reread(corpus: Corpus, entries: Sequence[ChunkEntry]) -> Iterator[ChunkEntry]:
    """Each of `entries` (rising) as the corpus gives it now."""
    reading: Iterator[RawChunk] | None = None
    expected = -1
    for entry in entries:
        if reading is None or entry.number != expected:
            reading = read_chunks(corpus, entry.start)
        found = next(reading, None)
        if found is not None:
            yield found.entry
        expected = entry.number + 1
