"""The format and compression of a file, from its name. A wrong suffix is noticed only when the file is read."""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = ("txt", "md", "csv", "tsv", "json", "jsonl", "parquet", "arrow")
"""Suffixes of files that hold documents."""

ARCHIVES = ("zip", "tar")
"""Suffixes of files that hold files."""

COMPRESSIONS = {"gz": "gzip", "bz2": "bz2", "xz": "xz", "zst": "zstd"}
"""Suffix behind another one -> compression."""

TEXT_FORMATS = frozenset({"txt", "md"})
"""Formats without rows: a file is one document (a very long one several)."""

READABLE = (
    ".txt, .md, .csv, .tsv, .json, .jsonl, .parquet or .arrow files, also compressed (.gz, .bz2, .xz, .zst) "
    "or in .zip or .tar archives"
)
"""What can be read, for messages."""


@dataclass(frozen=True)
class FileKind:
    """`form`: one of FORMATS or ARCHIVES; `compression`: one of the values of COMPRESSIONS, or None."""

    form: str
    compression: str | None

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


def kind_of(name: str) -> FileKind | None:
    """The kind of a file of this name (a path's last part is enough), in any case; None where it cannot be read."""
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
