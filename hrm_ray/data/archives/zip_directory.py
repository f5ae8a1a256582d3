"""The directory at the end of a zip archive.

One job: names, sizes and places of the members of a .zip, in one pass. The standard library's module makes an object
of every member, which takes four times as long; for a hundred thousand small members that is most of all time.
Format: PKWARE APPNOTE.TXT 6.3, sections 4.3.12 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import io
import stat
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LONGEST_COMMENT_BYTES = 65_535
_DIRECTORY_BYTES = 1 << 30
_ENCRYPTED, _UTF8 = 0x1, 0x800
_IN_EXTRA = 0xFFFFFFFF


class ZipEntry(NamedTuple):
    """A member: its name, `size` in bytes and `stored` bytes in the archive, how it is packed, its checksum, where its
    header is, and what it is where it is no plain file (`unusual`)."""

    name: str
    size: int
    stored: int
    method: int
    crc: int
    offset: int
    unusual: str


class BadDirectory(Exception):
    """The bytes are no directory of a zip archive."""


def read_directory(file: BinaryIO, most: int) -> list[ZipEntry]:
    """The members of the archive in `file`, folders left out. Raises BadDirectory for a damaged one, or one of more
    than `most` members, and OSError."""
    count, length, begins, shift = _find(file)
    if count > most:
        raise BadDirectory(f"it has {count} members, more than {most}")
    if begins < 0 or length > _DIRECTORY_BYTES:
        raise BadDirectory("the directory lies outside of the file")
    file.seek(begins)
    directory = file.read(length)
    if len(directory) < length:
        raise BadDirectory("the directory is cut short")
    entries = list(_entries(directory, shift))
    if len(entries) != count:
        raise BadDirectory(f"it names {len(entries)} members instead of {count}")
    return [entry for entry in entries if not entry.name.endswith("/")]


def _find(file: BinaryIO) -> tuple[int, int, int, int]:
    """Number of members, length and place of the directory, and the bytes in front of the archive."""
    size = file.seek(0, io.SEEK_END)
    begin = max(0, size - _LONGEST_COMMENT_BYTES - _END.size)
    file.seek(begin)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise BadDirectory("there is none at the file's end")
    _, disk, first_disk, here, count, length, offset, _ = _END.unpack_from(tail, at)
    place = begin + at
    if (
        at >= _LOCATOR.size
        and tail[at - _LOCATOR.size : at - _LOCATOR.size + 4] == b"PK\6\7"
        and place >= _LOCATOR.size + _END_64.size
    ):
        place -= _LOCATOR.size + _END_64.size
        file.seek(place)
        record = file.read(_END_64.size)
        if record[:4] != b"PK\6\6":
            raise BadDirectory("its second half for large archives is missing")
        disk, first_disk, here, count, length, offset = _END_64.unpack(record)[4:]
    if disk or first_disk or here != count:
        raise BadDirectory("the archive is one of several volumes")
    return count, length, place - length, place - length - offset


def _entries(directory: bytes, shift: int) -> Iterator[ZipEntry]:
    at, end = 0, len(directory)
    while at < end:
        if end - at < _ENTRY.size:
            raise BadDirectory("the directory is cut short")
        fields = _ENTRY.unpack_from(directory, at)
        (mark, _, _, flags, method, _, _, crc, stored, size, name_length, extra_length) = fields[:12]
        comment_length, _, _, attributes, offset = fields[12:]
        if mark != b"PK\1\2":
            raise BadDirectory("a member's entry is damaged")
        raw = directory[at + _ENTRY.size : at + _ENTRY.size + name_length]
        name = raw.decode("utf-8", "replace") if flags & _UTF8 else raw.decode("ascii" if raw.isascii() else "cp437")
        if extra_length and _IN_EXTRA in (size, stored, offset):
            begin = at + _ENTRY.size + name_length
            size, stored, offset = _large(directory[begin : begin + extra_length], size, stored, offset)
        at += _ENTRY.size + name_length + extra_length + comment_length
        unusual = _unusual(attributes, flags) if attributes >> 16 or flags & _ENCRYPTED else ""
        yield ZipEntry(name, size, stored, method, crc, offset + shift, unusual)


def _large(extra: bytes, *values: int) -> list[int]:
    """Sizes and place with those of 64 bits put in that stand in the extra field, in this order."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            try:
                return [next(numbers) if value == _IN_EXTRA else value for value in values]
            except StopIteration as error:
                raise BadDirectory("a member's entry is damaged") from error
        extra = extra[4 + length :]
    return list(values)


def _unusual(attributes: int, flags: int) -> str:
    mode = attributes >> 16
    if stat.S_IFMT(mode) and not stat.S_ISREG(mode):
        return "a link" if stat.S_ISLNK(mode) else "no plain file"
    return "encrypted" if flags & _ENCRYPTED else ""
