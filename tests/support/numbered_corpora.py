"""Corpora whose every sequence tells which rows it holds, and what an epoch over them must give, reckoned naively."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hrm_ray.data.batch_server import BatchServer, ServedBatches
from hrm_ray.data.batches import LocalBatches
from hrm_ray.data.bpe import train_bpe
from hrm_ray.data.catalog import Catalog
from hrm_ray.data.chunk_source import ChunkPipeline, EpochOrder, LocalChunks
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.packing import RowForm
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.text_store import ChunkCache
from hrm_ray.train.loaders import BatchSize, StopCondition
from hrm_ray.train.stream_loader import StreamLoader, TextStream
from hrm_ray.types import Columns
from tests.support.pickled_calls import PickledCalls

TOKENIZER = train_bpe(["abab abab ba"], 258, 10)
"""Without merges: a token is a byte."""

Row = tuple[int, ...]


def texts_of(lengths: Sequence[int]) -> list[str]:
    """A text for each length (in letters behind its number; below 0 an empty text), no two alike."""
    return [f"{number}:" + "x" * length if length >= 0 else "" for number, length in enumerate(lengths)]


def write_corpus(folder: Path, texts: Sequence[str], files: int = 1) -> Path:
    """The texts as rows of .jsonl files of a new folder, the first files one row longer where they do not divide."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(len(texts)), files)):
        lines = (json.dumps({"text": texts[row]}) + "\n" for row in rows.tolist())
        (folder / f"{number:04d}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Shape:
    """How a corpus is cut and taken."""

    samples_per_block: int = 100
    chunk_size: int = 7
    seq_len: int = 8
    shuffle_rows: int = 0
    seed: int = 0
    offset: int = 0
    max_rows: int | None = None


def chunks_of(texts: Sequence[str], shape: Shape) -> list[list[list[str]]]:
    """Texts by block and chunk."""
    kept = list(texts[shape.offset :])[: shape.max_rows]
    blocks = [kept[at : at + shape.samples_per_block] for at in range(0, len(kept), shape.samples_per_block)]
    size = shape.chunk_size
    return [[block[at : at + size] for at in range(0, len(block), size)] for block in blocks]


def rows_of_chunk(texts: Sequence[str], seq_len: int) -> list[Row]:
    """The packed sequences of a chunk, without what fills up the last one."""
    stream = [token for text in texts if text for token in [*TOKENIZER.encode(text).tolist(), TOKENIZER.end_of_text_id]]
    return [tuple(stream[at : at + seq_len]) for at in range(0, max(0, len(stream) - 1), seq_len)]


def rows_of_corpus(texts: Sequence[str], shape: Shape) -> list[Row]:
    """All sequences of an epoch in the order of the corpus."""
    return [row for block in chunks_of(texts, shape) for chunk in block for row in rows_of_chunk(chunk, shape.seq_len)]


@dataclass
class Opened:
    """Loaders of all ranks over one corpus, stepped together as a run does: each reads for itself, or one server reads
    for all of them (`served`)."""

    corpus: Path
    shape: Shape
    batches: Sequence[BatchSize]
    stop_condition: StopCondition = field(default_factory=StopCondition)
    start: int = 0
    cache_bytes: int = 0
    catalog: Path | None = None
    served: bool = False

    def __post_init__(self) -> None:
        ranks = len(self.batches)
        self.calls = PickledCalls(BatchServer(self.chunks(), ranks), ranks) if self.served else None
        self.loaders = [self._loader(batch) for batch in self.batches]
        self.trained = False

    def chunks(self) -> LocalChunks:
        """The chunks in the order of an epoch."""
        shape, source = self.shape, TextSource(str(self.corpus))
        parts = list_parts(source).parts
        cut = (shape.samples_per_block, shape.chunk_size, shape.offset, shape.max_rows)
        known = self.catalog or self.corpus / "none.catalog"
        pipeline = ChunkPipeline(
            Corpus(source, parts, *cut),
            TOKENIZER,
            Catalog(known, writes=self.catalog is not None),
            ChunkCache(self.corpus / ".chunks", self.cache_bytes, writes=True),
            pairs=False,
        )
        if shape.shuffle_rows:
            pipeline.scan()
        return LocalChunks(pipeline, EpochOrder(shape.seed, shuffled=bool(shape.shuffle_rows), start=self.start))

    def _loader(self, batch: BatchSize) -> StreamLoader:
        shape, calls = self.shape, self.calls
        source = LocalBatches(self.chunks()) if calls is None else ServedBatches(calls, batch.rank)
        text = TextStream(source, RowForm(shape.seq_len), TOKENIZER.pad_id, shape.shuffle_rows)
        return StreamLoader(text, batch, seed=shape.seed, stop_condition=self.stop_condition)

    def step(self) -> list[Row] | None:
        """The rows of the next effective batch, by slot; None when all epochs are over."""
        while True:
            columns = [micro for loader in self.loaders for micro in loader.next_batch([], 0)]
            rows = [row for micro in columns for row in _rows(micro)]
            if rows:
                self.trained = True
                return rows
            if not all([loader.start_epoch(self.trained) for loader in self.loaders]):
                return None

    def steps(self) -> Iterator[list[Row]]:
        """Every effective batch to the end."""
        while (rows := self.step()) is not None:
            yield rows

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()
        if self.calls is not None:
            self.calls.shut_down()


def _rows(columns: Columns) -> Iterator[Row]:
    """The active rows without what fills them up."""
    for tokens, active in zip(columns["inputs"].tolist(), columns["active"].tolist(), strict=True):
        if active:
            length = len(tokens)
            while tokens[length - 1] == TOKENIZER.pad_id:
                length -= 1
            yield tuple(tokens[:length])


def cuts_of(effective: int) -> list[list[BatchSize]]:
    """Some ways to cut an effective batch over ranks and micro-batches."""
    found = []
    for ranks in (1, 2, 3, 4):
        for accumulation in (1, 2):
            if effective % (ranks * accumulation) == 0:
                size = effective // ranks // accumulation
                found.append([BatchSize(size, accumulation, rank, ranks) for rank in range(ranks)])
    return found
