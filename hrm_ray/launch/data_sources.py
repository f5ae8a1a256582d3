"""Turns settings into the sources of training and held-out data, and how they are cut into chunks. Opens nothing."""

from __future__ import annotations

import codecs
from dataclasses import replace

from hrm_ray.data.corpus import Corpus
from hrm_ray.data.parts import Part, TextSource
from hrm_ray.data.text_data import ChunkingConfig, corpus_of
from hrm_ray.settings.data import DELIMITERS
from hrm_ray.settings.hub_name import hub_name
from hrm_ray.settings.tree import RunSettings


def source_of(settings: RunSettings, *, evaluation: bool) -> TextSource:
    """The source of the training data, or of the held-out data."""
    data = settings.data
    path = data.eval_file if evaluation and data.eval_file is not None else data.training_data
    if path is None:
        raise ValueError("the settings name no data")
    split = data.split
    if evaluation:
        split = data.val_split if data.val_split is not None else TextSource(path).split
    name = hub_name(path)
    if name is not None:
        split = split if evaluation and data.val_split is not None else name.split or split
        path = str(name._replace(split=None))
    # Where the training split is the whole folder, the files held out of it are not part of it.
    apart = None if evaluation else data.val_split
    return TextSource(
        path,
        split,
        data.text_column,
        data.prompt_column,
        data.response_column,
        apart,
        text_rows=data.text_rows,
        as_text=data.as_text or "",
        encoding=None if data.encoding is None or codecs.lookup(data.encoding).name == "utf-8" else data.encoding,
        delimiter=DELIMITERS.get(data.delimiter or "", data.delimiter),
        messages_column=data.messages_column,
        messages_in_pairs=settings.model.lm_mask == "prefix",
        strict=settings.cluster.strict,
    )


def has_evaluation(settings: RunSettings) -> bool:
    """Whether held-out data was named."""
    return settings.data.eval_file is not None or settings.data.val_split is not None


def chunking_config(settings: RunSettings) -> ChunkingConfig:
    """How the training data is cut into blocks and chunks, and in which order they are taken."""
    data = settings.data
    return ChunkingConfig(
        samples_per_block=data.samples_per_block,
        dataset_chunk_size=data.dataset_chunk_size,
        dataset_start_offset=data.dataset_start_offset,
        max_train_examples=data.max_train_examples,
        ascii_only=data.ascii_only,
        on_bad_row=data.on_bad_row,
        shuffled=not data.linear_dataset,
        seed=settings.run.seed,
        cache_bytes=round(data.cache_gb * 1e9),
        shuffle_rows=data.shuffle_buffer_size,
        start_block=data.start_block_id,
        start_chunk=data.start_chunk_id,
        streaming=data.streaming,
    )


def corpus_to_read(settings: RunSettings, source: TextSource, parts: tuple[Part, ...], *, evaluation: bool) -> Corpus:
    """The rows of these parts that a run uses; of held-out data that is from its beginning on."""
    corpus = corpus_of(chunking_config(settings), source, parts)
    return replace(corpus, offset=0, max_rows=settings.data.max_val_examples) if evaluation else corpus
