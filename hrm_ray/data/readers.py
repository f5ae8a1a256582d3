"""Reads the rows of a part in a fixed order, with faults that name file and line.

A row that cannot be read becomes a BadRow and is never raised: the caller decides whether to fail or to skip it."""

from __future__ import annotations

from collections.abc import Iterator

from hrm_ray.data import hub
from hrm_ray.data.archives.members import Selection
from hrm_ray.data.archives.tars import tar_rows
from hrm_ray.data.archives.zips import zip_directory, zip_rows
from hrm_ray.data.file_kinds import TEXT_FORMATS
from hrm_ray.data.file_systems import file_system_of
from hrm_ray.data.formats.choose import format_rows
from hrm_ray.data.formats.columnar import parquet_length
from hrm_ray.data.formats.texts import PIECE_BYTES
from hrm_ray.data.parts import Part, TextSource, list_parts
from hrm_ray.data.rows import BadRow, Cursor, Document, OnBadRow, Row, TextColumns, skippable, unreadable
from hrm_ray.data.streams import DAMAGE, ReadingWatch, Unreadable, damage, decompressed, watched
from hrm_ray.errors import DataError, Fault
from hrm_ray.settings.hub_name import HUB

_READ_TO_THE_END = frozenset({"txt", "md", "csv", "tsv", "json", "jsonl"})


def read_part(
    part: Part,
    source: TextSource,
    start_row: int = 0,
    mark: int | None = None,
    start_piece: int = 0,
    *,
    watch: ReadingWatch | None = None,
    columns: TextColumns | None = None,
) -> Iterator[Row]:
    """The rows of `part` from `start_row` (from its piece `start_piece`), empty texts included.

    `mark` is where `start_row` begins, as the row before it said (`Document.mark`); without it the earlier rows are
    read and skipped. The rows are the same either way, except that after a mark `where` counts rows instead of lines.
    `watch` is called as bytes are read; `columns` overrides those of `source`.
    """
    columns = columns or source.columns
    cursor = Cursor(columns, part.address, start_row, mark if part.random_access else None, part.random_access)
    cursor.watch, cursor.text_rows, cursor.start_piece = watch, source.text_rows, start_piece
    cursor.encoding, cursor.delimiter, cursor.lenient = source.encoding, source.delimiter, part.lenient
    begin = cursor.row
    try:
        yield from _rows(part, cursor)
        return
    except Unreadable as error:
        found = error
    except DAMAGE as error:
        found = damage(error, cursor.where)
    row = max(cursor.row, start_row)
    passed_over = part.lenient and found.not_text
    whole_file = cursor.row == begin and row == cursor.piece == 0
    yield BadRow(
        found.fault, cursor.where, row, ends_part=True, passed_over=passed_over, whole_file=whole_file or passed_over
    )


def read_documents(source: TextSource, on_bad_row: OnBadRow = "fail") -> Iterator[Document]:
    """All documents of `source`, empty texts included.

    Raises what `list_parts` raises, and DataError at the first bad row unless such rows are skipped, or if no row
    contains text.
    """
    any_text, bad, files = False, 0, 0
    first: Fault | None = None
    for part in list_parts(source).parts:
        for row in read_part(part, source):
            if isinstance(row, BadRow):
                if on_bad_row == "fail" and not row.passed_over:
                    raise DataError(skippable(row.fault))
                bad += 1
                files += row.whole_file
                first = first or row.fault
                continue
            any_text = any_text or bool(row.text)
            yield row
    if not any_text and first is not None:
        reason = f"{unreadable(bad, files)} cannot be read, and the others contain no text"
        raise DataError(Fault(source.path, f"{reason} ({first.value}: {first.reason})", first.hint))
    if not any_text:
        raise DataError(Fault(source.path, "contains no text", "Give data with text in it"))


def known_rows(part: Part, source: TextSource) -> int | None:
    """The number of rows of a part (bad ones included) if metadata say it, else None."""
    kind = part.kind
    if part.address.startswith(HUB) or kind is None or kind.compression is not None:
        return None
    if kind.form in TEXT_FORMATS:
        one = source.text_rows == "document" or (source.text_rows == "mebibyte" and part.bytes <= PIECE_BYTES)
        return 1 if one or source.pairs else None
    if kind.form not in ("parquet", "zip"):
        return None
    try:
        if kind.form == "zip":
            directory = zip_directory(part.address, part.bytes, part.stamp, part.as_text)
            chosen = directory.chosen(Selection(part.split, part.apart))
            return len(chosen) if chosen and all(member.is_one_row(source.text_rows) for member, _ in chosen) else None
        with file_system_of(part.address).open(part.address) as file:
            return parquet_length(file, source.columns)
    except Unreadable:
        return None
    except DAMAGE:
        return None


def _rows(part: Part, cursor: Cursor) -> Iterator[Row]:
    if part.address.startswith(HUB):
        yield from hub.shard_rows(part.address, cursor)
        return
    kind = part.kind
    if kind is None:
        raise ValueError(f"{part.address} is not a part of a list")
    with file_system_of(part.address).open(part.address) as stored:
        file = stored if cursor.watch is None else watched(stored, cursor.watch)
        size = file.seek(0, 2)
        if size != part.bytes:
            reason = f"has {size} bytes, but had {part.bytes} when the files were listed"
            raise Unreadable(Fault(part.address, reason, "Do not change the data while it is read; start again"))
        file.seek(0)
        if kind.form == "zip":
            directory = zip_directory(part.address, part.bytes, part.stamp, part.as_text)
            yield from zip_rows(file, cursor, Selection(part.split, part.apart), directory)
        elif kind.form == "tar":
            stream = decompressed(file, kind.compression, part.address, part.bytes)
            selection = Selection(part.split, part.apart)
            yield from tar_rows(
                stream,
                cursor,
                selection,
                undecided=part.undecided,
                compressed=kind.compression is not None,
                as_text=part.as_text,
            )
        else:
            yield from format_rows(file, kind, cursor, stored_bytes=part.bytes, seekable=True)
            if kind.compression is None and kind.form in _READ_TO_THE_END and file.tell() < part.bytes:
                reason = f"it ended at byte {file.tell()} of {part.bytes} while it was read"
                raise Unreadable(Fault(part.address, reason, "Do not change the data while it is read"))
