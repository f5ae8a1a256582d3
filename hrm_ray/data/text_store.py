"""A tokenised corpus on disk: flat files that any number of workers map into memory.

One job: write the token stream of a corpus with constant memory, and open it again. Each document is its tokens
followed by the end-of-text token. Rows of a batch are cut in packing.py.

Files (little endian): tokens.bin int32 [T], bytes.bin int32 [T] (UTF-8 bytes each token stands for, 0 for end-of-text),
starts.bin int64 [N+1] (where each document begins; the last entry is T), for pairs prompts.bin int32 [N] (tokens of the
prompt), and meta.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hrm_ray.data.folders import whole_folder
from hrm_ray.data.rows import Document
from hrm_ray.data.tokenizer import Encoded, TextTokenizer
from hrm_ray.errors import DataFault, Fault

FORMAT = 1
META = "meta.json"
_KINDS: dict[str, str] = {"tokens.bin": "<i4", "bytes.bin": "<i4", "starts.bin": "<i8", "prompts.bin": "<i4"}
OWNED = frozenset({META, *_KINDS})

# A batch goes to the tokenizer's threads at once; both bounds keep memory flat for many small and for large documents.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class StoreMeta:
    """meta.json: `documents` and `tokens` (end-of-text included) in the store, `text_bytes` of UTF-8 they stand for,
    `empty_documents` left out because no token was in them, and the `fingerprint` (SHA-256 over content and
    tokenizer)."""

    format: int
    documents: int
    empty_documents: int
    tokens: int
    text_bytes: int
    vocab_size: int
    end_of_text_id: int
    pad_id: int
    pairs: bool
    tokenizer: str
    fingerprint: str


@dataclass(frozen=True)
class TextStore:
    """An opened store: its facts and its files as read-only memory maps (shapes in the module's docstring)."""

    meta: StoreMeta
    tokens: npt.NDArray[np.int32]
    token_bytes: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    prompts: npt.NDArray[np.int32] | None


def write_text_store(
    documents: Iterable[Document], tokenizer: TextTokenizer, folder: Path, pairs: bool = False
) -> StoreMeta:
    """Tokenises `documents` into the store `folder`, replacing an older store there; whole or not at all.

    With `pairs` prompt and response are tokenised apart, so that the border between them lies between two tokens.
    Documents without any token are left out and counted. Raises DataFault where none is left, and what reading the
    documents raises.
    """
    with whole_folder(folder, overwrite=True, owned=OWNED, option="--bundle-dir") as building:
        meta = _Writer(building, tokenizer, pairs).write(documents)
        if not meta.documents:
            raise DataFault(Fault(str(folder.name), "no document has a single token", "Give data with text in it"))
        (building / META).write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")
    return meta


class _Writer:
    """Appends batches of documents to the files and to the fingerprint."""

    def __init__(self, folder: Path, tokenizer: TextTokenizer, pairs: bool) -> None:
        self._folder, self._tokenizer, self._pairs = folder, tokenizer, pairs
        self._digest = hashlib.sha256(f"{FORMAT} {pairs} {tokenizer.fingerprint}".encode())
        self._documents = self._empty = self._tokens = self._bytes = 0

    def write(self, documents: Iterable[Document]) -> StoreMeta:
        names = [name for name in _KINDS if self._pairs or name != "prompts.bin"]
        files: dict[str, BinaryIO] = {name: (self._folder / name).open("wb") for name in names}
        try:
            self._append(files, "starts.bin", [np.zeros(1)])
            for batch in _batches(documents):
                self._write_batch(files, batch)
        finally:
            for file in files.values():
                file.close()
        return StoreMeta(
            format=FORMAT,
            documents=self._documents,
            empty_documents=self._empty,
            tokens=self._tokens,
            text_bytes=self._bytes,
            vocab_size=self._tokenizer.vocab_size,
            end_of_text_id=self._tokenizer.end_of_text_id,
            pad_id=self._tokenizer.pad_id,
            pairs=self._pairs,
            tokenizer=self._tokenizer.fingerprint,
            fingerprint=self._digest.hexdigest(),
        )

    def _write_batch(self, files: dict[str, BinaryIO], batch: list[Document]) -> None:
        parts = self._encode(batch)
        kept = [encoded for encoded in parts if sum(len(part.ids) for part in encoded)]
        self._empty += len(parts) - len(kept)
        if not kept:
            return
        end = Encoded(np.array([self._tokenizer.end_of_text_id], np.int32), np.zeros(1, np.int32))
        pieces = [part for encoded in kept for part in (*encoded, end)]
        self._append(files, "tokens.bin", [piece.ids for piece in pieces])
        self._append(files, "bytes.bin", [piece.bytes for piece in pieces])
        lengths = np.array([sum(len(part.ids) for part in encoded) + 1 for encoded in kept], dtype=np.int64)
        self._append(files, "starts.bin", [self._tokens + np.cumsum(lengths)])
        if self._pairs:
            self._append(files, "prompts.bin", [np.array([len(encoded[0].ids) for encoded in kept])])
        self._documents += len(kept)
        self._tokens += int(lengths.sum())
        self._bytes += sum(int(piece.bytes.sum()) for piece in pieces)

    def _encode(self, batch: list[Document]) -> list[tuple[Encoded, ...]]:
        """Per document its parts: the text, or prompt and response."""
        if not self._pairs:
            return [(encoded,) for encoded in self._tokenizer.encode_documents([document.text for document in batch])]
        prompts = self._tokenizer.encode_documents([document.prompt or "" for document in batch])
        responses = self._tokenizer.encode_documents([document.response or "" for document in batch])
        return list(zip(prompts, responses, strict=True))

    def _append(self, files: dict[str, BinaryIO], name: str, arrays: list[npt.NDArray[Any]]) -> None:
        content = np.concatenate(arrays).astype(_KINDS[name]).tobytes()
        files[name].write(content)
        # Each batch carries the file's name, so that bytes cannot move from one file to another unseen.
        self._digest.update(name.encode() + content)


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


def open_text_store(folder: Path) -> TextStore:
    """Maps the store at `folder`. Raises DataFault where it is missing, of another format, or cut short."""
    mend = "Remove the folder; it is made again by the next run"
    try:
        meta = StoreMeta(**json.loads((folder / META).read_bytes().decode("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataFault(
            Fault(str(folder / META), f"this is no description of a token store ({error})", mend)
        ) from error
    if meta.format != FORMAT:
        raise DataFault(Fault(str(folder / META), f"format {meta.format} is not the one read here ({FORMAT})", mend))
    lengths = {"tokens.bin": meta.tokens, "bytes.bin": meta.tokens, "starts.bin": meta.documents + 1}
    if meta.pairs:
        lengths["prompts.bin"] = meta.documents
    maps: dict[str, npt.NDArray[Any]] = {}
    for name, length in lengths.items():
        path, dtype = folder / name, np.dtype(_KINDS[name])
        size = path.stat().st_size if path.is_file() else 0
        if size != length * dtype.itemsize:
            raise DataFault(Fault(str(path), f"it has {size} bytes and not {length * dtype.itemsize}", mend))
        maps[name] = np.memmap(path, dtype=dtype, mode="r", shape=(length,))
    return TextStore(meta, maps["tokens.bin"], maps["bytes.bin"], maps["starts.bin"], maps.get("prompts.bin"))
