"""The format and compression of a file, from its name. A wrong suffix is noticed only when the file is read."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

FORMATS = ("txt", "md", "csv", "tsv", "json", "jsonl", "parquet", "arrow")
"""Suffixes of files that hold documents."""

ARCHIVES = ("zip", "tar")
"""Suffixes of files that hold files."""

COMPRESSIONS = {"gz": "gzip", "bz2": "bz2", "xz": "xz", "zst": "zstd"}
"""Suffix behind another one -> compression."""

TEXT_FORMATS = frozenset({"txt", "md", "html"})
"""Formats without columns; what a row of them is, --text-rows says."""

READABLE = (
    ".txt, .md, .csv, .tsv, .json, .jsonl, .parquet or .arrow files, also compressed (.gz, .bz2, .xz, .zst) "
    "or in .zip or .tar archives"
)
"""What can be read, for messages."""


@dataclass(frozen=True)
class FileKind:
    """`form`: one of FORMATS or ARCHIVES, or "html"; `compression`: one of the values of COMPRESSIONS, or None.
    `guessed`: only the content can say whether it is text."""

    form: str
    compression: str | None
    guessed: bool = False

    @property
    def is_archive(self) -> bool:
        """Whether it holds files."""
        return self.form in ARCHIVES


_SHORT = {"tgz": FileKind("tar", "gzip")}

_BY_LAST_SUFFIX = {**{form: FileKind(form, None) for form in (*FORMATS, *ARCHIVES)}, **_SHORT}

# Not .zip: it is compressed already and cannot be read from front to back.
_BY_TWO_SUFFIXES = {
    (form, suffix): FileKind(form, compression)
    for form in (*FORMATS, "tar")
    for suffix, compression in COMPRESSIONS.items()
}


_HTML_SUFFIXES = frozenset({"html", "htm", "xhtml"})


class _Pattern(NamedTuple):
    """A pattern of --as-text; `has_suffix`: it names one, and so also applies to files that are read as data."""

    matches: Callable[[str], re.Match[str] | None]
    has_suffix: bool


@lru_cache(maxsize=16)
def _patterns(as_text: str) -> tuple[_Pattern, ...]:
    found = []
    for each in filter(None, (part.strip().lower() for part in as_text.split(","))):
        suffix = each.rpartition(".")[2] if "." in each else ""
        has_suffix = bool(suffix) and not re.search(r"[*?\[\]]", suffix) and suffix not in COMPRESSIONS
        found.append(_Pattern(re.compile(fnmatch.translate(each)).fullmatch, has_suffix))
    return tuple(found)


def kind_of(name: str, as_text: str = "") -> FileKind | None:
    """The kind of a file of this name (a path's last part is enough), in any case; None where it cannot be read.

    `as_text` are patterns of names, separated by commas, whose files are read as text, also compressed: a pattern with
    a suffix applies to all files but archives, another one to those that are no data by their suffix.
    """
    kind = _by_suffix(name)
    if not as_text or (kind is not None and kind.is_archive):
        return kind
    last = name.lower().replace("\\", "/").rpartition("/")[2]
    rest, _, suffix = last.rpartition(".")
    packed = COMPRESSIONS.get(suffix) if rest else None
    plain = rest if packed is not None else last
    matching = [each for each in _patterns(as_text) if each.matches(last) or each.matches(plain)]
    if not matching or (kind is not None and not any(each.has_suffix for each in matching)):
        return kind
    form = "html" if plain.rpartition(".")[2] in _HTML_SUFFIXES else "txt"
    return FileKind(form, packed, guessed=not any(each.has_suffix for each in matching))


def _by_suffix(name: str) -> FileKind | None:
    rest, dot, suffix = name.rpartition(".")
    suffix = suffix.lower()
    if not dot:
        return None
    if suffix in COMPRESSIONS:
        return _BY_TWO_SUFFIXES.get((rest.rpartition(".")[2].lower(), suffix)) if "." in rest else None
    return _BY_LAST_SUFFIX.get(suffix)


def stem_of(name: str) -> str:
    """A file's name without folder and without the suffixes that say its kind: `a/b.v2.jsonl.gz` -> `b.v2`."""
    last = name.rpartition("/")[2]
    kind = kind_of(last)
    stem = last.rpartition(".")[0] or last
    if kind is not None and kind.compression is not None and not last.lower().endswith(tuple(_SHORT)):
        stem = stem.rpartition(".")[0] or stem
    return stem


def is_hidden(name: str) -> bool:
    """Whether a part of the path begins with a dot (`.` itself is no name)."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
