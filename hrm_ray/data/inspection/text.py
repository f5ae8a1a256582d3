"""Inspects a text corpus for a limited time, as training would read it: parts, columns, rows, lengths, tokens, blocks,
chunks, bad rows, and a few samples. Each number is marked exact, estimated or a lower bound."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hrm_ray.data.chunks import CHUNK_TEXT_BYTES, RawChunk, read_chunks
from hrm_ray.data.corpus import Corpus, CorpusReading
from hrm_ray.data.inspection.columns import TableFacts, read_columns
from hrm_ray.data.inspection.figures import Certainty, Figure, Lengths, Spread
from hrm_ray.data.parts import Part, PartList
from hrm_ray.data.readers import known_rows
from hrm_ray.data.rows import Document
from hrm_ray.data.text_store import tokenise
from hrm_ray.data.timer import Timer
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import Fault

BYTES_PER_TOKEN = 4
"""A rule of thumb for English prose and a vocabulary of tens of thousands, where no tokenizer is given."""

_COLUMNS_UNTIL, _ROWS_UNTIL = 0.15, 0.85
"""Shares of the time after which the looking at columns, and the reading of rows, end."""
_TOKENISED_SHARE = 0.3
_TOKENISED_AT_ONCE, _TOKENISED_CHARACTERS = 256, 1 << 18
_SHOWN_FAULTS = 3
_SAMPLE_CHARACTERS = 1000


@dataclass(frozen=True)
class Sample:
    """A row: where it stands, and the beginning of its text (1000 characters); of a pair `text` is the prompt."""

    where: str
    text: str
    response: str | None


@dataclass(frozen=True)
class Longest:
    """The longest row, in bytes, and where it stands."""

    bytes: int
    where: str


@dataclass(frozen=True)
class Tokens:
    """The number of tokens, with an end-of-text token per row, measured on `tokenised_rows`; without a tokenizer that
    is 0, and BYTES_PER_TOKEN gives an estimate."""

    count: Figure
    tokenised_rows: int


@dataclass(frozen=True)
class TextFacts:
    """The result of `inspect_text`.

    `kinds` counts the parts by format and compression; `skipped` counts files (or members) of other kinds. `share` is
    the share of stored bytes that was read (None: unknown), `rows_read` the rows read after the offset; sums and
    spreads are over these rows. `rows` is the number of rows that training takes. `faults` are the first ones of the
    `bad` rows; `breaks` are the faults of the `broken` parts, whose rest cannot be read (each also counts as one bad
    row), `passes` those of files without text data that are `passed_over`. `remarks` say how files are read where that
    is not what their names say.
    """

    path: str
    split: str
    parts: int
    bytes: int
    kinds: dict[str, int]
    skipped: int
    splits: tuple[str, ...] | None
    random_access: bool
    whole: bool
    share: float | None
    table: TableFacts
    rows: Figure
    rows_read: int
    bad: int
    faults: tuple[Fault, ...]
    passed_over: int
    passes: tuple[Fault, ...]
    remarks: tuple[str, ...]
    broken: int
    breaks: tuple[Fault, ...]
    left_out: int
    empty: int
    text_bytes: Figure
    characters: Figure
    row_bytes: Spread | None
    longest: Longest | None
    tokens: Tokens
    blocks: Figure
    chunks: Figure
    samples: tuple[Sample, ...]


def inspect_text(
    corpus: Corpus, found: PartList, timer: Timer, *, tokenizer: TextTokenizer | None = None, samples: int = 3
) -> TextFacts:
    """Reads `corpus`, whose parts are those `found`, until `timer` runs out. Raises DataError for a bad row where those
    are not skipped, UnavailableError where a cloud or the Hub cannot be reached."""
    table = read_columns(corpus.parts, corpus.source, timer.part(_COLUMNS_UNTIL))
    rows_timer = timer.part(_ROWS_UNTIL)
    reading = CorpusReading(corpus, on_read=lambda _: rows_timer.raise_if_up())
    seen = _Totals(corpus, samples, _Tokeniser(tokenizer, corpus.source.pairs, timer))
    for chunk in read_chunks(corpus, rows=reading):
        seen.take(chunk)
    whole = reading.ended or (corpus.max_rows is not None and seen.rows >= corpus.max_rows)
    share = 1.0 if whole else reading.share
    rows = Figure(seen.rows) if whole else _all_rows(corpus, reading, share, timer)
    return TextFacts(
        path=corpus.source.path,
        split=corpus.source.split,
        parts=len(corpus.parts),
        bytes=sum(part.bytes for part in corpus.parts),
        kinds=dict(Counter(map(_kind_name, corpus.parts))),
        skipped=found.skipped,
        splits=found.splits,
        random_access=corpus.random_access,
        whole=whole,
        share=share,
        table=table,
        rows=rows,
        rows_read=seen.rows,
        bad=seen.bad,
        faults=tuple(seen.faults),
        passed_over=seen.passed_over,
        passes=tuple(seen.passes),
        remarks=tuple(seen.remarks),
        broken=seen.broken,
        breaks=tuple(seen.breaks),
        left_out=seen.left_out,
        empty=seen.empty,
        text_bytes=seen.scaled(seen.text_bytes, rows, whole),
        characters=seen.scaled(seen.characters, rows, whole),
        row_bytes=seen.lengths.spread,
        longest=seen.longest,
        tokens=seen.tokens(rows, whole),
        blocks=Figure(-(-rows.value // corpus.samples_per_block), rows.certainty),
        chunks=seen.all_chunks(rows, whole),
        samples=tuple(seen.samples),
    )


def _kind_name(part: Part) -> str:
    kind = part.kind
    if kind is None:
        return "data set of the Hub"
    return kind.form if kind.compression is None else f"{kind.form} in {kind.compression}"


def _all_rows(corpus: Corpus, reading: CorpusReading, share: float | None, timer: Timer) -> Figure:
    """The number of rows that training uses, if not all of them were read. It is exact where the metadata of all parts
    have it and there is time to read those."""
    total = 0
    certainty: Certainty = "exact"
    for part in corpus.parts:
        of_part = None if timer.up else known_rows(part, corpus.source)
        if of_part is None:
            total, certainty = reading.rows_read, "at least"
            if share is not None:
                total, certainty = round(reading.rows_read / share), "about"
            break
        total += of_part
    of_corpus = max(0, total - corpus.offset)
    if corpus.max_rows is not None and corpus.max_rows <= of_corpus and certainty != "about":
        return Figure(corpus.max_rows)
    used = of_corpus if corpus.max_rows is None else min(of_corpus, corpus.max_rows)
    return Figure(used, certainty)


class _Tokeniser:
    """Counts the tokens of as many rows as a share of the time allows."""

    def __init__(self, tokenizer: TextTokenizer | None, pairs: bool, timer: Timer) -> None:
        self._tokenizer, self._pairs, self._timer = tokenizer, pairs, timer
        self._spent_s = 0.0
        self.rows = self.bytes = self.tokens = 0

    def take(self, documents: tuple[Document, ...]) -> None:
        """Tokenises documents, all of them or those that there is time for."""
        rest = list(reversed(documents))
        while rest and self._tokenizer is not None and not self._timer.has_spent(self._spent_s, _TOKENISED_SHARE):
            began_s = self._timer.elapsed_s
            some, size = [rest.pop()], 0
            while rest and len(some) < _TOKENISED_AT_ONCE and size < _TOKENISED_CHARACTERS:
                some.append(rest.pop())
                size += len(some[-1].text)
            self.tokens += len(tokenise(some, self._tokenizer, self._pairs).tokens)
            self.bytes += sum(_byte_length(document.text) for document in some)
            self.rows += sum(not document.continues for document in some)
            self._spent_s += self._timer.elapsed_s - began_s


class _Totals:
    """Sums over the chunks that were read."""

    def __init__(self, corpus: Corpus, samples: int, tokeniser: _Tokeniser) -> None:
        self._corpus, self._wanted, self._tokeniser = corpus, samples, tokeniser
        self.rows = self.bad = self.left_out = self.empty = self.text_bytes = self.characters = self.used = 0
        self._chunks = self._last_rows = self.broken = self.passed_over = self._open_bytes = 0
        self.faults: list[Fault] = []
        self.breaks: list[Fault] = []
        self.passes: list[Fault] = []
        self.remarks: list[str] = []
        self.samples: list[Sample] = []
        self.lengths = Lengths()
        self.longest: Longest | None = None

    def take(self, chunk: RawChunk) -> None:
        self._chunks += 1
        self._last_rows = chunk.entry.rows
        self.rows += chunk.entry.rows
        self.bad += chunk.entry.bad - len(chunk.passed_over)
        self.left_out += chunk.entry.left_out
        self.faults += chunk.faults[: _SHOWN_FAULTS - len(self.faults)]
        self.passed_over += len(chunk.passed_over)
        self.passes += chunk.passed_over[: _SHOWN_FAULTS - len(self.passes)]
        self.remarks += chunk.remarks[: _SHOWN_FAULTS - len(self.remarks)]
        self.broken += len(chunk.broken)
        self.breaks += chunk.broken[: _SHOWN_FAULTS - len(self.breaks)]
        for document in chunk.documents:
            length = _byte_length(document.text)
            self.text_bytes += length
            self.characters += len(document.text)
            self._open_bytes = length = self._open_bytes + length
            if document.continues:
                continue
            self._open_bytes = 0
            self.used += 1
            self.empty += not length
            if self.lengths.add(length):
                self.longest = Longest(length, document.where)
        first = [document for document in chunk.documents if not document.piece]
        for document in first[: self._wanted - len(self.samples)]:
            text = document.text if document.prompt is None else document.prompt
            response = None if document.response is None else document.response[:_SAMPLE_CHARACTERS]
            self.samples.append(Sample(document.where, text[:_SAMPLE_CHARACTERS], response))
        self._tokeniser.take(chunk.documents)

    def scaled(self, of_rows_read: int, rows: Figure, whole: bool) -> Figure:
        """A sum over the rows that were read, as one over all rows."""
        if whole:
            return Figure(of_rows_read)
        if not self.rows:
            return Figure(0, "at least")
        certainty: Certainty = "at least" if rows.certainty == "at least" else "about"
        return Figure(round(of_rows_read * rows.value / self.rows), certainty)

    def tokens(self, rows: Figure, whole: bool) -> Tokens:
        done = self._tokeniser
        if done.rows == self.used and done.rows:
            return Tokens(self.scaled(done.tokens, rows, whole), done.rows)
        per_byte = done.tokens / done.bytes if done.bytes else 1 / BYTES_PER_TOKEN
        tokens = round(self.text_bytes * per_byte)
        count = self.scaled(tokens if done.bytes else tokens + self.used, rows, whole)
        return Tokens(Figure(count.value, "about" if count.certainty == "exact" else count.certainty), done.rows)

    def all_chunks(self, rows: Figure, whole: bool) -> Figure:
        """The number of chunks of all rows, assuming as many rows per chunk as in the chunks that were read
        completely."""
        if whole:
            return Figure(self._chunks)
        size = float(self._corpus.chunk_size)
        if self._chunks > 1:
            size = (self.rows - self._last_rows) / (self._chunks - 1)
        elif self.text_bytes:
            size = max(1.0, min(size, CHUNK_TEXT_BYTES * self.rows / self.text_bytes))
        certainty: Certainty = "at least" if rows.certainty == "at least" else "about"
        return Figure(max(self._chunks, round(-(-rows.value // size))), certainty)


def _byte_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))
