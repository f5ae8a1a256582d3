"""The table of formats, and what each needs from its stream: decompressed, seekable or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import BinaryIO

from hrm_ray.data.file_kinds import FileKind
from hrm_ray.data.formats.columnar import arrow_rows, has_arrow_index, parquet_rows
from hrm_ray.data.formats.lines import jsonl_rows
from hrm_ray.data.formats.separated import separated_rows
from hrm_ray.data.formats.texts import text_rows
from hrm_ray.data.formats.values import json_rows
from hrm_ray.data.rows import Cursor, Row
from hrm_ray.data.streams import decompressed, seekable_copy

READERS: Mapping[str, Callable[[BinaryIO, Cursor], Iterator[Row]]] = {
    "txt": text_rows,
    "md": text_rows,
    "csv": partial(separated_rows, delimiter=","),
    "tsv": partial(separated_rows, delimiter="\t"),
    "json": json_rows,
    "jsonl": jsonl_rows,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
}


def format_rows(
    stream: BinaryIO, kind: FileKind, cursor: Cursor, *, stored_bytes: int, seekable: bool
) -> Iterator[Row]:
    """The rows of a stream of `stored_bytes` bytes, a buffered reader. Raises Unreadable where it cannot go on."""
    opened = decompressed(stream, kind.compression, cursor.where, stored_bytes)
    if seekable and kind.compression is None:
        yield from READERS[kind.form](opened, cursor)
    elif kind.form == "parquet" or (kind.form == "arrow" and has_arrow_index(opened)):
        with seekable_copy(opened, cursor.where) as copy:
            yield from READERS[kind.form](copy, cursor)
    else:
        yield from READERS[kind.form](opened, cursor)
