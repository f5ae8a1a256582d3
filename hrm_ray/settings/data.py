"""Settings of the data: where it lies, how text becomes tokens, what is held out.

One job: the leaves of section `data`. Reading is in `hrm_ray.data`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field

from hrm_ray.settings.base import Section

OnBadRow: TypeAlias = Literal["fail", "skip"]


class DataSettings(Section):
    """Training data, tokenizer, sequence form and evaluation data."""

    dataset_file: Path | None = None
    """The training data: a file or a folder (text: .txt or .jsonl; puzzles: as `hrm-ray data build sudoku` writes)."""
    split: str = "train"
    """Which split of a data folder to train on."""
    text_column: str = "text"
    """Field of a .jsonl record that holds the text."""
    prompt_column: str | None = None
    """Field that holds the prompt, for --lm-mask prefix."""
    response_column: str | None = None
    """Field that holds the response, for --lm-mask prefix."""
    tokenizer_path: str | None = None
    """A Hugging Face tokenizer: a folder, its tokenizer.json, or an id of the Hub; without it a byte-level BPE is
    trained on the data."""
    vocab_size: int = Field(default=16000, ge=300)
    """Vocabulary of the byte-level BPE; the 256 bytes and the special tokens are part of it."""
    auto_vocab_size: bool = False
    """Let the data decide the vocabulary's size: pairs are merged that stand in it often enough to be learnt; the log
    says how."""
    min_vocab_size: int = Field(default=5000, ge=300)
    """Smallest vocabulary that --auto-vocab-size may choose."""
    max_vocab_size: int = Field(default=50000, ge=300)
    """Largest vocabulary that --auto-vocab-size may choose."""
    tokenizer_train_examples: int = Field(default=10000, ge=1)
    """Documents that the byte-level BPE is trained on."""
    retrain_tokenizer: bool = False
    """Train the byte-level BPE anew although the bundle holds one."""
    max_seq_len: int | None = Field(default=None, ge=2)
    """Tokens in a sequence (if not said: 128 for text, the puzzle's own length for puzzles)."""
    packing: bool = True
    """Pack documents into full sequences with end-of-text marks, instead of one document per row."""
    stride: int | None = Field(default=None, ge=2)
    """Tokens between the beginnings of sequences; fewer than --max-seq-len makes them overlap (labels count once)."""
    streaming: bool = True
    """Tokenise just in time while training goes on; otherwise load and tokenise everything first."""
    cache_gb: float = Field(default=8.0, ge=0)
    """Gigabytes of tokenised chunks that are kept in the bundle, so that later epochs need not tokenise again."""
    linear_dataset: bool = True
    """Take the data in its order; otherwise in an order drawn from the seed and the epoch."""
    shuffle_buffer_size: int = Field(default=10000, ge=1)
    """Samples whose sequences are shuffled together, for --no-linear-dataset."""
    samples_per_block: int = Field(default=100000, ge=1)
    """Samples (rows of the data) in a block; an epoch finishes one block before it begins another."""
    dataset_chunk_size: int = Field(default=4000, ge=1)
    """Samples in a chunk, the unit in which data is read, tokenised, packed and accounted for."""
    start_block_id: int | None = Field(default=None, ge=0)
    """Block that the first epoch begins with, counted from 0."""
    start_chunk_id: int | None = Field(default=None, ge=0)
    """Chunk of that block that the first epoch begins with, counted from 0."""
    force_train: bool = False
    """On a resumed run: train all chunks of the present epoch again, those that were trained too."""
    dataset_start_offset: int = Field(default=0, ge=0)
    """Rows at the beginning of the data that are no part of it."""
    max_train_examples: int | None = Field(default=None, ge=1)
    """Use at most this many rows (or puzzles) of the training data, the first ones."""
    max_val_examples: int | None = Field(default=None, ge=1)
    """Use at most this many rows (or puzzles) of the held-out data, the first ones."""
    ascii_only: bool = False
    """Leave out rows whose text has other characters than ASCII."""
    on_bad_row: OnBadRow = "fail"
    """What to do about a row that cannot be read: end the run, or skip it, count it and say so."""
    eval_file: Path | None = None
    """Held-out data to evaluate on."""
    val_split: str | None = None
    """Split of --dataset-file to evaluate on."""
    eval_batches: int = Field(default=10, ge=1)
    """At most this many effective batches in one evaluation: the same samples however the batch is cut."""
