"""Zip archives: reads the directory once, then the members in path order, as in a folder."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import BinaryIO, NamedTuple, cast

from hrm_ray.data.archives.members import Member, Selection, member_of, member_rows, nothing_chosen
from hrm_ray.data.file_systems import file_system_of
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
_END_BYTES, _LOCATOR_BYTES, _END_64_BYTES, _LONGEST_COMMENT_BYTES = 22, 20, 56, 65_535
_ENCRYPTED = 0x1
_ABOUT_MEMBER_BYTES = 76
"""Besides its bytes and, twice, its name a member takes this much: its header, and its entry in the directory."""


class ZipDirectory(NamedTuple):
    """The members that can be read, or are refused, in the order they are read in; `unread` names those of
    other kinds."""

    members: list[tuple[Member, zipfile.ZipInfo]]
    unread: list[str]

    @property
    def names(self) -> list[str]:
        """The members' names."""
        return [member.name for member, _ in self.members]

    def chosen(self, selection: Selection) -> list[tuple[Member, zipfile.ZipInfo]]:
        """The members of a selection."""
        return [pair for pair in self.members if selection.wants(pair[0].name)]


# A corpus is listed several times before a run, and then read: the stamp changes when the archive does.
@lru_cache(maxsize=1)
def zip_directory(address: str, archive_bytes: int, stamp: str, as_text: str = "") -> ZipDirectory:
    """The directory of the .zip at an address. Raises ContainerUnreadable for one that is damaged or may not be read,
    OSError where it cannot be opened."""
    with file_system_of(address).open(address) as file:
        try:
            end = _end_record(file)
            archive = zipfile.ZipFile(file)
            infos = archive.infolist()
            if len(infos) != end.members:
                raise zipfile.BadZipFile(f"it names {len(infos)} members instead of {end.members}")
            _check_place(file, archive.start_dir, end.directory)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            hint = "It may be cut short, or not a .zip archive: copy it again"
            raise ContainerUnreadable(Fault(address, f"its directory cannot be read: {error}", hint)) from error
        except OSError as error:
            raise ContainerUnreadable(damage(error, address).fault) from error
    infos = [info for info in infos if not info.is_dir()]
    total = sum(info.file_size for info in infos)
    if total > max(EXPANSION * archive_bytes, EXPANSION_FROM_BYTES) or total > TOTAL_BYTES:
        raise ContainerUnreadable(bomb(address, archive_bytes, total).fault)
    found = [
        (member_of(info.filename, info.file_size, info.compress_size, _unusual(info), as_text), info) for info in infos
    ]
    members = [(member, info) for member, info in found if member is not None]
    members.sort(key=lambda pair: in_path_order(pair[0].name))
    return ZipDirectory(members, [info.filename for member, info in found if member is None])


class _EndRecord(NamedTuple):
    """The record at a .zip's end: the number of members, and where it says that the directory begins."""

    members: int
    directory: int


def _end_record(file: BinaryIO) -> _EndRecord:
    """The record at the file's end. Raises BadZipFile where there is none, or too many members.

    zipfile does not check it. It takes the last record that it finds, which in an archive cut short is that of an
    archive inside it, and it reads the directory into memory whatever its length.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _LONGEST_COMMENT_BYTES - _END_BYTES - _LOCATOR_BYTES - _END_64_BYTES))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    end = tail[at : at + _END_BYTES] if at >= 0 else b""
    # Some programs fill an archive up with zeros.
    if len(end) < _END_BYTES or tail[at + _END_BYTES + int.from_bytes(end[20:], "little") :].strip(b"\0"):
        raise zipfile.BadZipFile("there is none at the file's end")
    found = _EndRecord(int.from_bytes(end[10:12], "little"), int.from_bytes(end[16:20], "little"))
    large = tail[max(0, at - _LOCATOR_BYTES - _END_64_BYTES) : max(0, at - _LOCATOR_BYTES)]
    if large.startswith(b"PK\6\6"):
        found = _EndRecord(int.from_bytes(large[32:40], "little"), int.from_bytes(large[48:56], "little"))
    if found.members > MEMBERS:
        raise zipfile.BadZipFile(f"it has {found.members} members, more than {MEMBERS}")
    return found


def _check_place(file: BinaryIO, begins: int, recorded: int) -> None:
    """Raises BadZipFile for the directory of an archive inside an archive that is cut short.

    A directory that begins elsewhere than recorded has other bytes before its archive. That is right behind a program
    that unpacks it; but the bytes of an archive cut short are archive members, and the last header among them is that
    of the member which is the inner archive.
    """
    before = begins - recorded
    if not before:
        return
    file.seek(0)
    is_archive = file.read(4) == b"PK\3\4"
    last = max(0, before - _LOCAL_HEADER.size - 2 * _LONGEST_COMMENT_BYTES)
    file.seek(last)
    tail = file.read(before - last)
    at = tail.find(b"PK\3\4")
    while at >= 0 and not is_archive:
        header = tail[at : at + _LOCAL_HEADER.size]
        if len(header) == _LOCAL_HEADER.size:
            name, extra = _LOCAL_HEADER.unpack(header)[1:]
            is_archive = last + at + _LOCAL_HEADER.size + name + extra == before
        at = tail.find(b"PK\3\4", at + 1)
    if is_archive:
        raise zipfile.BadZipFile(f"it begins {before} bytes after the place that it gives, as in a file cut short")


def _unusual(info: zipfile.ZipInfo) -> str:
    """What kind of entry a member is if it is not a plain file; empty for a plain file."""
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) and not stat.S_ISREG(mode):
        return "a link" if stat.S_ISLNK(mode) else "no plain file"
    return "encrypted" if info.flag_bits & _ENCRYPTED else ""


def zip_rows(file: BinaryIO, cursor: Cursor, selection: Selection, directory: ZipDirectory) -> Iterator[Row]:
    """The rows of a .zip, member after member. Raises ContainerUnreadable where nothing more can be read."""
    where = cursor.where
    chosen = directory.chosen(selection)
    if not chosen:
        splits = sorted({split_of(name) for name in directory.names})
        raise nothing_chosen(where, selection, splits, len(directory.unread))
    contents = _Contents(file)
    passed_bytes = 0
    for member, info in chosen:
        contents.choose(info, f"{where}/{member.name}")
        if cursor.watch is not None:
            cursor.watch.passed_bytes = partial(_bytes_read, passed_bytes, info, file)
        yield from member_rows(member, cursor, where, contents.whole, contents.stream)
        passed_bytes += info.compress_size + _ABOUT_MEMBER_BYTES + 2 * len(member.name)


def _bytes_read(before: int, info: zipfile.ZipInfo, file: BinaryIO) -> int:
    """Bytes read so far, including the current member."""
    return before + min(max(0, file.tell() - info.header_offset), info.compress_size)


class _Contents:
    """The bytes of an archive's members, one member at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._info: zipfile.ZipInfo
        self._where = ""
        self._archive: zipfile.ZipFile | None = None

    def choose(self, info: zipfile.ZipInfo, where: str) -> None:
        """The member whose bytes are wanted next."""
        self._info, self._where = info, where

    def whole(self) -> bytes:
        """The bytes of a short member, without zipfile's layers, which take most of the time for small members."""
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
                raise damage(error, self._where) from error
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
            raise ContainerUnreadable(damage(error, self._where).fault) from error

    def stream(self) -> BinaryIO:
        """A member as a buffered reader."""
        try:
            if self._archive is None:
                self._archive = zipfile.ZipFile(self._file)
            opened = self._archive.open(self._info)
        except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
            raise damage(error, self._where) from error
        return bounded(cast(BinaryIO, opened), self._where, self._info.compress_size)

    def _damaged(self, reason: str) -> Unreadable:
        return Unreadable(Fault(self._where, reason, "The archive may be damaged: copy it again"))
