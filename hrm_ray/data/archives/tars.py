"""Tar archives (ustar, GNU and pax), read sequentially, without seeking back.

The standard library's tarfile takes about 80 microseconds per member, this reader a tenth of it, which matters for
archives of a hundred thousand small members. Format: POSIX.1-2017, pax; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, BinaryIO, cast

from hrm_ray.data.archives.members import Member, Selection, member_of, member_rows, nothing_chosen
from hrm_ray.data.file_systems import file_system_of
from hrm_ray.data.rows import Cursor, Row
from hrm_ray.data.splits import WHOLE, split_of
from hrm_ray.data.streams import BUFFER_BYTES, ContainerUnreadable, Unreadable, read_to_damage
from hrm_ray.errors import Fault

_BLOCK = 512
_END = bytes(_BLOCK)
_FILES, _FOLDER, _LONG_NAME, _LONG_LINK, _PAX, _PAX_ALL = b"\x0007", b"5", b"L", b"K", b"xX", b"g"
_WITHOUT_BYTES = b"123456"
_UNUSUAL = {b"1": "a link", b"2": "a link", b"S": "a sparse file", b"M": "a piece of a file on another volume"}
_LONGEST_NAME_BYTES = 1 << 20
_COPY_AGAIN = "The archive may be damaged or cut short: copy it again"
_CUT = "the archive ends in the middle of a member"
_ADLER = 65521
_NAMED_SPLITS = 20

USUAL_SPLITS = frozenset({"train", "test", "validation", "valid", "val", "dev", "eval"})
"""A tar that is read in one go is taken to be divided into splits if its first member is of a split of such a name."""


class TarStream:
    """The members of a tar stream, one after the other; `whole` and `open` read the current one."""

    def __init__(
        self, stream: BinaryIO, where: str, *, seekable: bool = False, compressed: bool = False, as_text: str = ""
    ) -> None:
        self._stream, self._where, self._as_text = stream, where, as_text
        self._seekable, self._compressed = seekable, compressed
        self._left = self._padding = 0
        self._rest = b""
        self._damaged: ContainerUnreadable | None = None
        self.unread: list[str] = []
        """Names of the members of other kinds."""

    def __iter__(self) -> Iterator[Member]:
        while (header := self._header()) is not None:
            kind, name, size = header
            self._left, self._padding = size, -size % _BLOCK
            unusual = "" if kind in _FILES else _UNUSUAL.get(kind, "no plain file")
            member = None if kind == _FOLDER else member_of(name, size, size, unusual, self._as_text)
            if member is not None:
                yield member
            elif kind != _FOLDER:
                self.unread.append(name)
            self._skip(self._left + self._padding)

    def whole(self) -> bytes:
        """All bytes of the current member."""
        size, self._left = self._left, 0
        data, damaged = self._some(size)
        if damaged is not None:
            # `open` gives what there is of the member.
            self._left, self._rest, self._damaged = size, data, damaged
            raise damaged
        return data

    def open(self) -> BinaryIO:
        """The current member as a buffered reader."""
        return cast(BinaryIO, io.BufferedReader(_MemberStream(self), BUFFER_BYTES))

    def read(self, length: int) -> bytes:
        """Up to `length` next bytes of the current member; none at its end. Raises ContainerUnreadable behind what
        there is of a member that is cut."""
        if not self._rest:
            if self._damaged is not None:
                raise self._damaged
            self._rest, self._damaged = self._some(min(length, self._left))
            if not self._rest and self._damaged is not None:
                raise self._damaged
        data, self._rest = self._rest[:length], self._rest[length:]
        self._left -= len(data)
        return data

    def _some(self, length: int) -> tuple[bytes, ContainerUnreadable | None]:
        """The next `length` bytes of the archive; where there are fewer, also the error that comes after them."""
        try:
            # A failing decompressor loses what `read` had of it, a plain file does not.
            reads = read_to_damage if self._compressed else _read_plain
            data, damaged = reads(self._stream, length)
        except Unreadable as error:
            return b"", ContainerUnreadable(error.fault)
        except OSError as error:
            return b"", ContainerUnreadable(Fault(self._where, f"the rest cannot be read ({error})", _COPY_AGAIN))
        if damaged is not None:
            return data, ContainerUnreadable(damaged.fault)
        if len(data) < length:
            return data, ContainerUnreadable(Fault(self._where, _CUT, _COPY_AGAIN))
        return data, None

    def _read(self, length: int) -> bytes:
        try:
            data = self._stream.read(length)
        except Unreadable as error:
            raise ContainerUnreadable(error.fault) from error
        except OSError as error:
            raise ContainerUnreadable(Fault(self._where, f"the rest cannot be read ({error})", _COPY_AGAIN)) from error
        if len(data) < length:
            raise ContainerUnreadable(Fault(self._where, _CUT, _COPY_AGAIN))
        return data

    def _skip(self, length: int) -> None:
        if self._seekable and length > _BLOCK:
            self._stream.seek(length, io.SEEK_CUR)
            length = 0
        while length > 0:
            length -= len(self._read(min(length, 1 << 20)))
        self._left = 0

    def _header(self) -> tuple[bytes, str, int] | None:
        """Type, name and size of the next member; None at the archive's end."""
        long_name: str | None = None
        changed: dict[str, str] = {}
        while True:
            block = self._read(_BLOCK)
            if not block[0] and block == _END:
                return None
            if not _checksum_is_right(block):
                reason = "a header is damaged, or this is not a .tar archive"
                raise ContainerUnreadable(Fault(self._where, reason, _COPY_AGAIN))
            kind, size = block[156:157], self._number(block[124:136])
            if kind == _LONG_NAME:
                long_name = _text(self._extended_header(size).partition(b"\0")[0])
            elif kind in _PAX:
                changed = self._pax(self._extended_header(size))
            elif kind in (_LONG_LINK, _PAX_ALL):
                self._extended_header(size)
            else:
                name = long_name or _short_name(block)
                if changed:
                    name = changed.get("path", name)
                    size = self._pax_size(changed["size"]) if "size" in changed else size
                    kind = b"S" if any(key.startswith("GNU.sparse.") for key in changed) else kind
                # Links and folders may say a size, but no bytes follow them.
                return _FOLDER if name.endswith("/") else kind, name, 0 if kind in _WITHOUT_BYTES else size

    def _extended_header(self, size: int) -> bytes:
        if size > _LONGEST_NAME_BYTES:
            raise ContainerUnreadable(Fault(self._where, f"a name or pax header has {size} bytes", _COPY_AGAIN))
        data = self._read(size + -size % _BLOCK)
        return data[:size]

    def _number(self, field: bytes) -> int:
        if field[0] & 0x80:
            # GNU's way for numbers beyond 8 GiB: big-endian, marked by the first bit.
            return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        try:
            return int(field.strip(b" \0") or b"0", 8)
        except ValueError as error:
            reason = "the size in a header is not a number"
            raise ContainerUnreadable(Fault(self._where, reason, _COPY_AGAIN)) from error

    def _pax(self, records: bytes) -> dict[str, str]:
        """`length key=value\\n`, one after the other; the length counts itself and the end of the line."""
        found: dict[str, str] = {}
        while records:
            length, _, rest = records.partition(b" ")
            if not length.isdigit() or int(length) > len(records) or int(length) <= len(length) + 1:
                raise ContainerUnreadable(Fault(self._where, "a pax header is damaged", _COPY_AGAIN))
            key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
            found[_text(key)] = _text(value)
            records = records[int(length) :]
        return found

    def _pax_size(self, written: str) -> int:
        if not (written.isascii() and written.isdigit()):
            raise ContainerUnreadable(Fault(self._where, "the size in a pax header is not a number", _COPY_AGAIN))
        return int(written)


class _MemberStream(io.RawIOBase):
    """The current member of a tar as a raw stream."""

    def __init__(self, tar: TarStream) -> None:
        super().__init__()
        self._tar = tar

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = self._tar.read(len(view))
        view[: len(data)] = data
        return len(data)


def _checksum_is_right(block: bytes) -> bool:
    """Whether a header's checksum is right: the sum of its bytes, with the checksum field read as spaces.

    zlib's adler32 gives that sum (its lower half, plus one, modulo 65521) some forty times faster than `sum` does.
    """
    field = block[148:156]
    try:
        expected = int(field.strip(b" \0"), 8) - 8 * ord(" ") + sum(field)
    except ValueError:
        return False
    return (zlib.adler32(block) & 0xFFFF) == (expected + 1) % _ADLER


def _read_plain(stream: BinaryIO, length: int) -> tuple[bytes, None]:
    return stream.read(length), None


def _short_name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0":
        folder = block[345:500].partition(b"\0")[0]
        name = folder + b"/" + name if folder else name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


# A corpus is listed several times before a run: the stamp changes when the archive does.
@lru_cache(maxsize=1)
def tar_directory(address: str, archive_bytes: int, stamp: str, as_text: str = "") -> tuple[list[str], list[str]]:
    """The member names of an uncompressed tar (only headers are read), and those of members of other kinds. Raises
    ContainerUnreadable if no member can be read, OSError if the file cannot be opened."""
    names: list[str] = []
    with file_system_of(address).open(address) as file:
        tar = TarStream(file, address, seekable=True, as_text=as_text)
        try:
            for member in tar:
                names.append(member.name)
        except ContainerUnreadable:
            # The members before the damage can be read, and reading them reports it.
            if not names:
                raise
    return names, tar.unread


def tar_rows(
    stream: BinaryIO,
    cursor: Cursor,
    selection: Selection,
    *,
    undecided: bool,
    compressed: bool = False,
    as_text: str = "",
) -> Iterator[Row]:
    """The rows of a tar stream, members in the order they are stored in. Raises ContainerUnreadable.

    `undecided`: the member names are not known yet, so the first member decides: if it belongs to a split
    (USUAL_SPLITS), the selected split is read, else the whole archive without the held-out split.
    """
    where, tar = cursor.where, TarStream(stream, cursor.where, compressed=compressed, as_text=as_text)
    other_splits: set[str] = set()
    whole = read = False
    for member in tar:
        split = split_of(member.name)
        if undecided:
            undecided, whole = False, split not in USUAL_SPLITS
            selection = Selection(None, selection.apart) if whole else selection
        if whole and split == WHOLE:
            reason = f"its first member belongs to no split, but {member.name} belongs to the split `{WHOLE}`"
            hint = f"Put the members of the split `{WHOLE}` first, or unpack the archive and give the folder"
            raise ContainerUnreadable(Fault(where, reason, hint))
        if selection.wants(member.name):
            read = True
            yield from member_rows(member, cursor, where, tar.whole, tar.open)
        elif len(other_splits) < _NAMED_SPLITS:
            other_splits.add(split)
    if not read:
        raise nothing_chosen(where, selection, sorted(other_splits), len(tar.unread))
