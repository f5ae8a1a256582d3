"""Tokenised documents: arrays in memory, the file that stores them, and a cache of such files, so that a second epoch
does not tokenise again. Each document is its tokens and an end-of-text token; one that goes on in the next store has
none here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hrm_ray.atomic_files import atomic_path
from hrm_ray.data.rows import Document
from hrm_ray.data.tokenizer import Encoded, TextTokenizer, text_slices

FORMAT = "1"

# A batch goes to the tokenizer's threads at once, which need some hundred bytes for each token. Both bounds limit that:
# many small documents, or large ones.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 1 << 18

_HEADER_BYTES = 512
"""What a file is longer than its arrays, at the most."""


@dataclass(frozen=True)
class TextStore:
    """Documents as tokens.

    `tokens` uint16 [T] (int32 for a vocabulary that needs it), `token_bytes` unsigned [T] (UTF-8 bytes each token
    stands for, 0 for end-of-text), `starts` int64 [N+1] (where each document begins; the last entry is T), for pairs
    `prompts` int32 [N] (tokens of the prompt). `pad_id` is what rows are filled up with; `empty_documents` were left
    out because no token was in them.
    """

    tokens: npt.NDArray[Any]
    token_bytes: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]
    prompts: npt.NDArray[np.int32] | None
    pad_id: int
    empty_documents: int

    @property
    def documents(self) -> int:
        """How many documents are in it."""
        return len(self.starts) - 1

    @property
    def memory_bytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.tokens, self.token_bytes, self.starts, self.prompts)
        return sum(array.nbytes for array in arrays if array is not None)


def tokenise(documents: Iterable[Document], tokenizer: TextTokenizer, pairs: bool = False) -> TextStore:
    """The tokens of `documents`, the pieces of one joined; those without any are left out and counted.

    With `pairs` prompt and response are tokenised separately, so that no token spans both.
    """
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    tokens: list[npt.NDArray[Any]] = [np.zeros(0, kind)]
    widths: list[npt.NDArray[Any]] = [np.zeros(0, np.uint8)]
    lengths: list[int] = []
    prompts: list[int] = []
    empty = begun = 0
    end = Encoded(np.array([tokenizer.end_of_text_id], np.int32), np.zeros(1, np.int32))
    for batch in _batches(_divided(documents)):
        pieces: list[Encoded] = []
        for document, parts in zip(batch, _encode(batch, tokenizer, pairs), strict=True):
            pieces += parts
            length = begun + sum(len(part.ids) for part in parts)
            begun = length if document.continues else 0
            if document.continues:
                continue
            if not length:
                empty += 1
                continue
            pieces.append(end)
            lengths.append(length + 1)
            prompts.append(len(parts[0].ids))
        if pieces:
            tokens.append(np.concatenate([piece.ids for piece in pieces]).astype(kind))
            counted = np.concatenate([piece.bytes for piece in pieces])
            widths.append(counted.astype(np.min_scalar_type(int(counted.max(initial=0)))))
    if begun > 1:
        lengths.append(begun)
        prompts.append(begun)
    kept = sum(lengths)  # a single last token would be a document without a label
    stream = np.concatenate(tokens)[:kept]
    # Of a large chunk these are megabytes, held twice no longer than needed.
    tokens.clear()
    return TextStore(
        tokens=stream,
        token_bytes=np.concatenate(widths)[:kept],
        starts=np.concatenate((np.zeros(1, np.int64), np.cumsum(np.array(lengths, dtype=np.int64)))),
        prompts=np.array(prompts, dtype=np.int32) if pairs else None,
        pad_id=tokenizer.pad_id,
        empty_documents=empty,
    )


def _divided(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents, with pieces of a text cut into smaller ones: a piece is longer than a batch may be."""
    for document in documents:
        if not document.piece and not document.continues:
            yield document
            continue
        *parts, last = text_slices(document.text)
        yield from (replace(document, text=part, continues=True) for part in parts)
        yield replace(document, text=last)


def _encode(batch: list[Document], tokenizer: TextTokenizer, pairs: bool) -> list[tuple[Encoded, ...]]:
    """Per document its parts: the text, or prompt and response."""
    if not pairs:
        return [(encoded,) for encoded in tokenizer.encode_documents([document.text for document in batch])]
    prompts = tokenizer.encode_documents([document.prompt or "" for document in batch])
    responses = tokenizer.encode_documents([document.response or "" for document in batch])
    return list(zip(prompts, responses, strict=True))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def joined(stores: Sequence[TextStore]) -> TextStore:
    """Several stores (at least one) concatenated into one."""
    begins = np.cumsum([0, *(len(store.tokens) for store in stores)])
    starts = [store.starts[:-1] + begin for store, begin in zip(stores, begins, strict=False)]
    prompts = [store.prompts for store in stores if store.prompts is not None]
    return TextStore(
        tokens=np.concatenate([store.tokens for store in stores]),
        token_bytes=np.concatenate([store.token_bytes for store in stores]),
        starts=np.concatenate((*starts, begins[-1:])),
        prompts=np.concatenate(prompts) if prompts else None,
        pad_id=stores[0].pad_id,
        empty_documents=sum(store.empty_documents for store in stores),
    )


def save_store(store: TextStore, path: Path) -> None:
    """Write the store as the safetensors file `path`, whole or not at all. Raises OSError where it cannot be."""
    arrays = _arrays(store)
    about = {
        "format": FORMAT,
        "pad_id": str(store.pad_id),
        "empty_documents": str(store.empty_documents),
        "digest": _digest(arrays),
    }
    with atomic_path(path) as temporary:
        # The library makes files that only their owner may read; another user may resume the run.
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary, about)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        temporary.chmod(mode)


def load_store(path: Path) -> TextStore | None:
    """The store in the file `path`; None where the file is missing or damaged."""
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError):
        return None
    if about.get("format") != FORMAT or about.get("digest") != _digest(arrays):
        return None
    return TextStore(
        tokens=arrays["tokens"],
        token_bytes=arrays["token_bytes"],
        starts=arrays["starts"],
        prompts=arrays.get("prompts"),
        pad_id=int(about["pad_id"]),
        empty_documents=int(about["empty_documents"]),
    )


def _arrays(store: TextStore) -> dict[str, npt.NDArray[Any]]:
    arrays = {"tokens": store.tokens, "token_bytes": store.token_bytes, "starts": store.starts}
    return arrays if store.prompts is None else {**arrays, "prompts": store.prompts}


def _digest(arrays: dict[str, npt.NDArray[Any]]) -> str:
    """BLAKE2 over names, types and content."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


class ChunkCache:
    """Token stores in `folder` by key, at most `limit_bytes` of them. One process `writes`, any number read."""

    def __init__(self, folder: Path, limit_bytes: int, *, writes: bool) -> None:
        self._folder, self._limit_bytes, self._writes = folder, limit_bytes, writes
        self._used_bytes: int | None = None
        self.refusal: str | None = None
        """Why the first store that was not kept was not."""

    def load(self, key: str) -> TextStore | None:
        """The store of `key`, None where there is none. A damaged one is deleted, so that it is made again."""
        store = load_store(self._path(key))
        if store is None and self._writes:
            with suppress(OSError):
                self._path(key).unlink()
        return store

    def contains(self, key: str) -> bool:
        """Whether there is a file of `key`."""
        return self._path(key).is_file()

    def add(self, key: str, store: TextStore) -> None:
        """Keep a store if it fits. A full disk costs time in later epochs, and nothing else."""
        if not self._writes or not self._limit_bytes or self.refusal is not None or self.contains(key):
            return
        # Nothing is evicted: an epoch reads every chunk once, so the oldest would go just before it is wanted again.
        used_bytes = self._used()
        if used_bytes + store.memory_bytes + _HEADER_BYTES > self._limit_bytes:
            gigabytes = self._limit_bytes / 1e9
            self.refusal = f"--cache-gb {gigabytes:g} is full, so later chunks are tokenised again in every epoch"
            return
        try:
            self._folder.mkdir(exist_ok=True)
            save_store(store, self._path(key))
            self._used_bytes = used_bytes + self._path(key).stat().st_size
        except OSError as error:
            self.refusal = f"tokenised chunks cannot be kept ({error}), so they are tokenised again in every epoch"

    def _used(self) -> int:
        if self._used_bytes is None:
            files = self._folder.glob("*.safetensors") if self._folder.is_dir() else ()
            self._used_bytes = sum(file.stat().st_size for file in files)
        return self._used_bytes

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"
