"""What must be known of a corpus before the first step.

One job: its first chunk, how many sequences an epoch has, and the held-out documents; each reads as little as it can.
It writes nothing but what the pipeline keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from hrm_ray.data.chunk_source import Chunk, ChunkPipeline
from hrm_ray.data.chunks import Corpus, read_chunks
from hrm_ray.data.packing import RowForm, TextSamples
from hrm_ray.data.text_data import ChunkingConfig
from hrm_ray.data.text_store import TextStore, joined, tokenise
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataError, Fault, SettingsError

_OTHER_DATA = "Give data with text in it"
COUNTED_BYTES = 16 << 20
"""A corpus of less text is tokenised whole to count its sequences; of a larger one their number is estimated."""


@dataclass(frozen=True)
class Sequences:
    """How many sequences an epoch has, and the first one, which may begin later in the corpus; `estimated` where not
    all of the corpus was tokenised to find out."""

    count: int
    first_epoch: int
    estimated: bool


def check_usable(corpus: Corpus) -> None:
    """Reads to the first document with text. Raises DataError or SettingsError where there is none."""
    rows = left_out = bad = 0
    faults: list[Fault] = []
    for chunk in read_chunks(corpus):
        if any(document.text for document in chunk.documents):
            return
        rows += chunk.entry.rows
        left_out += chunk.entry.left_out
        bad += chunk.entry.bad
        faults += (*chunk.faults, *chunk.broken)
    name = str(corpus.source.path)
    if left_out:
        reason = f"{left_out} of {rows} rows are left out by --ascii-only, and none of the others has text"
        raise DataError(Fault(name, reason, "Leave out --ascii-only, or give other data"))
    if bad:
        reason = f"none of its {rows} rows has text that can be read ({faults[0].value}: {faults[0].reason})"
        raise DataError(Fault(name, reason, "Mend the data"))
    if not rows and corpus.offset:
        value = f"--dataset-start-offset {corpus.offset}"
        raise SettingsError(Fault(value, f"{name} has no row after so many", "Give a smaller one"))
    raise DataError(Fault(name, "it is empty, there is no text in it", _OTHER_DATA))


def begin_corpus(pipeline: ChunkPipeline, cut: ChunkingConfig, form: RowForm) -> Chunk:
    """The first chunk that an epoch begins with and that has a document.

    Raises SettingsError for a start that is not there, or where all of the corpus is shorter than one row; DataError
    where no row can be trained on.
    """
    chunk = _started(pipeline, cut)
    while chunk is not None and not chunk.store.documents:
        chunk = pipeline.get(chunk.entry.number + 1)
    if chunk is None:
        raise DataError(Fault(str(pipeline.corpus.source.path), "no document has a single token", _OTHER_DATA))
    _check_length(pipeline, chunk, form)
    return chunk


def _check_length(pipeline: ChunkPipeline, chunk: Chunk, form: RowForm) -> None:
    """A first chunk that does not fill one row is all there is, or too small to be packed without waste."""
    tokens = len(chunk.store.tokens)
    if tokens >= form.seq_len or chunk.entry.number:
        return
    if pipeline.get(1) is None:
        reason = f"the data has only {tokens} tokens, not one row of {form.seq_len}"
        hint = f"Give --max-seq-len {tokens} or less, or more data"
        raise SettingsError(Fault(f"max_seq_len {form.seq_len}", reason, hint))
    if form.packing and not form.prefix:
        reason = (
            f"the first chunk, of {chunk.entry.rows} rows, has only {tokens} tokens, so most of a row would be empty"
        )
        hint = "Give a larger --dataset-chunk-size (and --samples-per-block), or a smaller --max-seq-len"
        raise SettingsError(Fault(f"max_seq_len {form.seq_len}", reason, hint))


def _started(pipeline: ChunkPipeline, cut: ChunkingConfig) -> Chunk | None:
    if cut.start_block is None and cut.start_chunk is None:
        return pipeline.get(0)
    block, chunk = cut.start_block or 0, cut.start_chunk or 0
    entry = pipeline.find(block, chunk)
    if entry is not None:
        return pipeline.get(entry.number)
    of_block = sum(known.start.block == block for known in pipeline.catalog.entries)
    if of_block:
        reason = f"block {block} has {of_block} chunks, numbered from 0"
        raise SettingsError(Fault(f"--start-chunk-id {chunk}", reason, f"Give {of_block - 1} or less"))
    blocks = pipeline.catalog.entries[-1].start.block + 1 if len(pipeline.catalog) else 0
    reason = f"the data has {blocks} blocks, numbered from 0"
    raise SettingsError(Fault(f"--start-block-id {block}", reason, f"Give {max(blocks - 1, 0)} or less"))


def count_sequences(pipeline: ChunkPipeline, first: Chunk, form: RowForm, *, start: int, all_of_it: bool) -> Sequences:
    """Sequences of a whole epoch, and of one that begins with chunk `start`.

    They are counted where the corpus is small or `all_of_it` is to be tokenised anyway, else estimated from its bytes
    of text and the first chunk, which means reading all of it once.
    """
    if not all_of_it:
        small = sum(part.bytes for part in pipeline.corpus.parts) <= COUNTED_BYTES
        if small:
            pipeline.scan()
        # What is compressed may be larger than it looked.
        all_of_it = small and _text_bytes(pipeline) <= COUNTED_BYTES
    if all_of_it:
        counts: list[int] = []
        while (chunk := pipeline.get(len(counts))) is not None:
            counts.append(len(TextSamples(chunk.store, form)))
        return Sequences(sum(counts), sum(counts[start:]), estimated=False)
    pipeline.scan()
    of_first = len(TextSamples(first.store, form)) / max(1, first.entry.text_bytes)
    whole, rest = (max(1, round(of_first * _text_bytes(pipeline, begin))) for begin in (0, start))
    return Sequences(whole, rest, estimated=True)


def cached_whole(pipeline: ChunkPipeline) -> bool:
    """Whether all chunks of the corpus lie in the cache, so that a run has nothing to tokenise. Reads one chunk more
    than is known, to see whether there is one."""
    pipeline.read(len(pipeline.catalog))
    return pipeline.catalog.ended and all(pipeline.is_cached(number) for number in range(len(pipeline.catalog)))


def _text_bytes(pipeline: ChunkPipeline, start: int = 0) -> int:
    return sum(entry.text_bytes for entry in pipeline.catalog.entries[start:])


def read_held_out(corpus: Corpus, tokenizer: TextTokenizer, form: RowForm, rows: int) -> tuple[TextStore, list[str]]:
    """The first held-out documents, as many as `rows` sequences take (and a few more, as they come in chunks), and what
    is to be said of rows that were skipped.

    Raises DataError where none has a token.
    """
    stores: list[TextStore] = []
    notes: list[str] = []
    have = 0
    for chunk in read_chunks(corpus):
        notes += (f"held-out data: {note}" for note in chunk.notes)
        stores.append(tokenise(chunk.documents, tokenizer, form.prefix))
        # Each store alone has at most one sequence more than its share of the whole.
        have += max(0, len(TextSamples(stores[-1], form)) - 1)
        if have >= rows:
            break
    if not any(store.documents for store in stores):
        reason = "no document has a single token"
        raise DataError(Fault(str(corpus.source.path), reason, "Give held-out data with text in it"))
    return joined(stores), notes
