"""Text to tokens and back: a fast Hugging Face tokenizer with an end-of-text and a padding token.

Special tokens that happen to be written in a document are encoded as plain text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, pre_tokenizers

from hrm_ray.atomic_files import atomic_write
from hrm_ray.errors import DataError, Fault, SettingsError, UnavailableError
from hrm_ray.regular_files import special_file

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
VOCABULARIES = frozenset(
    {TOKENIZER_FILE, "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"}
    | {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}
)
"""Files of a tokenizer that hold its vocabulary, or a part of it."""
_SLICE_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Encoded:
    """One document: `ids` int32 [T], and `bytes` int32 [T], the UTF-8 bytes of the text that each token stands for
    (their sum is the document's length in bytes; where a tokenizer that is not byte-level splits one character over
    tokens, the first counts all its bytes)."""

    ids: npt.NDArray[np.int32]
    bytes: npt.NDArray[np.int32]


class TextTokenizer:
    """A `tokenizers.Tokenizer` with its end-of-text and padding ids."""

    def __init__(self, backend: Tokenizer, end_of_text: str, pad: str | None) -> None:
        """`end_of_text` and `pad` are tokens of `backend`; without `pad` the end-of-text token pads (padding is never
        a label)."""
        # Truncation and padding may be set in a tokenizer.json; either would lose text silently.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._end_of_text, self._pad = end_of_text, pad
        self.end_of_text_id: int = _id_of(backend, end_of_text)
        self.pad_id: int = self.end_of_text_id if pad is None else _id_of(backend, pad)
        # Ids may have gaps, and an embedding needs a row for the highest one.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._widths = _widths(backend, self.vocab_size)

    @property
    def backend(self) -> Tokenizer:
        """The library's own object."""
        return self._backend

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which ids a text gets."""
        content = f"{self._end_of_text}\0{self._pad}\0{self._backend.to_str()}"
        return hashlib.sha256(content.encode("utf-8")).hexdigest()

    def encode_documents(self, texts: Sequence[str]) -> list[Encoded]:
        """Each text's tokens, without any mark added. A text of which the tokenizer keeps nothing gives empty
        arrays."""
        if self._widths is not None:
            found = self._of_widths(texts, self._widths)
            if found is not None:
                return found
            self._widths = None
        return [self._without_end(text, encoded) for text, encoded in zip(texts, self._encode(texts), strict=True)]

    def _of_widths(self, texts: Sequence[str], widths: npt.NDArray[np.int32]) -> list[Encoded] | None:
        """The same without the tokens' offsets in the text, which take time; None where the tokens' bytes do not add up
        to a text's, so that the vocabulary is not byte-level after all."""
        found = []
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            counted = widths[ids]
            if int(counted.sum()) != (len(text) if text.isascii() else len(text.encode("utf-8"))):
                return None
            found.append(self._without_end(text, Encoded(ids, counted)))
        return found

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """The ids of one text, int32 [T]."""
        return self.encode_documents([text])[0].ids

    def decode(self, ids: Sequence[int] | npt.NDArray[Any], keep_marks: bool = False) -> str:
        """The text of `ids`; end-of-text, padding and other marks are left out unless `keep_marks`. Bytes that form no
        character become U+FFFD."""
        text: str = self._backend.decode([int(token) for token in ids], skip_special_tokens=not keep_marks)
        return text

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json (which names the marks; Transformers reads both)."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._end_of_text, "pad_token": self._pad}
        with atomic_write(folder / CONFIG_FILE) as file:
            file.write(json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")
        with atomic_write(folder / TOKENIZER_FILE) as file:
            file.write(self._backend.to_str(pretty=True).encode())

    def _encode(self, texts: Sequence[str]) -> list[Encoded]:
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            Encoded(np.array(encoding.ids, dtype=np.int32), _bytes_per_token(text, encoding.offsets))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _without_end(self, text: str, encoded: Encoded) -> Encoded:
        """The text's tokens. If they contain the end-of-text token (a model of whole pieces may know it as a piece),
        the text is encoded in parts, cut inside each written mark."""
        if not (encoded.ids == self.end_of_text_id).any():
            return encoded
        first, rest = re.escape(self._end_of_text[:1]), re.escape(self._end_of_text[1:])
        parts = [part for part in self._encode(re.split(f"(?<={first})(?={rest})", text)) if len(part.ids)]
        if not parts:
            return Encoded(encoded.ids[:0], encoded.bytes[:0])
        bytes_of_tokens = np.concatenate([part.bytes for part in parts])
        # What a part without a token stood for falls to the last one.
        bytes_of_tokens[-1] += len(text.encode("utf-8")) - bytes_of_tokens.sum()
        return Encoded(np.concatenate([part.ids for part in parts]), bytes_of_tokens)

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """From a folder with tokenizer.json, such a file itself, or a folder that Transformers can make a fast
        tokenizer of.

        Raises SettingsError for a path that is not there, DataError for files that cannot be used or name no
        end-of-text token.
        """
        if not path.exists():
            hint = f"Give a folder with {TOKENIZER_FILE}, or leave it out to train one on the data"
            raise SettingsError(Fault(str(path), "no such file or folder", hint))
        file = path / TOKENIZER_FILE if path.is_dir() else path
        special = special_file(file)
        if special is not None:
            raise SettingsError(special)
        if path.is_file():
            return cls._from_file(path)
        if (path / TOKENIZER_FILE).is_file():
            return cls._from_file(path / TOKENIZER_FILE)
        if not any((path / name).is_file() for name in VOCABULARIES):
            # Transformers would guess from config.json, and say at length that it cannot.
            raise DataError(Fault(str(path), "contains no tokenizer", f"Give a folder with {TOKENIZER_FILE}"))
        return cls._through_transformers(path)

    @classmethod
    def of_bundle(cls, bundle: Path) -> TextTokenizer:
        """The tokenizer that a run saved in its bundle. Raises DataError."""
        if not (bundle / TOKENIZER_FILE).is_file():
            hint = "Restore it from a copy of the bundle"
            raise DataError(Fault(str(bundle / TOKENIZER_FILE), "the bundle has no tokenizer", hint))
        return cls.load(bundle)

    @classmethod
    def _from_file(cls, file: Path) -> TextTokenizer:
        try:
            backend = Tokenizer.from_str(file.read_bytes().decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            reason = f"the tokenizers library cannot read it ({error})"
            raise DataError(Fault(str(file), reason, "It may be cut short: copy it again, or train one")) from error
        end_of_text, pad = _marks_of(file.parent)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if end_of_text is None and END_OF_TEXT in vocabulary:
            end_of_text = END_OF_TEXT
        if pad is None and PAD in vocabulary:
            pad = PAD
        if end_of_text is None:
            raise _no_end_of_text(file)
        for mark in filter(None, (end_of_text, pad)):
            if mark not in vocabulary:
                reason = f"the token {mark} named in {CONFIG_FILE} is not in it"
                raise DataError(Fault(str(file), reason, "Take both files from one tokenizer"))
        return cls(backend, end_of_text, pad)

    @classmethod
    def _through_transformers(cls, folder: Path) -> TextTokenizer:
        try:
            from transformers import AutoTokenizer
            from transformers.utils import logging as transformers_log
        except ImportError as error:
            reason = f"it has no {TOKENIZER_FILE} and Transformers is not installed"
            raise UnavailableError(Fault(str(folder), reason, "pip install transformers")) from error
        hint = f"Give a folder with {TOKENIZER_FILE}"
        # It warns at length where it then fails.
        verbosity = transformers_log.get_verbosity()
        transformers_log.set_verbosity_error()
        try:
            found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = f"Transformers found no tokenizer in it ({first_line})"
            raise DataError(Fault(str(folder), reason, hint)) from error
        finally:
            transformers_log.set_verbosity(verbosity)
        if not found.is_fast:
            reason = "contains a slow tokenizer, which cannot report the bytes of a token"
            raise DataError(Fault(str(folder), reason, hint))
        if found.eos_token is None:
            raise _no_end_of_text(folder)
        return cls(found.backend_tokenizer, str(found.eos_token), found.pad_token and str(found.pad_token))


def text_slices(text: str) -> Iterator[str]:
    """A text of any length in slices of at most 65,536 characters, cut behind a line, else before a
    space, so that hardly any word is divided."""
    begin = 0
    while len(text) - begin > _SLICE_CHARACTERS:
        last = begin + _SLICE_CHARACTERS
        end = text.rfind("\n", begin, last) + 1 or max(text.rfind(" ", begin + 1, last), 0) or last
        yield text[begin:end]
        begin = end
    yield text[begin:] if begin else text


def _widths(backend: Tokenizer, vocab_size: int) -> npt.NDArray[np.int32] | None:
    """Bytes that each token of a byte-level vocabulary stands for, int32 [V]; None for other vocabularies."""
    if backend.normalizer is not None or not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    widths = np.zeros(vocab_size, dtype=np.int32)
    for token, index in backend.get_vocab(with_added_tokens=False).items():
        widths[index] = len(token) if alphabet.issuperset(token) else 0
    for index, added in backend.get_added_tokens_decoder().items():
        widths[index] = len(added.content.encode("utf-8"))
    return widths


def _bytes_per_token(text: str, offsets: Sequence[tuple[int, int]]) -> npt.NDArray[np.int32]:
    """UTF-8 bytes per token from character offsets: from where the tokens before ended to where this one ends.
    Characters that no token covers (a tokenizer may drop spaces) count to the next token, at the end of the text to the
    last one."""
    if not offsets:
        return np.zeros(0, dtype=np.int32)
    ends = np.array(offsets, dtype=np.int64)[:, 1]
    if not text.isascii():
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
        ends = np.concatenate(([0], np.cumsum(widths)))[ends]
        total = int(widths.sum())
    else:
        total = len(text)
    ends[-1] = total
    ends = np.minimum(np.maximum.accumulate(ends), total)
    return np.diff(ends, prepend=0).astype(np.int32)


def _marks_of(folder: Path) -> tuple[str | None, str | None]:
    """End-of-text and padding tokens as the Hugging Face files beside a tokenizer.json name them."""
    marks: dict[str, str] = {}
    for name in ("special_tokens_map.json", CONFIG_FILE):
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_bytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(Fault(str(file), f"not JSON ({error})", "It may be cut short: copy it again")) from error
        for key in ("eos_token", "pad_token"):
            token = values.get(key) if isinstance(values, dict) else None
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token:
                marks[key] = token
    return marks.get("eos_token"), marks.get("pad_token")


def _id_of(backend: Tokenizer, token: str) -> int:
    index = backend.token_to_id(token)
    if index is None:
        reason = "it is not in the tokenizer's vocabulary"
        raise DataError(Fault(f"token {token}", reason, "Use the tokenizer's own files"))
    return int(index)


def _no_end_of_text(path: Path) -> DataError:
    reason = "this tokenizer has no end-of-text token, so documents could not be separated"
    return DataError(Fault(str(path), reason, f'Add "eos_token" to {CONFIG_FILE} beside it'))
