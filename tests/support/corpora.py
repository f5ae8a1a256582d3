"""Small corpora in every format, compression and archive, for tests of the readers."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hrm_ray.data.parts import TextSource, list_parts
from hrm_ray.data.readers import read_part
from hrm_ray.data.rows import BadRow, Document, Row

Texts = Sequence[str]


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _table(texts: Texts) -> pa.Table:
    return pa.table({"n": list(range(len(texts))), "text": pa.array(list(texts), pa.string())})


def parquet_bytes(texts: Texts, rows_of_a_group: int = 3) -> bytes:
    out = io.BytesIO()
    pq.write_table(_table(texts), out, row_group_size=rows_of_a_group)
    return out.getvalue()


def arrow_bytes(texts: Texts, *, stream: bool = False, rows_of_a_batch: int = 3) -> bytes:
    out, table = io.BytesIO(), _table(texts)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_of_a_batch)
    return out.getvalue()


def _separated(texts: Texts, separator: str) -> bytes:
    lines = [f"n{separator}text", *(f"{number}{separator}{_quoted(text)}" for number, text in enumerate(texts))]
    return "".join(line + "\n" for line in lines).encode()


FORMATS: Mapping[str, Callable[[Texts], bytes]] = {
    "jsonl": lambda texts: "".join(json.dumps({"text": text, "n": 1}) + "\n\n" for text in texts).encode(),
    "json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1, ensure_ascii=False).encode(),
    "csv": lambda texts: _separated(texts, ","),
    "tsv": lambda texts: _separated(texts, "\t"),
    "parquet": parquet_bytes,
    "arrow": arrow_bytes,
}
"""Formats with rows -> their bytes with these texts in the column `text`."""

COMPRESSIONS: Mapping[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: bytes(pa.Codec("zstd").compress(data)),
}

TAR_MODES = {"tar": "w", "tar.gz": "w:gz", "tgz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}


def write_zip(path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar of plain members; the suffix says the compression."""
    suffix = next(suffix for suffix in sorted(TAR_MODES, key=len, reverse=True) if path.name.endswith(suffix))
    with tarfile.open(path, TAR_MODES[suffix]) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(path: Path | str, **source: Any) -> list[Row]:
    """All rows of a corpus, bad ones included."""
    corpus = TextSource(str(path), **source)
    return [row for part in list_parts(corpus).parts for row in read_part(part, corpus)]


def shown(rows: Sequence[Row]) -> list[str]:
    """Rows as texts; bad ones as `bad`, or `end` where they end the part."""
    return [row.text if isinstance(row, Document) else "<end>" if row.ends_part else "<bad>" for row in rows]


def texts_of(path: Path | str, **source: Any) -> list[str]:
    return shown(rows_of(path, **source))


def faults_of(path: Path | str, **source: Any) -> list[str]:
    """What is said of the bad rows."""
    bad = [row for row in rows_of(path, **source) if isinstance(row, BadRow)]
    for row in bad:
        assert row.fault.value and row.fault.reason and row.fault.hint
    return [str(row.fault) for row in bad]
