"""Settings of the data: where it lies, how text becomes tokens, what is held out.

One job: the leaves of section `data`. Reading is in `hrm_ray.data`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from hrm_ray.settings.base import Section


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
    tokenizer_path: Path | None = None
    """Folder of a Hugging Face tokenizer; without it a byte-level BPE is trained on the data."""
    vocab_size: int = Field(default=16000, ge=300)
    """Vocabulary of the byte-level BPE; the 256 bytes and the special tokens are part of it."""
    tokenizer_train_examples: int = Field(default=10000, ge=1)
    """Documents that the byte-level BPE is trained on."""
    retrain_tokenizer: bool = False
    """Train the byte-level BPE anew although the bundle holds one."""
    max_seq_len: int | None = Field(default=None, ge=2)
    """Tokens in a sequence (if not said: 128 for text, the puzzle's own length for puzzles)."""
    packing: bool = True
    """Pack documents into full sequences with end-of-text marks, instead of one document per row."""
    linear_dataset: bool = True
    """Take the samples in file order; otherwise in an order drawn from the seed and the epoch."""
    eval_file: Path | None = None
    """Held-out data to evaluate on."""
    val_split: str | None = None
    """Split of --dataset-file to evaluate on."""
    eval_batches: int = Field(default=10, ge=1)
    """At most this many effective batches in one evaluation: the same samples however the batch is cut."""
