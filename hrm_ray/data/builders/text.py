"""Builds a text corpus from the documentation that comes with Python, so that a first run needs no download."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path

from hrm_ray.atomic_files import atomic_directory, check_vacant
from hrm_ray.data.pydocs import python_documents
from hrm_ray.errors import Fault, SettingsError, UnavailableError

_TEST_SHARE = 25  # one document in so many is held out
_TEXT_FILES = frozenset({"train.jsonl", "test.jsonl"})


@dataclass(frozen=True)
class TextSummary:
    """The result of build_text: documents and UTF-8 bytes of text per split, and exact duplicates left out."""

    folder: Path
    train_documents: int
    test_documents: int
    train_bytes: int
    test_bytes: int
    duplicates: int


def build_text(out: Path, *, max_bytes: int | None = None, seed: int = 0, overwrite: bool = False) -> TextSummary:
    """A text corpus of Python's own documentation: train.jsonl and test.jsonl with rows {"text", "source"}.

    Documents come in an order keyed by `seed`, each at most once; about one in 25 is held out, chosen by a hash of its
    text, so no held-out document occurs in training. `max_bytes` ends the corpus before the document that would pass it
    (UTF-8 bytes of text, both splits together). Raises SettingsError for values that cannot be satisfied.
    """
    check_vacant(out, overwrite=overwrite, owned=_TEXT_FILES, option="--out")
    unique: dict[str, tuple[str, str]] = {}
    documents = 0
    for source, text in python_documents():
        documents += 1
        unique.setdefault(hashlib.sha256(f"{seed} {text}".encode()).hexdigest(), (source, text))
    if not unique:
        reason = "the sources of its standard library are missing"
        hint = "Use a complete installation of Python"
        raise UnavailableError(Fault(f"Python {platform.python_version()}", reason, hint))
    splits: dict[str, list[str]] = {"train": [], "test": []}
    sizes = {"train": 0, "test": 0}
    for key, (source, text) in sorted(unique.items()):
        length = len(text.encode("utf-8"))
        if max_bytes is not None and sum(sizes.values()) + length > max_bytes:
            break
        # By the last digits, because the first ones order the documents: a short corpus would have one split only.
        split = "test" if int(key[-8:], 16) % _TEST_SHARE == 0 else "train"
        splits[split].append(json.dumps({"text": text, "source": source}, ensure_ascii=False))
        sizes[split] += length
    if not all(splits.values()):
        reason = "too little text for a training and a test split"
        raise SettingsError(Fault(f"max_bytes {max_bytes}", reason, "Give --max-bytes 1000000 or more"))
    with atomic_directory(out, overwrite=overwrite, owned=_TEXT_FILES) as building:
        for split, rows in splits.items():
            (building / f"{split}.jsonl").write_bytes(("\n".join(rows) + "\n").encode("utf-8"))
    return TextSummary(
        folder=out,
        train_documents=len(splits["train"]),
        test_documents=len(splits["test"]),
        train_bytes=sizes["train"],
        test_bytes=sizes["test"],
        duplicates=documents - len(unique),
    )
