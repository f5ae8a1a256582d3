"""Trains a byte-level BPE on a sample of the documents, with a given vocabulary size or one chosen from the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from hrm_ray.data.rows import Document
from hrm_ray.data.tokenizer import END_OF_TEXT, PAD, TextTokenizer, text_slices
from hrm_ray.errors import DataError, Fault, SettingsError

MARKS = (END_OF_TEXT, PAD)
LEAST_VOCABULARY = 256 + len(MARKS)
"""Tokens of the bytes and the special tokens; all others are merges."""
LONGEST_WORD = 256
"""Characters without a space between them (or of space) that are taken as one word."""
SAMPLE_BYTES = 16 << 20
"""Text to train on at the most (16 MiB, as UTF-8). The trainer keeps every distinct word: of text that hardly repeats
any, such as Chinese, up to a hundred bytes for each byte."""

ENOUGH_COUNTS = 100
LEAST_SAMPLE_COUNTS = 5


@dataclass(frozen=True)
class SizeBounds:
    """The bounds of the vocabulary size, and how much text there is to train on: stored bytes (0 if unknown), and the
    maximum number of documents."""

    least: int
    most: int
    corpus_bytes: int
    corpus_documents: int | None = None


@dataclass(frozen=True)
class SizedBpe:
    """A tokenizer whose size was chosen from the data, and a sentence that says how."""

    tokenizer: TextTokenizer
    account: str


def train_bpe(
    documents: Iterable[str | Document], vocab_size: int, examples: int, least_count: int = 0
) -> TextTokenizer:
    """A byte-level BPE trained on the first `examples` documents, or the first SAMPLE_BYTES of them. The same documents
    give the same file.

    Two tokens are merged while they are adjacent at least `least_count` times. If the data offers fewer merges than
    asked for, the vocabulary is smaller: see `vocab_size` of the result. Raises SettingsError for a vocabulary that
    cannot hold all bytes, DataError for documents without text.
    """
    if vocab_size < LEAST_VOCABULARY:
        reason = f"256 bytes and {len(MARKS)} marks need {LEAST_VOCABULARY}"
        raise SettingsError(
            Fault(f"--vocab-size {vocab_size}", reason, f"Give --vocab-size {LEAST_VOCABULARY} or more")
        )
    backend = Tokenizer(models.BPE())
    # A BPE takes time with the square of a word's length, and cannot be interrupted: no word is longer than this.
    short = pre_tokenizers.Split(Regex(f"\\S{{{LONGEST_WORD}}}|\\s{{{LONGEST_WORD}}}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([short, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=least_count,
        special_tokens=list(MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = _Measured(documents, examples)
    backend.train_from_iterator(iter(sample), trainer=trainer)
    if not sample.bytes:
        raise DataError(Fault("tokenizer", "the documents to train it on contain no text", "Give data with text in it"))
    return TextTokenizer(backend, END_OF_TEXT, PAD)


def train_sized_bpe(read: Callable[[], Iterable[str | Document]], bounds: SizeBounds, examples: int) -> SizedBpe:
    """A byte-level BPE whose size within `bounds` is chosen from the data, trained on the first `examples` documents.

    `read` starts the documents from the first; it is called two or three times. A pair is merged as long as it occurs
    ENOUGH_COUNTS (100) times in all of the text, since a row of the embedding is learned from its occurrences only.
    Gowda and May ("Finding the optimal vocabulary size for neural machine translation", 2020) found that a token needs
    about 100 of them: the largest BPE of which 95 % of the types occur 100 times or more. The 95 % rule is not used
    here, because up to a tenth of a byte-level BPE's tokens are nearly always part of longer ones.

    For a sample of the text the threshold is scaled by the ratio of bytes, but is at least LEAST_SAMPLE_COUNTS (5):
    rarer pairs are chance. Bytes as stored stand for those of the text: compressed text counts as less, which gives a
    smaller vocabulary, and where they are unknown the sample counts as all.

    Merges are learned greedily, the most frequent first, so the vocabulary is the beginning of any larger one. The same
    documents and bounds give the same file. Raises as `train_bpe`.
    """
    sample = _Measured(read(), examples)
    for _ in sample:
        pass
    times = 1.0 if sample.is_all else max(1.0, bounds.corpus_bytes / max(1, sample.bytes))
    if bounds.corpus_documents is not None:
        times = min(times, max(1.0, bounds.corpus_documents / max(1, sample.documents)))
    count = max(LEAST_SAMPLE_COUNTS, math.ceil(ENOUGH_COUNTS / times))
    # Each merge takes at least one token away. The trainer reserves room for all it is asked for, whatever comes.
    tokenizer = train_bpe(read(), min(bounds.most, LEAST_VOCABULARY + sample.bytes), examples, count)
    from_counts = tokenizer.vocab_size
    decided = ""
    if from_counts < bounds.least:
        tokenizer = train_bpe(read(), min(bounds.least, LEAST_VOCABULARY + sample.bytes), examples)
        decided = f"; that gives {from_counts} tokens, --min-vocab-size {bounds.least} asks for more"
    elif from_counts >= bounds.most:
        decided = f"; --max-vocab-size {bounds.most} limits it"
    size = f"{sample.bytes / 1e6:.1f} MB in {sample.documents} document{'' if sample.documents == 1 else 's'}"
    share = f"1/{times:.1f} of it" if times > 1 else "the size of all of it is unknown"
    of_what = f"all of the text ({size})" if sample.is_all else f"a sample of the text ({size}, {share})"
    return SizedBpe(
        tokenizer,
        f"The vocabulary has {tokenizer.vocab_size} tokens, chosen from the data: pairs are merged that occur at "
        f"least {count} times in {of_what}{decided}.",
    )


class _Measured:
    """The first `examples` texts in slices (the trainer splits up to 256 at once, and needs 50 bytes for each byte of
    them), at most SAMPLE_BYTES of them, counted with their UTF-8 bytes; `is_all` says
    whether there were no more."""

    def __init__(self, texts: Iterable[str | Document], examples: int) -> None:
        self._texts, self._examples = texts, examples
        self.documents = 0
        self.bytes = 0
        self.is_all = False

    def __iter__(self) -> Iterator[str]:
        for item in self._texts:
            text, is_first_piece = (item, True) if isinstance(item, str) else (item.text, not item.piece)
            if is_first_piece and self.documents == self._examples:
                return
            self.documents += is_first_piece
            for part in text_slices(text):
                if self.bytes >= SAMPLE_BYTES:
                    return
                self.bytes += len(part.encode("utf-8"))
                yield part
        self.is_all = True
