"""Prepares the data once, before workers start: the tokenizer, the first chunk, the held-out documents, and a plan that
says what workers open. Text is read only as far as the first step needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hrm_ray.data.bpe import SizeBounds, train_bpe, train_sized_bpe
from hrm_ray.data.catalog import Catalog, changed, check_parts, touching
from hrm_ray.data.chunk_source import Chunk, ChunkPipeline
from hrm_ray.data.chunks import CorpusHead, reread
from hrm_ray.data.corpus import Corpus, CorpusReading
from hrm_ray.data.corpus_facts import Sequences, check_usable, count_sequences, first_chunk, read_held_out
from hrm_ray.data.file_systems import absolute
from hrm_ray.data.named_tokenizer import load_named
from hrm_ray.data.packing import RowForm
from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.puzzles.format import PuzzleFacts
from hrm_ray.data.puzzles.samples import PuzzleSamples, open_puzzles
from hrm_ray.data.rows import Document
from hrm_ray.data.text_data import ChunkingConfig, TextDataDir, TextPlan, corpus_of
from hrm_ray.data.text_store import TextStore, save_store
from hrm_ray.data.tokenizer import TOKENIZER_FILE, TextTokenizer
from hrm_ray.errors import Fault, ResourceError

_TRIED_DOCUMENTS, _TRIED_CHARACTERS = 5, 2000
_EVAL_CHUNK = 256
"""Held-out documents that are read at once; reading ends with the first chunk that gives enough sequences."""

TokenizerOrigin: TypeAlias = Literal["loaded", "reused", "trained"]


@dataclass(frozen=True)
class PuzzlePlan:
    """The puzzles of a run: where both splits lie, how many of each are used, and what was found there.

    `rows` is the number of puzzles trained on, `fingerprint` that of the whole training set, `held_out_rows` the
    number of puzzles of an evaluation; None in bundles that do not tell it.
    """

    path: str
    split: str
    eval_path: str | None
    eval_split: str | None
    max_train_examples: int | None
    max_val_examples: int | None
    rows: int
    fingerprint: str
    held_out_rows: int | None = None

    def to_plain(self) -> dict[str, Any]:
        """JSON values, as training_args.json holds them."""
        return {"task": "puzzle", **asdict(self), "first_rows": self.rows}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> PuzzlePlan:
        """What `to_plain` gave."""
        return cls(**{field.name: {"held_out_rows": None, **plain}[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer to use: the one called `name` (a path or a Hub id); else the one in the bundle unless `retrain`;
    else a byte-level BPE trained on the first `examples` documents, of `vocab_size`, or of a size within `bounds` that
    is chosen from the data."""

    name: str | None
    vocab_size: int
    examples: int
    retrain: bool
    bounds: SizeBounds | None = None
    is_demand: bool = True
    """Whether the user gave the size: another one is worth a warning then."""


@dataclass(frozen=True)
class PrepareRequest:
    """What else to prepare: `count` the sequences of an epoch, at most `eval_rows` held-out sequences out of at most
    `max_val_examples` documents; `keep_evaluation` keeps the file that the folder has."""

    count: bool = False
    eval_rows: int = 0
    max_val_examples: int | None = None
    keep_evaluation: bool = False


@dataclass(frozen=True)
class PreparedText:
    """The result of prepare_text. `first` is the first chunk that will be trained on, `notes` are warnings to log, and
    `account` says how the vocabulary's size was chosen from the data (to be logged at INFO)."""

    tokenizer: TextTokenizer
    tokenizer_origin: TokenizerOrigin
    plan: TextPlan
    first: Chunk
    sequences: Sequences | None
    evaluation: TextStore | None
    notes: tuple[str, ...]
    account: str | None


@dataclass(frozen=True)
class PreparedPuzzles:
    """The result of prepare_puzzles: facts of both splits, and the plan."""

    train: PuzzleFacts
    evaluation: PuzzleFacts | None
    plan: PuzzlePlan


def prepare_text(
    train: TextSource,
    evaluation: TextSource | None,
    *,
    bundle: Path,
    data: Path,
    choice: TokenizerChoice,
    form: RowForm,
    chunking_config: ChunkingConfig,
    request: PrepareRequest = PrepareRequest(),
    on_read: Callable[[CorpusReading], None] = lambda _: None,
) -> PreparedText:
    """Chooses the tokenizer, saves it in `bundle`, and writes to the folder `data`: parts, catalog, the first chunk,
    and the held-out documents. Where `data` has a catalog already, the corpus must be the same. `on_read` is called
    often while the corpus is read; what it raises propagates.

    Raises SettingsError for paths, columns or a row length that cannot be used, DataError for data that cannot be read
    or has changed.
    """
    notes: list[str] = []
    folder = TextDataDir(data)
    folder.root.mkdir(parents=True, exist_ok=True)
    corpus = corpus_of(chunking_config, train, list_parts(train).parts)
    _check_unchanged(folder, corpus, on_read)
    folder.write_parts(corpus.parts)
    head = CorpusHead(corpus, on_read)
    check_usable(head)
    tokenizer, origin, account = _choose_tokenizer(head, bundle, choice, notes)
    pipeline = folder.pipeline(chunking_config, train, tokenizer, pairs=form.prefix, writes=True, head=head)
    try:
        first = first_chunk(pipeline, chunking_config, form)
        in_order = _prepare_order(pipeline, chunking_config, notes)
        sequences = None
        start = 0 if chunking_config.start_block is None and chunking_config.start_chunk is None else first.entry.number
        streaming = chunking_config.streaming
        if request.count or not streaming:
            sequences = count_sequences(pipeline, head, first, form, start=start, all_of_it=not streaming)
        if not streaming and pipeline.cache.refusal is not None:
            hint = "Give a larger --cache-gb (0 keeps nothing on the disk), or leave out --no-streaming"
            raise ResourceError(Fault("--no-streaming", pipeline.cache.refusal, hint))
        name = held_out = None
        if evaluation is not None:
            name, held_out, skipped = _prepare_held_out(
                folder, evaluation, tokenizer, form, chunking_config, request, on_read
            )
            notes += skipped
    finally:
        pipeline.catalog.close()
    # Last, so that data that cannot be used leaves the bundle's tokenizer as it was.
    if origin != "reused":
        tokenizer.save(bundle)
    notes += pipeline.warnings
    notes.extend(_round_trip_notes(head.documents(), tokenizer))
    plan = TextPlan(chunking_config, form, train, name, start, in_order, pipeline.all_cached)
    return PreparedText(tokenizer, origin, plan, first, sequences, held_out, tuple(notes), account)


def _prepare_order(pipeline: ChunkPipeline, chunking_config: ChunkingConfig, notes: list[str]) -> bool:
    """Whether epochs take the chunks in the order of the corpus. Otherwise all of the corpus is scanned."""
    if not chunking_config.shuffled:
        return True
    if not pipeline.corpus.random_access:
        notes.append(
            "The data can only be read in its order (it is compressed, an archive, a stream or not in UTF-8): "
            f"sequences are shuffled within the buffer of {chunking_config.shuffle_rows} samples, blocks and chunks "
            "are not."
        )
        return True
    # The order of blocks and chunks depends on their number.
    pipeline.scan()
    return False


def evaluation_file(evaluation: TextSource, request: PrepareRequest) -> str:
    """The name of the file of these held-out documents. Other held-out data gets another name, so that a resume that is
    refused later leaves the run's own file unchanged."""
    plain = json.dumps([asdict(evaluation), request.eval_rows, request.max_val_examples])
    return f"eval-{hashlib.blake2b(plain.encode(), digest_size=6).hexdigest()}.safetensors"


def _prepare_held_out(
    folder: TextDataDir,
    evaluation: TextSource,
    tokenizer: TextTokenizer,
    form: RowForm,
    chunking_config: ChunkingConfig,
    request: PrepareRequest,
    on_read: Callable[[CorpusReading], None],
) -> tuple[str, TextStore, list[str]]:
    """The file of the held-out documents, these documents, and warnings about rows that were skipped. They are read
    from the beginning, in small chunks, unless the folder's file is kept."""
    name = evaluation_file(evaluation, request)
    if request.keep_evaluation and folder.evaluation(name).is_file():
        return name, folder.read_evaluation(name), []
    chunking_config = replace(chunking_config, max_train_examples=request.max_val_examples)
    store, skipped = held_out_documents(evaluation, tokenizer, form, chunking_config, request.eval_rows, on_read)
    save_store(store, folder.evaluation(name))
    return name, store, skipped


def held_out_documents(
    evaluation: TextSource,
    tokenizer: TextTokenizer,
    form: RowForm,
    chunking_config: ChunkingConfig,
    rows: int,
    on_read: Callable[[CorpusReading], None] = lambda _: None,
) -> tuple[TextStore, list[str]]:
    """The first held-out documents, enough for so many sequences, and warnings about rows that were skipped. They are
    read from the beginning, in small chunks."""
    chunking_config = replace(
        chunking_config,
        dataset_start_offset=0,
        dataset_chunk_size=min(chunking_config.dataset_chunk_size, _EVAL_CHUNK),
    )
    corpus = corpus_of(chunking_config, evaluation, list_parts(evaluation).parts)
    return read_held_out(CorpusHead(corpus, on_read), tokenizer, form, rows)


def _check_unchanged(folder: TextDataDir, corpus: Corpus, on_read: Callable[[CorpusReading], None]) -> None:
    """Raises DataError where the corpus is not the one that the folder's catalog was made from."""
    if not folder.parts.is_file():
        return
    doubtful = check_parts(folder.read_parts(), corpus.parts)
    entries = touching(Catalog(folder.catalog, writes=False).entries, doubtful, len(corpus.parts))
    found = list(reread(corpus, entries, on_read))
    for known, now in zip(entries, found, strict=False):
        if known != now:
            raise changed(known.name, "it does not hold the rows that it held when it was read first")
    if len(found) < len(entries):
        raise changed(entries[len(found)].name, "its rows are gone")


def _choose_tokenizer(
    head: CorpusHead, bundle: Path, choice: TokenizerChoice, notes: list[str]
) -> tuple[TextTokenizer, TokenizerOrigin, str | None]:
    """The tokenizer, where it comes from, and how its size was chosen from the data (if it was)."""
    if choice.name is not None:
        return load_named(choice.name), "loaded", None
    bounds = choice.bounds
    least, most = (bounds.least, bounds.most) if bounds is not None else (choice.vocab_size, choice.vocab_size)
    asked = f"{least} to {most} were asked for" if bounds is not None else f"--vocab-size {most} was asked for"
    if (bundle / TOKENIZER_FILE).is_file() and not choice.retrain:
        tokenizer = TextTokenizer.load(bundle)
        if choice.is_demand and not least <= tokenizer.vocab_size <= most:
            notes.append(
                f"The bundle's {TOKENIZER_FILE} is used again: it has {tokenizer.vocab_size} tokens, {asked}. "
                "With --retrain-tokenizer a new one is trained."
            )
        return tokenizer, "reused", None
    account: str | None = None
    if bounds is None:
        tokenizer = train_bpe(head.documents(), choice.vocab_size, choice.examples)
    else:
        sized = train_sized_bpe(head.documents, bounds, choice.examples)
        tokenizer, account = sized.tokenizer, sized.account
    if choice.is_demand and tokenizer.vocab_size < least:
        notes.append(f"The data gives a vocabulary of {tokenizer.vocab_size} tokens, {asked}.")
    return tokenizer, "trained", account


def _round_trip_notes(documents: Iterable[Document], tokenizer: TextTokenizer) -> list[str]:
    """A note if encoding and decoding changes the first documents."""
    for document in islice(documents, _TRIED_DOCUMENTS):
        text = document.text[:_TRIED_CHARACTERS]
        if tokenizer.decode(tokenizer.encode(text), keep_marks=True) != text:
            return [
                "The tokenizer does not give the text back as it was (letters, spaces or lines are lost), so bits per "
                "byte come out too low to compare with another tokenizer's."
            ]
    return []


def prepare_puzzles(
    train: TextSource,
    evaluation: TextSource | None,
    *,
    max_train_examples: int | None = None,
    max_val_examples: int | None = None,
) -> PreparedPuzzles:
    """Reads and checks both puzzle sets, of which at most so many puzzles are used, the first ones.

    Raises SettingsError for a path, DataError for data that cannot be used.
    """
    path = absolute(train.path)
    asked = PuzzlePlan(
        path=path,
        split=train.split,
        eval_path=None if evaluation is None else absolute(evaluation.path),
        eval_split=None if evaluation is None else evaluation.split,
        max_train_examples=max_train_examples,
        max_val_examples=max_val_examples,
        rows=0,
        fingerprint=open_puzzles(Path(path), train.split).fingerprint(),
    )
    samples, held_out = open_puzzle_sets(asked)
    plan = replace(asked, rows=len(samples))
    return PreparedPuzzles(samples.facts, held_out.facts if held_out is not None else None, plan)


def open_puzzle_sets(plan: PuzzlePlan) -> tuple[PuzzleSamples, PuzzleSamples | None]:
    """The training and the held-out puzzles of a plan. Raises DataError where they have gone or changed."""
    samples = open_puzzles(Path(plan.path), plan.split)
    used = samples.first(plan.max_train_examples)
    if plan.eval_path is None or plan.eval_split is None:
        return used, None
    held_out = open_puzzles(Path(plan.eval_path), plan.eval_split)
    held_out.fit_to(samples.facts)
    return used, held_out.first(plan.max_val_examples)
