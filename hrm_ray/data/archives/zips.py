"""Zip archives, read as they are.

One job: the directory of a .zip once, then its members in the order of their paths, as in a folder.
"""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, cast

from hrm_ray.data.archives.members import Member, Selection, member_of, member_rows, nothing_chosen
from hrm_ray.data.rows import Cursor, Row
from hrm_ray.data.splits import in_path_order, split_of
from hrm_ray.data.streams import (
    EXPANSION,
    EXPANSION_FROM_BYTES,
    TOTAL_BYTES,
    ContainerUnreadable,
    Unreadable,
    bomb,
    bounded,
    damage,
)
from hrm_ray.errors import Fault

MEMBERS = 2_000_000
"""A zip of more members is refused: its directory alone would take gigabytes of memory."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 0x1
_ABOUT_MEMBER_BYTES = 76
"""Besides its bytes and, twice, its name a member takes this much: its header, and its entry in the directory."""


@dataclass(frozen=True)
class ZipDirectory:
    """The members that can be read, or are refused, in the order they are read in; `skipped` are of other kinds."""

    archive: zipfile.ZipFile
    members: tuple[tuple[Member, zipfile.ZipInfo], ...]
    skipped: int

    @property
    def names(self) -> Sequence[str]:
        """The members' names."""
        return [member.name for member, _ in self.members]

    def chosen(self, selection: Selection) -> list[tuple[Member, zipfile.ZipInfo]]:
        """The members of a selection."""
        return [pair for pair in self.members if selection.wants(pair[0].name)]


def open_zip(file: BinaryIO, where: str, archive_bytes: int) -> ZipDirectory:
    """Reads the directory of a .zip. Raises ContainerUnreadable for one that is damaged or may not be read."""
    try:
        archive = zipfile.ZipFile(file)
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        reason = f"its directory cannot be read ({str(error) or type(error).__name__})"
        raise ContainerUnreadable(
            Fault(where, reason, "It may be cut short, or no .zip archive: copy it again")
        ) from error
    infos = archive.infolist()
    if len(infos) > MEMBERS:
        reason = f"it has {len(infos)} members, more than {MEMBERS}"
        raise ContainerUnreadable(Fault(where, reason, "Pack them as .tar, or as rows of .jsonl files"))
    total = sum(info.file_size for info in infos)
    if total > max(EXPANSION * archive_bytes, EXPANSION_FROM_BYTES) or total > TOTAL_BYTES:
        raise ContainerUnreadable(bomb(where, archive_bytes, total).fault)
    found: list[tuple[Member, zipfile.ZipInfo]] = []
    skipped = 0
    for info in infos:
        if info.is_dir():
            continue
        member = member_of(info.filename, info.file_size, info.compress_size, _unusual(info))
        if member is None:
            skipped += 1
        else:
            found.append((member, info))
    found.sort(key=lambda pair: in_path_order(pair[0].name))
    return ZipDirectory(archive, tuple(found), skipped)


def _unusual(info: zipfile.ZipInfo) -> str:
    mode = info.external_attr >> 16
    if mode and stat.S_IFMT(mode) and not stat.S_ISREG(mode):
        return "a link" if stat.S_ISLNK(mode) else "no plain file"
    return "encrypted" if info.flag_bits & _ENCRYPTED else ""


def zip_rows(file: BinaryIO, cursor: Cursor, selection: Selection, archive_bytes: int) -> Iterator[Row]:
    """The rows of a .zip, member after member. Raises ContainerUnreadable where nothing more can be read."""
    where = cursor.where
    directory = open_zip(file, where, archive_bytes)
    chosen = directory.chosen(selection)
    if not chosen:
        splits = sorted({split_of(name) for name in directory.names})
        raise nothing_chosen(where, selection, splits, directory.skipped)
    passed = 0
    for member, info in chosen:
        taken = _Taken(file, directory.archive, info, cursor)
        if cursor.watch is not None:
            cursor.watch.passed_bytes = partial(_passed, passed, info, file)
        yield from member_rows(member, cursor, where, taken.whole, taken.stream)
        passed += info.compress_size + _ABOUT_MEMBER_BYTES + 2 * len(info.filename)


def _passed(before: int, info: zipfile.ZipInfo, file: BinaryIO) -> int:
    """Bytes of members that lie behind, and of the present one."""
    return before + min(max(0, file.tell() - info.header_offset), info.compress_size)


class _Taken:
    """One member's bytes."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, info: zipfile.ZipInfo, cursor: Cursor) -> None:
        self._file, self._archive, self._info, self._cursor = file, archive, info, cursor

    def whole(self) -> bytes:
        """A short member at once, past the layers of zipfile, which take most of the time of small ones."""
        info = self._info
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            with self.stream() as stream:
                return stream.read()
        data = self._stored()
        if info.compress_type == zipfile.ZIP_DEFLATED:
            try:
                # One byte more than it should be, not all that a wrong header might hide.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, info.file_size + 1)
            except zlib.error as error:
                raise damage(error, self._cursor.where) from error
        if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
            raise self._damaged("its bytes do not have the checksum in the archive's directory")
        return data

    def _stored(self) -> bytes:
        file, info = self._file, self._info
        try:
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
                raise self._damaged("its header in the archive is damaged")
            name, extra = _LOCAL_HEADER.unpack(header)[1:]
            file.seek(name + extra, io.SEEK_CUR)
            return file.read(info.compress_size)
        except OSError as error:
            raise ContainerUnreadable(damage(error, self._cursor.where).fault) from error

    def stream(self) -> BinaryIO:
        """A member as a buffered reader."""
        try:
            opened = self._archive.open(self._info)
        except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise damage(error, self._cursor.where) from error
        return bounded(cast(BinaryIO, opened), self._cursor.where, self._info.compress_size)

    def _damaged(self, reason: str) -> Unreadable:
        return Unreadable(Fault(self._cursor.where, reason, "The archive may be damaged: copy it again"))
