"""Settings of the data: training and evaluation data, tokenizer and sequence form."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from hrm_ray.settings.base import Section, option, refusal
from hrm_ray.settings.hub_name import HubName, hub_name
from hrm_ray.settings.needs import (
    AUTO_VOCABULARY,
    CHUNK_WITHIN_BLOCK,
    EVALUATION,
    FIXED_VOCABULARY,
    HUB_DATA,
    ONE_TEXT_COLUMN,
    OVERLAP,
    OWN_TOKENIZER,
    SHUFFLED,
    TEXT,
    TRAINED_BEFORE,
    WHOLE_TEXTS,
)

DELIMITERS = {"tab": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
"""Words that --delimiter takes for characters."""


def is_text_encoding(name: str) -> bool:
    """Whether Python has a codec for text of this name: such a codec gives back what it has encoded."""
    try:
        return "a\n".encode(name).decode(name) == "a\n"
    except (LookupError, ValueError):
        return False


class DataSettings(Section):
    """Training data, tokenizer, sequence form and evaluation data."""

    dataset_file: str | None = option(
        None,
        "free",
        affects=("rows",),
        replaces=("data.dataset_id", "data.dataset_config"),
        unset="--dataset-id",
        aliases={"--train-file": None},
    )
    """Training data: a file, a folder, a pattern such as "logs/*.jsonl.gz", a cloud address (s3://, gs://, az://),
    or hf://id:config:split. Text: .txt, .md, .csv, .tsv, .json, .jsonl, .parquet or .arrow, also compressed or in
    archives. Puzzles: what `hrm-ray data build` writes."""
    dataset_id: str | None = option(
        None, "free", affects=("rows",), replaces=("data.dataset_file", "data.dataset_config"), unset="--dataset-file"
    )
    """Training data as a data set of the Hugging Face Hub, ORGANISATION/NAME, or a folder with the layout of one."""
    dataset_config: str | None = option(
        None, "fixed", affects=("rows",), needs=(HUB_DATA,), unset="the data set's only one"
    )
    """Configuration of the data set of the Hub, if it has several."""
    split: str = option("train", "fixed", affects=("rows",))
    """Split of a data folder to train on."""
    text_column: str = option("text", "fixed", affects=("rows",), needs=(TEXT, ONE_TEXT_COLUMN))
    """Column of the text."""
    prompt_column: str | None = option(None, "fixed", affects=("rows",), needs=(TEXT,), unset="no column")
    """Column of the prompt, for --lm-mask prefix."""
    response_column: str | None = option(None, "fixed", affects=("rows",), needs=(TEXT,), unset="no column")
    """Column of the response, for --lm-mask prefix."""
    messages_column: str | None = option(None, "fixed", affects=("rows",), needs=(TEXT,), unset="no column")
    """Column of chats, each a list of messages with role and content (or from and value), in .jsonl, .json, .parquet
    or .arrow. They are written as "User: ..." and "Assistant: ...", whatever the tokenizer's chat template; under
    --lm-mask prefix the last message of the assistant is the response, and all before it the prompt."""
    text_rows: Literal["document", "paragraph", "line", "mebibyte"] = option(
        "document", "fixed", affects=("rows",), needs=(TEXT,), legacy_default="mebibyte"
    )
    """What a row of a plain text file is: the whole file (document), a block between blank lines (paragraph), a line
    that is not blank (line), or each MiB of the file (mebibyte, as version 0.1 did)."""
    as_text: str | None = option(None, "fixed", affects=("rows",), needs=(TEXT,), unset="no other files")
    """Files to read as text besides .txt and .md: patterns of names, separated by commas, such as
    "*.py,*.rst,*.html,*.log", also for compressed files and in archives. HTML is read as its text. A pattern without a
    suffix ("*", "README*") takes the files that look like text and are not data by their suffix."""
    encoding: str | None = option(None, "fixed", affects=("rows",), needs=(TEXT,), unset="UTF-8")
    """Encoding of text, .csv, .tsv, .json and .jsonl files without a byte-order mark, such as cp1252 or shift_jis."""
    delimiter: str | None = option(
        None, "fixed", affects=("rows",), needs=(TEXT,), unset="the suffix's own, or the one that the header shows"
    )
    """Delimiter of .csv and .tsv files: one character, or tab, comma, semicolon, pipe or space."""
    tokenizer_path: str | None = option(
        None,
        "fixed",
        affects=("rows",),
        needs=(TEXT,),
        aliases={"--model": None},
        unset="a byte-level BPE trained on the data",
    )
    """Hugging Face tokenizer: a folder, its tokenizer.json, or an id of the Hub."""
    vocab_size: int | None = option(
        None,
        "fixed",
        ge=300,
        needs=(TEXT, OWN_TOKENIZER, FIXED_VOCABULARY),
        unset="chosen from the amount of text and the model's size",
    )
    """Vocabulary size of the byte-level BPE, the 256 bytes and the special tokens included."""
    auto_vocab_size: bool = option(False, "fixed", needs=(TEXT, OWN_TOKENIZER))
    """Choose the vocabulary size from the data: only pairs frequent enough to be learnt are merged; the log says how
    it was chosen."""
    min_vocab_size: int = option(5000, "fixed", ge=300, needs=(TEXT, OWN_TOKENIZER, AUTO_VOCABULARY))
    """Smallest vocabulary that --auto-vocab-size may choose."""
    max_vocab_size: int = option(50000, "fixed", ge=300, needs=(TEXT, OWN_TOKENIZER, AUTO_VOCABULARY))
    """Largest vocabulary that --auto-vocab-size may choose."""
    tokenizer_train_examples: int = option(10000, "fixed", ge=1, needs=(TEXT, OWN_TOKENIZER))
    """Number of documents (rows) to train the byte-level BPE on; at most 16 MiB of their text are used."""
    retrain_tokenizer: bool = option(False, "fixed", needs=(TEXT, OWN_TOKENIZER))
    """Train a new byte-level BPE even if the bundle has one."""
    max_seq_len: int | None = option(
        None,
        "fixed",
        ge=2,
        affects=("memory",),
        aliases={"--seq-len": None},
        unset="128 for text, the puzzle's own length for puzzles",
    )
    """Tokens in a sequence."""
    packing: bool = option(True, "fixed", affects=("memory",), needs=(TEXT,))
    """Pack several documents into a sequence, with end-of-text tokens between them."""
    stride: int | None = option(
        None, "fixed", ge=2, needs=(TEXT, WHOLE_TEXTS, OVERLAP), unset="--max-seq-len, no overlap"
    )
    """Tokens between the starts of two sequences (without packing: of one document); fewer than --max-seq-len makes
    them overlap (labels count once)."""
    streaming: bool = option(True, "free", needs=(TEXT,))
    """Tokenise just in time while training runs; otherwise load and tokenise everything first."""
    cache_gb: float = option(8.0, "free", ge=0, needs=(TEXT,))
    """Gigabytes of tokenised chunks to keep in the bundle, so that later epochs do not tokenise again."""
    linear_dataset: bool = option(True, "fixed")
    """Read the data in order; otherwise shuffle it, by the seed and the epoch."""
    shuffle_buffer_size: int = option(10000, "fixed", ge=1, needs=(TEXT, SHUFFLED))
    """Size of the shuffle buffer in samples, for --no-linear-dataset."""
    samples_per_block: int = option(100000, "fixed", ge=1, affects=("rows",), needs=(TEXT,))
    """Samples (rows of the data) in a block; an epoch finishes one block before it begins another."""
    dataset_chunk_size: int = option(4000, "fixed", ge=1, affects=("rows",), needs=(TEXT, CHUNK_WITHIN_BLOCK))
    """Samples in a chunk, the unit in which data is read, tokenised, packed and entered in the ledger."""
    start_block_id: int | None = option(None, "fixed", ge=0, needs=(TEXT,), unset="the first block")
    """Block that the first epoch begins with, counted from 0."""
    start_chunk_id: int | None = option(None, "fixed", ge=0, needs=(TEXT,), unset="the block's first chunk")
    """Chunk of that block that the first epoch begins with, counted from 0."""
    force_train: bool = option(False, "free", needs=(TRAINED_BEFORE,))
    """On a resumed run: train one more epoch than --epochs, although all chunks have been trained."""
    dataset_start_offset: int = option(0, "fixed", ge=0, affects=("rows",), needs=(TEXT,))
    """Skip this many rows at the start of the data."""
    max_train_examples: int | None = option(None, "fixed", ge=1, affects=("rows",), unset="all rows")
    """Use at most this many rows (or puzzles) of the training data, from its start."""
    max_val_examples: int | None = option(None, "free", ge=1, needs=(EVALUATION,), unset="all rows")
    """Use at most this many rows (or puzzles) of the evaluation data, from its start."""
    ascii_only: bool = option(False, "fixed", affects=("rows",), needs=(TEXT,))
    """Skip rows whose text contains non-ASCII characters."""
    on_bad_row: Literal["fail", "skip"] = option("fail", "free", affects=("rows",), needs=(TEXT,))
    """What to do with a row that cannot be read: end the run (fail), or count it, warn and continue (skip)."""
    eval_file: str | None = option(
        None, "free", replaces=("data.val_split",), unset="no evaluation data", aliases={"--validation-file": None}
    )
    """Evaluation data, named like --dataset-file."""
    val_split: str | None = option(
        None, "free", affects=("rows",), replaces=("data.eval_file",), unset="no evaluation data"
    )
    """Split of the training data's file or data set to evaluate on."""
    eval_batches: int = option(10, "free", ge=1, needs=(EVALUATION,))
    """Maximum number of effective batches in one evaluation; the samples do not depend on the micro-batch size."""

    @field_validator("as_text")
    @classmethod
    def _check_as_text(cls, value: str | None) -> str | None:
        patterns = None if value is None else [each.strip() for each in value.split(",")]
        if patterns is not None and not all(patterns):
            raise refusal("has an empty pattern", 'Give patterns separated by commas, such as "*.py,*.rst"')
        return value if patterns is None else ",".join(patterns)

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, value: str | None) -> str | None:
        if value is not None and not is_text_encoding(value):
            raise refusal(
                "is no encoding that Python knows", "Give a name such as utf-16, cp1252, gb18030 or shift_jis"
            )
        return value

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, value: str | None) -> str | None:
        if value is None:
            return None
        character = DELIMITERS.get(value.lower(), "\t" if value == r"\t" else value)
        if len(character) != 1 or character in '"\r\n\0':
            hint = f"Give one character, or one of the words {', '.join(DELIMITERS)}"
            raise refusal("is not one character", hint)
        return next((word for word, each in DELIMITERS.items() if each == character), character)

    @property
    def training_data(self) -> str | None:
        """The training data as one string; a data set of the Hub as hf://id:config."""
        name = hub_name(self.dataset_file or "") if self.dataset_id is None else HubName(self.dataset_id, None, None)
        if name is None:
            return self.dataset_file
        return str(name._replace(config=name.config or self.dataset_config))
