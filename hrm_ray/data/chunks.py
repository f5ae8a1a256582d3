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
from hrm_ray.data.rows import BadRow, Document, skippable, unreadable
from hrm_ray.errors import DataError, Fault

CHUNK_TEXT_BYTES = 16 << 20
"""A chunk of long documents ends before its number of rows is reached, so that memory stays bounded."""
HEAD_BYTES = 64 << 20
"""Text of the first chunks that is kept in memory before a run (64 MiB; the default sample of a tokenizer fits)."""
_SHOWN_FAULTS, _REASON_CHARACTERS = 3, 120


@dataclass(frozen=True)
class RawChunk:
    """A chunk's entry, its documents, warnings about rows that were skipped and about how files were read, the
    first faults of those rows, and the faults of parts that are `broken` off and of files that are `passed_over` as
    they hold no text data; `remarks` say how files were read;
    `bad_files` of the other bad rows are whole files."""

    entry: ChunkEntry
    documents: tuple[Document, ...]
    notes: tuple[str, ...]
    faults: tuple[Fault, ...] = ()
    broken: tuple[Fault, ...] = ()
    passed_over: tuple[Fault, ...] = ()
    remarks: tuple[str, ...] = ()
    bad_files: int = 0


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
            # Its text is not kept while the next one is read.
            del chunk
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
        self._passed_over: list[Fault] = []
        self._remarks: dict[str, list[str]] = {}
        self._bad_files = 0
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
            if self._corpus.on_bad_row == "fail" and not row.passed_over:
                raise DataError(skippable(row.fault))
            self._lose(row)
            self._digest.update(b"\xff")
            if row.passed_over:
                self._bad += 1
                self._passed_over.append(row.fault)
            elif row.ends_part and not row.whole_file:
                self._bad += 1
                self._broken.append(row.fault)
            elif not lost:
                self._bad += 1
                self._bad_files += row.whole_file
                self._faults.append(row.fault)
                del self._faults[_SHOWN_FAULTS:]
            return
        if row.remark:
            self._remarks.setdefault(row.remark, []).append(row.where)
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
        return RawChunk(
            entry,
            tuple(self._documents),
            tuple(self._notes()),
            tuple(self._faults),
            tuple(self._broken),
            tuple(self._passed_over),
            tuple(self._remark_notes()),
            self._bad_files,
        )

    def _notes(self) -> Iterator[str]:
        name = f"block {self._start.block}, chunk {self._start.chunk}"
        bad = self._bad - len(self._broken) - len(self._passed_over)
        if bad:
            shown = first_faults(self._faults, bad)
            yield f"{unreadable(bad, self._bad_files, 'bad ')} skipped in {name} ({shown})."
        for fault in self._broken[:_SHOWN_FAULTS]:
            yield f"{fault.value}: {fault.reason}. The rest of this file is skipped; its row count is unknown."
        if len(self._broken) > _SHOWN_FAULTS:
            yield f"{counted(len(self._broken) - _SHOWN_FAULTS, 'more file')} broken off in {name}."
        if self._passed_over:
            yield passed_over_note(self._passed_over)
        yield from self._remark_notes()

    def _remark_notes(self) -> Iterator[str]:
        for remark, places in self._remarks.items():
            more = f" and {len(places) - _SHOWN_FAULTS:,} more" if len(places) > _SHOWN_FAULTS else ""
            yield f"{', '.join(places[:_SHOWN_FAULTS])}{more}: {remark}."


def counted(count: int, what: str) -> str:
    """A count with its noun, such as "1,200 bad rows"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def passed_over_note(faults: Sequence[Fault]) -> str:
    """The warning about files that hold no text data; the first three are named."""
    shown = first_faults(faults, len(faults))
    return f"passed over {counted(len(faults), 'file')} without text data ({shown})."


def first_faults(faults: Sequence[Fault], count: int) -> str:
    """The first of `count` faults, each briefly, and the number of the others."""
    shown = "; ".join(f"{fault.value}: {_brief(fault.reason)}" for fault in faults[:_SHOWN_FAULTS])
    rest = count - len(faults[:_SHOWN_FAULTS])
    return f"{shown}; and {rest:,} more" if rest else shown


def _brief(reason: str) -> str:
    return reason if len(reason) <= _REASON_CHARACTERS else f"{reason[: _REASON_CHARACTERS - 3]}..."


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
