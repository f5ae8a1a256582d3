"""Members of .zip and .tar archives: which are read, which are refused, and their rows.

Nothing is unpacked to disk. A name that would escape the target folder is refused all the same: such an archive is
malicious or was not made for training.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple, cast

from hrm_ray.data.file_kinds import READABLE, TEXT_FORMATS, FileKind, is_hidden, kind_of
from hrm_ray.data.formats.choose import format_rows
from hrm_ray.data.formats.recode import utf8_text
from hrm_ray.data.formats.texts import PIECE_BYTES, text_row
from hrm_ray.data.rows import Cursor, Document, Row, TextRows
from hrm_ray.data.splits import missing_split, split_of
from hrm_ray.data.streams import ContainerUnreadable, Unreadable
from hrm_ray.errors import Fault

# Most names match: no part begins with a dot, no absolute path, no backslash.
_PLAIN = re.compile(r"(?![A-Za-z]:)[^./\\][^/\\]*(?:/[^./\\][^/\\]*)*")
_DRIVE = re.compile(r"[A-Za-z]:")
_WITHOUT = "Make the archive again without this member"


class Member(NamedTuple):
    """A file in an archive: its name in clean form, its kind, `size` in bytes, `stored` bytes it takes in the archive,
    and why it is `refused` (empty: it is not)."""

    name: str
    kind: FileKind
    size: int
    stored: int
    refused: str = ""

    def is_one_row(self, text_rows: TextRows) -> bool:
        """Whether the member is exactly one row, whatever its content."""
        whole = text_rows == "document" and self.kind.form in TEXT_FORMATS
        return whole or self.is_one_piece(text_rows)

    def is_one_piece(self, text_rows: TextRows) -> bool:
        """Whether the member is exactly one row, of at most PIECE_BYTES bytes."""
        if self.refused:
            return True
        whole = text_rows in ("document", "mebibyte") and self.kind.form in TEXT_FORMATS
        return whole and self.kind.compression is None and self.size <= PIECE_BYTES


@dataclass(frozen=True)
class Selection:
    """The members to read: those of `split`, or (None) all except those of the split `apart`."""

    split: str | None = None
    apart: str | None = None

    def wants(self, name: str) -> bool:
        """Whether the member of this name is read."""
        if self.split is not None:
            return split_of(name) == self.split
        return self.apart is None or split_of(name) != self.apart


def member_of(stored_name: str, size: int, stored: int, unusual: str = "", as_text: str = "") -> Member | None:
    """The member of this name in an archive; None where it is of a kind that is not read, or hidden. `unusual`: what it
    is where it is no plain file."""
    if _PLAIN.fullmatch(stored_name) and not unusual:
        kind = kind_of(stored_name, as_text)
        if kind is None:
            return None
        if not kind.is_archive:
            return Member(stored_name, kind, size, stored)
    name = stored_name.replace("\\", "/")
    kind = kind_of(name, as_text)
    if kind is None or is_hidden(name):
        return None
    parts = name.split("/")
    refused = ""
    if name.startswith("/") or _DRIVE.match(name):
        refused = "its name is an absolute path"
    elif ".." in parts:
        refused = "its name leads out of the archive"
    elif unusual:
        refused = f"it is {unusual}"
    elif kind.is_archive:
        refused = "it is an archive inside an archive"
    clean = "/".join(part for part in parts if part not in ("", "."))
    return Member(clean, kind, size, stored, refused)


def member_rows(
    member: Member, cursor: Cursor, archive: str, whole: Callable[[], bytes], stream: Callable[[], BinaryIO]
) -> Iterator[Row]:
    """The rows of one member. A short member is read at once with `whole` (faster for a hundred thousand of them), a
    long one with `stream`. An error affects this member only, unless it is a ContainerUnreadable."""
    # A text file below the row where reading begins need not be looked at.
    if member.is_one_row(cursor.text_rows) and cursor.row < cursor.start:
        cursor.next_row()
        return
    cursor.where = f"{archive}/{member.name}"
    if member.refused:
        yield cursor.bad(Fault(cursor.where, member.refused, _WITHOUT))
        return
    try:
        one_piece, content = member.is_one_piece(cursor.text_rows), None
        if one_piece or member.size <= PIECE_BYTES:
            try:
                content = whole()
            except Unreadable as error:
                # The rows before the damage stay; of a member that is one piece only where its beginning is sound.
                if one_piece and not isinstance(error, ContainerUnreadable):
                    raise
                # Marks of a zip are numbers of rows, no places in a member.
                cursor.mark = None
        if one_piece and content is not None:
            cursor.remark = ""
            data = utf8_text(content, member.kind, cursor)
            row = cursor.next_row()
            found = text_row(data, cursor, row, mark=row + 1 if cursor.marked else None)
            yield replace(found, remark=cursor.remark) if cursor.remark and isinstance(found, Document) else found
            return
        held = None if content is None else cast(BinaryIO, io.BufferedReader(io.BytesIO(content)))
        with stream() if held is None else held as opened:
            yield from format_rows(opened, member.kind, cursor, stored_bytes=member.size, seekable=False)
    except ContainerUnreadable:
        raise
    except Unreadable as error:
        bad = cursor.bad(error.fault)
        if bad.row >= cursor.start:
            yield replace(bad, passed_over=cursor.lenient and error.not_text, whole_file=True)


def nothing_chosen(archive: str, selection: Selection, splits: Sequence[str], skipped: int) -> ContainerUnreadable:
    """The error if the selection has no member; `splits` are those of the archive, `skipped` counts members of other
    kinds."""
    if not splits:
        reason = f"contains no readable member ({skipped} of other kinds)"
        return ContainerUnreadable(Fault(archive, reason, f"Give {READABLE}, or --as-text PATTERNS"))
    if selection.split is not None:
        return ContainerUnreadable(missing_split(archive, selection.split, splits).faults[0])
    reason = f"all members belong to the split `{selection.apart}`, which is held out"
    return ContainerUnreadable(Fault(archive, reason, "Add training data, or hold out another split"))
