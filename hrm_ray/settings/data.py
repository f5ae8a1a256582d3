"""Settings of the data: where it lies, how text becomes tokens, what is held out.

One job: the leaves of section `data`. Reading is in `hrm_ray.data`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from hrm_ray.settings.base import Section
from hrm_ray.settings.hub_name import HubName, hub_name

OnBadRow: TypeAlias = Literal["fail", "skip"]


class DataSettings(Section):
    """Training data, tokenizer, sequence form and evaluation data."""

    dataset_file: str | None = None
    """The training data: a file, a folder, a pattern such as "logs/*.jsonl.gz", a cloud address (s3://, gs://, az://),
    or hf://id:config:split. Text: .txt, .md, .csv, .tsv, .json, .jsonl, .parquet or .arrow, also compressed or in
    archives; puzzles: as `hrm-ray data build sudoku` writes."""
    dataset_id: str | None = None
    """The training data as a data set of the Hugging Face Hub, ORGANISATION/NAME, or a folder laid out as one."""
    dataset_config: str | None = None
    """Configuration of the data set of the Hub, where it has several."""
    split: str = "train"
    """Which split of a data folder to train on."""
    text_column: str = "text"
    """Column that holds the text."""
    prompt_column: str | None = None
    """Column that holds the prompt, for --lm-mask prefix."""
    response_column: str | None = None
    """Column that holds the response, for --lm-mask prefix."""
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
    """On a resumed run: train one epoch more than --epochs, on chunks that have all been trained already."""
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
    eval_file: str | None = None
    """Held-out data to evaluate on, named as --dataset-file names the training data."""
    val_split: str | None = None
    """Split of the training data's file or data set to evaluate on."""
    eval_batches: int = Field(default=10, ge=1)
    """At most this many effective batches in one evaluation: the same samples however the batch is cut."""

    @property
    def training_data(self) -> str | None:
        """Where the training data lies, in one word; a data set of the Hub as hf://id:config."""
        name = hub_name(self.dataset_file or "") if self.dataset_id is None else HubName(self.dataset_id, None, None)
        if name is None:
            return self.dataset_file
        return str(name._replace(config=name.config or self.dataset_config))
