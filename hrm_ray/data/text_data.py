"""The folder in which a run keeps its corpus: parts.jsonl, catalog.jsonl, chunks/ and the held-out documents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hrm_ray.atomic_files import atomic_write
from hrm_ray.data.catalog import Catalog
from hrm_ray.data.chunk_source import ChunkPipeline, EpochOrder
from hrm_ray.data.chunks import CorpusHead
from hrm_ray.data.corpus import Corpus
from hrm_ray.data.packing import RowForm
from hrm_ray.data.parts import Part, TextSource
from hrm_ray.data.rows import OnBadRow
from hrm_ray.data.text_store import ChunkCache, TextStore, load_store
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataError, Fault

CHUNKING_KEY = "cut"
"""The name of `TextPlan.chunking_config` in training_args.json."""
AGAIN = "Delete the bundle's folder data/; it will be rebuilt"


@dataclass(frozen=True)
class ChunkingConfig:
    """How a corpus is cut and in which order it is read; the settings of the same names."""

    samples_per_block: int
    dataset_chunk_size: int
    dataset_start_offset: int
    max_train_examples: int | None
    ascii_only: bool
    on_bad_row: OnBadRow
    shuffled: bool
    seed: int
    cache_bytes: int
    shuffle_rows: int
    start_block: int | None = None
    start_chunk: int | None = None
    streaming: bool = True


@dataclass(frozen=True)
class TextPlan:
    """What a worker needs besides the files of the folder. `evaluation` is the file of held-out documents, `start` the
    number of the chunk that the first epoch begins with; `in_order`: chunks are not shuffled; `kept`: the cache has all
    of them."""

    chunking_config: ChunkingConfig
    form: RowForm
    source: TextSource
    evaluation: str | None
    start: int
    in_order: bool
    kept: bool = False

    @property
    def shuffle_rows(self) -> int:
        """Samples in the shuffle buffer; 0 if nothing is shuffled."""
        return self.chunking_config.shuffle_rows if self.chunking_config.shuffled else 0

    @property
    def epoch_order(self) -> EpochOrder:
        """The order in which epochs take chunks."""
        return EpochOrder(self.chunking_config.seed, shuffled=not self.in_order, start=self.start)

    def plain(self) -> dict[str, Any]:
        """JSON values."""
        plain = asdict(self)
        return {CHUNKING_KEY: plain.pop("chunking_config"), **plain}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TextPlan:
        """What `plain` gave."""
        return cls(
            chunking_config=ChunkingConfig(**plain[CHUNKING_KEY]),
            form=RowForm(**plain["form"]),
            source=TextSource(**plain["source"]),
            evaluation=plain["evaluation"],
            start=plain["start"],
            in_order=plain["in_order"],
            kept=plain["kept"],
        )


@dataclass(frozen=True)
class TextDataDir:
    """The folder `data` of a bundle, for text."""

    root: Path

    @property
    def parts(self) -> Path:
        return self.root / "parts.jsonl"

    @property
    def catalog(self) -> Path:
        return self.root / "catalog.jsonl"

    @property
    def chunks(self) -> Path:
        return self.root / "chunks"

    def evaluation(self, name: str) -> Path:
        """The file of held-out documents of that name."""
        return self.root / name

    def write_parts(self, parts: tuple[Part, ...]) -> None:
        """Write the list of the corpus' parts."""
        with atomic_write(self.parts) as file:
            # In ASCII, since a file's name may be bytes that are no text.
            file.writelines(json.dumps(asdict(part)).encode("ascii") + b"\n" for part in parts)

    def read_parts(self) -> tuple[Part, ...]:
        """The parts as they were written. Raises DataError."""
        try:
            with self.parts.open(encoding="utf-8") as file:
                return tuple(Part(**json.loads(line)) for line in file)
        except (OSError, ValueError, TypeError) as error:
            raise DataError(Fault(str(self.parts), f"not a list of parts ({error})", AGAIN)) from error

    def pipeline(
        self,
        chunking_config: ChunkingConfig,
        source: TextSource,
        tokenizer: TextTokenizer,
        *,
        pairs: bool,
        writes: bool,
        head: CorpusHead | None = None,
    ) -> ChunkPipeline:
        """The pipeline of the corpus' chunks; one process `writes` catalog and cache."""
        return ChunkPipeline(
            corpus_of(chunking_config, source, self.read_parts()),
            tokenizer,
            Catalog(self.catalog, writes=writes),
            ChunkCache(self.chunks, chunking_config.cache_bytes, writes=writes),
            pairs=pairs,
            head=head,
        )

    def read_evaluation(self, name: str) -> TextStore:
        """The held-out documents. Raises DataError where they are gone or damaged."""
        store = load_store(self.evaluation(name))
        if store is None:
            raise DataError(Fault(str(self.evaluation(name)), "missing or damaged", AGAIN))
        return store


def corpus_of(chunking_config: ChunkingConfig, source: TextSource, parts: tuple[Part, ...]) -> Corpus:
    """The corpus of these parts."""
    return Corpus(
        source=source,
        parts=parts,
        samples_per_block=chunking_config.samples_per_block,
        chunk_size=chunking_config.dataset_chunk_size,
        offset=chunking_config.dataset_start_offset,
        max_rows=chunking_config.max_train_examples,
        ascii_only=chunking_config.ascii_only,
        on_bad_row=chunking_config.on_bad_row,
    )
