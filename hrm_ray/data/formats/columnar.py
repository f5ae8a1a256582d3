"""Columnar tables: .parquet, and .arrow files and streams, read through pyarrow on one thread.

Only the wanted columns are read, a few thousand values at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from hrm_ray.data.rows import Cursor, Row, TextColumns
from hrm_ray.data.streams import Unreadable, damage
from hrm_ray.errors import Fault

_ARROW_FILE_MAGIC = b"ARROW1"
_BATCH_ROWS = 1024
_BATCH_BYTES = 8 << 20
_BUFFER_BYTES = 1 << 20
_BATCH_BITS = 32


def parquet_rows(file: BinaryIO, cursor: Cursor) -> Iterator[Row]:
    """The rows of a Parquet file that can be sought in. Marks are numbers of rows: groups of rows before the start are
    not read at all. Raises Unreadable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Read in small pieces, not a whole column of a group of rows at once: groups may be as large as the file.
        opened = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        fault = cursor.columns.absent(opened.schema_arrow.names, cursor.where, "file")
        if fault is not None:
            raise Unreadable(fault, not_text=True)
        base = cursor.row
        for number in range(opened.metadata.num_row_groups):
            group = opened.metadata.row_group(number)
            if cursor.row + group.num_rows <= cursor.start:
                cursor.row += group.num_rows
                continue
            at_once = _BATCH_BYTES // max(1, group.total_byte_size // max(1, group.num_rows))
            names = list(cursor.columns.names)
            size = max(1, min(_BATCH_ROWS, at_once))
            for batch in opened.iter_batches(size, row_groups=[number], columns=names, use_threads=False):
                yield from _batch_rows(batch, cursor, cursor.row - base)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(error, cursor.where, "Parquet") from error


def parquet_length(file: BinaryIO, columns: TextColumns) -> int | None:
    """The number of rows of a Parquet file, from its metadata; None where it cannot be read as rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file)
    except (pa.ArrowException, OSError):
        return None
    length: int = opened.metadata.num_rows
    return length if columns.absent(opened.schema_arrow.names, "") is None else None


def has_arrow_index(stream: BinaryIO) -> bool:
    """Whether an .arrow stream (a buffered reader) is a file with an index of its batches at its end; else they follow
    one another."""
    begin: bytes = stream.peek(len(_ARROW_FILE_MAGIC))  # type: ignore[attr-defined]
    return begin.startswith(_ARROW_FILE_MAGIC)


def arrow_rows(file: BinaryIO, cursor: Cursor) -> Iterator[Row]:
    """The rows of an .arrow file that can be sought in, or of a stream. Marks are (batch << 32) + row within the batch.
    Raises Unreadable."""
    import pyarrow as pa

    try:
        yield from _arrow_file_rows(file, cursor) if has_arrow_index(file) else _arrow_stream_rows(file, cursor)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(error, cursor.where, "Arrow") from error


def _arrow_file_rows(file: BinaryIO, cursor: Cursor) -> Iterator[Row]:
    import pyarrow as pa

    schema = pa.ipc.open_file(file).schema
    fault = cursor.columns.absent(schema.names, cursor.where, "file")
    if fault is not None:
        raise Unreadable(fault, not_text=True)
    wanted = [schema.names.index(name) for name in cursor.columns.names]
    opened = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False))
    first = 0
    if cursor.mark is not None:
        first, within = cursor.mark >> _BATCH_BITS, cursor.mark & ((1 << _BATCH_BITS) - 1)
        cursor.row = cursor.start - within
    for number in range(first, opened.num_record_batches):
        batch = opened.get_batch(number)
        yield from _batch_rows(batch, cursor, number << _BATCH_BITS)


def _arrow_stream_rows(file: BinaryIO, cursor: Cursor) -> Iterator[Row]:
    import pyarrow as pa

    opened = pa.ipc.open_stream(file)
    fault = cursor.columns.absent(opened.schema.names, cursor.where, "file")
    if fault is not None:
        raise Unreadable(fault, not_text=True)
    for batch in opened:
        yield from _batch_rows(batch, cursor)


def _batch_rows(batch: Any, cursor: Cursor, mark: int = 0) -> Iterator[Row]:
    """The rows of a batch. Its first row has `mark`, and each one after it one more."""
    base, length = cursor.row, batch.num_rows
    cursor.row = max(base, min(cursor.start, base + length))
    for begin in range(cursor.row - base, length, _BATCH_ROWS):
        part = batch.slice(begin, _BATCH_ROWS)
        taken = [_values(part.column(part.schema.names.index(name))) for name in cursor.columns.names]
        for values in zip(*taken, strict=True):
            row = cursor.next_row()
            next_mark = mark + cursor.row - base if cursor.marked else None
            yield cursor.columns.picked(values, f"{cursor.where}, row {row + 1}", row, next_mark)


def _values(column: Any) -> list[object]:
    """A column's values; text that is not UTF-8 as bytes."""
    try:
        values: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> object:
    try:
        value: object = scalar.as_py()
    except UnicodeDecodeError:
        return bytes(scalar.as_buffer())
    return value


def _damaged(error: Exception, where: str, form: str) -> Unreadable:
    """The Unreadable for pyarrow's error of a file that is damaged or of another format."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return damage(error, where)
    message = str(error).strip().rstrip(".").partition("\n")[0]
    return Unreadable(Fault(where, f"it cannot be read as {form} ({message})", "It may be damaged: copy it again"))
