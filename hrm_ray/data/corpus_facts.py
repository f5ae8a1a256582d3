"""What must be known about a corpus before the first step: that it is usable, its first chunk, the number of sequences
in an epoch, and the held-out documents. Each function reads as little as possible."""

from __future__ import annotations

from dataclasses import dataclass

from hrm_ray.data.chunk_source import Chunk, ChunkPipeline
from hrm_ray.data.chunks import CorpusHead
from hrm_ray.data.packing import RowForm, TextSamples
from hrm_ray.data.text_data import ChunkingConfig
from hrm_ray.data.text_store import TextStore, joined, tokenise
from hrm_ray.data.tokenizer import TextTokenizer
from hrm_ray.errors import DataError, Fault, SettingsError

_OTHER_DATA = "Give data with text in it"
COUNTED_BYTES = 16 << 20
"""A corpus of at most so much text (16 MiB, what one chunk may hold) is tokenised whole to count its sequences; of a
larger one their number is estimated."""


@dataclass(frozen=True)
class Sequences:
    """The number of sequences in an epoch, and in the first epoch, which may start later in the corpus; `estimated` if
    not all of the corpus was tokenised to count them."""

    count: int
    first_epoch: int
    estimated: bool


def check_usable(head: CorpusHead) -> None:
    """Reads to the first document with text. Raises DataError or SettingsError where there is none."""
    rows = left_out = bad = 0
    faults: list[Fault] = []
    for chunk in head:
        if any(document.text for document in chunk.documents):
            return
        rows += chunk.entry.rows
        left_out += chunk.entry.left_out
        bad += chunk.entry.bad
        faults += (*chunk.faults, *chunk.broken, *chunk.passed_over)
    name, offset = str(head.corpus.source.path), head.corpus.offset
    if left_out:
        reason = f"{left_out} of {rows} rows are left out by --ascii-only, and the others contain no text"
        raise DataError(Fault(name, reason, "Leave out --ascii-only, or give other data"))
    if bad:
        reason = f"none of its {rows} rows contains readable text ({faults[0].value}: {faults[0].reason})"
        raise DataError(Fault(name, reason, faults[0].hint))
    if not rows and offset:
        reason = f"{name} has no more rows than that"
        raise SettingsError(Fault(f"--dataset-start-offset {offset}", reason, "Give a smaller offset"))
    raise DataError(Fault(name, "contains no text", _OTHER_DATA))


def first_chunk(pipeline: ChunkPipeline, chunking_config: ChunkingConfig, form: RowForm) -> Chunk:
    """The first chunk with a document that an epoch begins with.

    Raises SettingsError for a start that is not there, or where all of the corpus is shorter than one row; DataError
    where no row can be trained on.
    """
    chunk = _started(pipeline, chunking_config)
    while chunk is not None and not chunk.store.documents:
        chunk = pipeline.get(chunk.entry.number + 1)
    if chunk is None:
        raise DataError(Fault(str(pipeline.corpus.source.path), "no document contains a token", _OTHER_DATA))
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
        raise SettingsError(Fault(f"--max-seq-len {form.seq_len}", reason, hint))
    if form.packing and not form.prefix:
        reason = (
            f"the first chunk, of {chunk.entry.rows} rows, has only {tokens} tokens, so most of a row would be empty"
        )
        hint = "Give a larger --dataset-chunk-size (and --samples-per-block), or a smaller --max-seq-len"
        raise SettingsError(Fault(f"--max-seq-len {form.seq_len}", reason, hint))


def _started(pipeline: ChunkPipeline, chunking_config: ChunkingConfig) -> Chunk | None:
    if chunking_config.start_block is None and chunking_config.start_chunk is None:
        return pipeline.get(0)
    block, chunk = chunking_config.start_block or 0, chunking_config.start_chunk or 0
    entry = pipeline.find(block, chunk)
    if entry is not None:
        return pipeline.get(entry.number)
    of_block = sum(known.start.block == block for known in pipeline.catalog.entries)
    if of_block:
        reason = f"block {block} has {_numbered(of_block, 'chunk')}"
        raise SettingsError(Fault(f"--start-chunk-id {chunk}", reason, _at_most(of_block - 1)))
    blocks = pipeline.catalog.entries[-1].start.block + 1 if len(pipeline.catalog) else 0
    reason = f"the data has {_numbered(blocks, 'block')}"
    raise SettingsError(Fault(f"--start-block-id {block}", reason, _at_most(blocks - 1)))


def _numbered(count: int, what: str) -> str:
    return f"{count} {what}s, numbered from 0" if count > 1 else f"one {what} only, which is number 0"


def _at_most(number: int) -> str:
    return f"Give {number} or less" if number > 0 else "Leave it out"


def count_sequences(
    pipeline: ChunkPipeline, head: CorpusHead, first: Chunk, form: RowForm, *, start: int, all_of_it: bool
) -> Sequences:
    """Sequences of a whole epoch, and of one that begins with chunk `start`.

    They are counted where the corpus is small or `all_of_it` is to be tokenised anyway. Else they are estimated from
    the first chunk and the bytes of text, which are known where the corpus was scanned, and estimated elsewhere.
    """
    if all_of_it or pipeline.corpus.bytes <= COUNTED_BYTES:
        counts: list[int] = []
        text_bytes = 0
        # What is compressed may turn out larger than its files: then the chunks so far were tokenised for the cache.
        while all_of_it or text_bytes <= COUNTED_BYTES:
            chunk = pipeline.get(len(counts))
            if chunk is None:
                return Sequences(sum(counts), sum(counts[start:]), estimated=False)
            counts.append(len(TextSamples(chunk.store, form)))
            text_bytes += chunk.entry.text_bytes
    if pipeline.catalog.ended:
        whole = float(sum(entry.text_bytes for entry in pipeline.catalog.entries))
    else:
        whole = head.estimate_text_bytes()
    before = sum(entry.text_bytes for entry in pipeline.catalog.entries[:start])
    of_first = len(TextSamples(first.store, form)) / max(1, first.entry.text_bytes)
    count, first_epoch = (max(1, round(of_first * text_bytes)) for text_bytes in (whole, whole - before))
    return Sequences(count, first_epoch, estimated=True)


def read_held_out(head: CorpusHead, tokenizer: TextTokenizer, form: RowForm, rows: int) -> tuple[TextStore, list[str]]:
    """The first held-out documents, as many as `rows` sequences take (and a few more, as they come in chunks), and
    warnings about rows that were skipped.

    Raises DataError where none has a token.
    """
    stores: list[TextStore] = []
    notes: list[str] = []
    have = 0
    for chunk in head:
        notes += (f"held-out data: {note}" for note in chunk.notes)
        stores.append(tokenise(chunk.documents, tokenizer, form.prefix))
        # Each store alone has at most one sequence more than its share of the whole.
        have += max(0, len(TextSamples(stores[-1], form)) - 1)
        if have >= rows:
            break
    if not any(store.documents for store in stores):
        reason = "no document contains a token"
        raise DataError(Fault(str(head.corpus.source.path), reason, "Give held-out data with text in it"))
    return joined(stores), notes
