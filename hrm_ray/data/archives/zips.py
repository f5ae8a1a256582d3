"""Zip archives, read as they are.

One job: the directory of a .zip once, then its members in the order of their paths, as in a folder.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, NamedTuple, cast

from hrm_ray.data.archives.members import Member, Selection, member_of, member_rows, nothing_chosen
from hrm_ray.data.archives.zip_directory import BadDirectory, ZipEntry, read_directory
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
_ABOUT_MEMBER_BYTES = 76
"""Besides its bytes and, twice, its name a member takes this much: its header, and its entry in the directory."""


class ZipDirectory(NamedTuple):
    """The members that can be read, or are refused, in the order they are read in; `skipped` are of other kinds."""

    members: list[tuple[Member, ZipEntry]]
    skipped: int

    @property
    def names(self) -> list[str]:
        """The members' names."""
        return [member.name for member, _ in self.members]

    def chosen(self, selection: Selection) -> list[tuple[Member, ZipEntry]]:
        """The members of a selection."""
        return [pair for pair in self.members if selection.wants(pair[0].name)]


def open_zip(file: BinaryIO, where: str, archive_bytes: int) -> ZipDirectory:
    """Reads the directory of a .zip. Raises ContainerUnreadable for one that is damaged or may not be read."""
    try:
        entries = read_directory(file, MEMBERS)
    except BadDirectory as error:
        hint = "It may be cut short, or no .zip archive: copy it again"
        raise ContainerUnreadable(Fault(where, f"its directory cannot be read: {error}", hint)) from error
    except OSError as error:
        raise ContainerUnreadable(damage(error, where).fault) from error
    total = sum(entry.size for entry in entries)
    if total > max(EXPANSION * archive_bytes, EXPANSION_FROM_BYTES) or total > TOTAL_BYTES:
        raise ContainerUnreadable(bomb(where, archive_bytes, total).fault)
    found: list[tuple[Member, ZipEntry]] = []
    for entry in entries:
        member = member_of(entry.name, entry.size, entry.stored, entry.unusual)
        if member is not None:
            found.append((member, entry))
    found.sort(key=lambda pair: in_path_order(pair[0].name))
    return ZipDirectory(found, len(entries) - len(found))


def zip_rows(file: BinaryIO, cursor: Cursor, selection: Selection, directory: ZipDirectory) -> Iterator[Row]:
    """The rows of a .zip, member after member. Raises ContainerUnreadable where nothing more can be read."""
    where = cursor.where
    chosen = directory.chosen(selection)
    if not chosen:
        splits = sorted({split_of(name) for name in directory.names})
        raise nothing_chosen(where, selection, splits, directory.skipped)
    contents = _Contents(file)
    passed = 0
    for member, entry in chosen:
        contents.choose(entry, f"{where}/{member.name}")
        if cursor.watch is not None:
            cursor.watch.passed_bytes = partial(_passed, passed, entry, file)
        yield from member_rows(member, cursor, where, contents.whole, contents.stream)
        passed += entry.stored + _ABOUT_MEMBER_BYTES + 2 * len(member.name)


def _passed(before: int, entry: ZipEntry, file: BinaryIO) -> int:
    """Bytes of members that lie behind, and of the present one."""
    return before + min(max(0, file.tell() - entry.offset), entry.stored)


class _Contents:
    """The bytes of an archive's members, of one at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._entry: ZipEntry
        self._where = ""
        self._archive: zipfile.ZipFile | None = None
        self._infos: dict[int, zipfile.ZipInfo] = {}

    def choose(self, entry: ZipEntry, where: str) -> None:
        """The member whose bytes are wanted next."""
        self._entry, self._where = entry, where

    def whole(self) -> bytes:
        """A short member at once, past the layers of zipfile, which take most of the time of small ones."""
        entry = self._entry
        if entry.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            with self.stream() as stream:
                return stream.read()
        data = self._stored()
        if entry.method == zipfile.ZIP_DEFLATED:
            try:
                # One byte more than it should be, not all that a wrong header might hide.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.size + 1)
            except zlib.error as error:
                raise damage(error, self._where) from error
        if len(data) != entry.size or zlib.crc32(data) != entry.crc:
            raise self._damaged("its bytes do not have the checksum in the archive's directory")
        return data

    def _stored(self) -> bytes:
        file, entry = self._file, self._entry
        try:
            file.seek(entry.offset)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
                raise self._damaged("its header in the archive is damaged")
            name, extra = _LOCAL_HEADER.unpack(header)[1:]
            file.seek(name + extra, io.SEEK_CUR)
            return file.read(entry.stored)
        except OSError as error:
            raise ContainerUnreadable(damage(error, self._where).fault) from error

    def stream(self) -> BinaryIO:
        """A member as a buffered reader."""
        try:
            if self._archive is None:
                self._archive = zipfile.ZipFile(self._file)
                self._infos = {info.header_offset: info for info in self._archive.infolist()}
            opened = self._archive.open(self._infos[self._entry.offset])
        except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError, KeyError) as error:
            raise damage(error, self._where) from error
        return bounded(cast(BinaryIO, opened), self._where, self._entry.stored)

    def _damaged(self, reason: str) -> Unreadable:
        return Unreadable(Fault(self._where, reason, "The archive may be damaged: copy it again"))
