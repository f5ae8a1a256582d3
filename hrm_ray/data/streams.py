"""Byte streams: decompression with bounds on its output, and copies on disk for formats that need random access.

Every failure is raised as Unreadable."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast

from hrm_ray.errors import DISK_FULL_ERRNOS, Fault, ResourceError

EXPANSION = 500
"""Text compresses 3 to 20 times, a log a hundred times; what expands more than this is taken for a bomb."""

EXPANSION_FROM_BYTES = 16 << 20
"""Any file may expand to this much (16 MiB), however small it is."""

TOTAL_BYTES = 1 << 40
"""The most that one compressed file or archive may expand to: 1 TiB."""

SPOOL_MEMORY_BYTES = 16 << 20
"""A copy of this size (16 MiB) is held in memory, a longer one in a temporary file."""

SPOOL_BYTES = 8 << 30
"""The most that is copied into a temporary file: 8 GiB."""

BUFFER_BYTES = 256 << 10
_STEP_BYTES = 64 << 10
_COPY_AGAIN = "It may be damaged or cut short: copy it again"


class Unreadable(Exception):
    """A stream, or the rest of it, cannot be read. Readers turn it into a BadRow. `not_text`: it holds no text data, as
    far as one can see."""

    def __init__(self, fault: Fault, *, not_text: bool = False) -> None:
        super().__init__(str(fault))
        self.fault, self.not_text = fault, not_text


class ContainerUnreadable(Unreadable):
    """The archive itself cannot be read further, not only the member that is being read."""


DAMAGE: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
"""What the standard library and pyarrow's streams raise for bytes that cannot be decompressed or read."""


def damage(error: Exception, where: str) -> Unreadable:
    """The Unreadable for an exception out of DAMAGE."""
    if isinstance(error, FileNotFoundError):
        return Unreadable(Fault(where, "the file is gone", "Restore it, or start again without it"))
    if isinstance(error, PermissionError):
        return Unreadable(Fault(where, "no permission to read it", "Make it readable for this user"))
    return Unreadable(Fault(where, f"the rest cannot be read ({_message(error)})", _COPY_AGAIN))


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().rstrip(".").partition("\n")[0] or type(error).__name__


def _do_nothing() -> None:
    """The default of `before_read`."""


@dataclass
class ReadingWatch:
    """Follows the reading of a part.

    `before_read` is called before stored bytes are read, and what it raises ends the reading. `passed_bytes` returns
    about how many of the part's stored bytes were read; None if unknown. The readers set it; it is valid while they
    read.
    """

    before_read: Callable[[], None] = _do_nothing
    passed_bytes: Callable[[], int] | None = None


class _Watched(io.RawIOBase):
    """A file that calls a watch before every read."""

    def __init__(self, file: BinaryIO, watch: ReadingWatch) -> None:
        super().__init__()
        self._file, self._watch = file, watch

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._watch.before_read()
        return int(self._file.readinto(buffer))  # type: ignore[attr-defined]

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def watched(file: BinaryIO, watch: ReadingWatch) -> BinaryIO:
    """`file`, followed by a watch."""
    opened = cast(BinaryIO, io.BufferedReader(_Watched(file, watch), BUFFER_BYTES))
    watch.passed_bytes = opened.tell
    return opened


class Bounded(io.RawIOBase):
    """The output of a decompressor: errors become Unreadable, and so does too much output.

    `stored_bytes` is the size of its input. Read it through `io.BufferedReader`.
    """

    def __init__(self, source: BinaryIO, where: str, stored_bytes: int) -> None:
        super().__init__()
        self._source, self._where = source, where
        self._bound = max(EXPANSION_FROM_BYTES, EXPANSION * stored_bytes)
        self._stored, self._out = stored_bytes, 0
        self._damage: Unreadable | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """As of io.RawIOBase; gives what there is before an error, then the error, as often as it is called."""
        view = memoryview(buffer)
        if self._damage is not None:
            raise self._damage
        try:
            # In small steps: what a failing call had decompressed before its error is lost.
            data = self._source.read1(min(len(view), _STEP_BYTES))  # type: ignore[attr-defined]
        except DAMAGE as error:
            self._damage = damage(error, self._where)
            raise self._damage from error
        view[: len(data)] = data
        self._out += len(data)
        if self._out > self._bound or self._out > TOTAL_BYTES:
            raise bomb(self._where, self._stored, self._out)
        return len(data)

    def close(self) -> None:
        """Closes the decompressor too."""
        if not self.closed:
            self._source.close()
        super().close()


def read_to_damage(stream: BinaryIO, length: int) -> tuple[bytes, Unreadable | None]:
    """`length` bytes of a buffered reader, fewer at its end or where it is damaged, and the error in that case. A plain
    `read` that fails loses what it had read."""
    read: list[bytes] = []
    try:
        while length and (data := stream.read1(length)):  # type: ignore[attr-defined]
            read.append(data)
            length -= len(data)
    except Unreadable as error:
        return b"".join(read), error
    return b"".join(read), None


def bomb(where: str, stored_bytes: int, out_bytes: int) -> Unreadable:
    """The Unreadable for a decompression bomb."""
    if out_bytes > TOTAL_BYTES:
        reason = f"it expands to more than {TOTAL_BYTES >> 40} TiB"
        return Unreadable(Fault(where, reason, "Unpack it and give the folder"))
    reason = f"{stored_bytes} bytes expand to {out_bytes}, more than {EXPANSION} times as much (possibly a bomb)"
    return Unreadable(Fault(where, reason, "If you trust it, unpack it and give the folder"))


def decompressed(stream: BinaryIO, compression: str | None, where: str, stored_bytes: int) -> BinaryIO:
    """`stream` without its compression ("gzip", "bz2", "xz", "zstd" or none), to be read from front to back."""
    if compression is None:
        return stream
    opened: Any
    if compression == "gzip":
        opened = gzip.GzipFile(fileobj=stream, mode="rb")
    elif compression == "bz2":
        opened = bz2.BZ2File(stream)
    elif compression == "xz":
        opened = lzma.LZMAFile(stream)  # noqa: SIM115
    else:
        opened = _zstd(stream, where)
    return bounded(opened, where, stored_bytes)


def bounded(source: BinaryIO, where: str, stored_bytes: int) -> BinaryIO:
    """A decompressor as a buffered reader, within the bounds."""
    return cast(BinaryIO, io.BufferedReader(Bounded(source, where, stored_bytes), BUFFER_BYTES))


def _zstd(stream: BinaryIO, where: str) -> Any:
    import pyarrow as pa

    if not pa.Codec.is_available("zstd"):
        reason = "this build of pyarrow cannot read zstd"
        raise Unreadable(Fault(where, reason, "Install pyarrow from its own wheels, or compress with gzip"))
    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


def seekable_copy(stream: BinaryIO, where: str) -> BinaryIO:
    """A copy of a stream for formats that need seeking (Parquet, Arrow): in memory while it is small, else in a
    temporary file that vanishes when it is closed. Raises Unreadable for a longer one than SPOOL_BYTES, ResourceError
    where the disk is full."""
    begin = stream.read(SPOOL_MEMORY_BYTES + 1)
    if len(begin) <= SPOOL_MEMORY_BYTES:
        return cast(BinaryIO, io.BufferedReader(io.BytesIO(begin)))
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    copied, data = 0, begin
    try:
        while data:
            copied += len(data)
            if copied > SPOOL_BYTES:
                reason = (
                    f"it is longer than {SPOOL_BYTES >> 30} GiB unpacked, and its format cannot be read in a stream"
                )
                raise Unreadable(Fault(where, reason, "Unpack it and give the folder"))
            _write(copy, data, where)
            data = stream.read(BUFFER_BYTES)
        copy.seek(0)
    except BaseException:
        copy.close()
        raise
    return cast(BinaryIO, copy)


def _write(copy: IO[bytes], data: bytes, where: str) -> None:
    try:
        copy.write(data)
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        reason = f"no space for its unpacked copy in {tempfile.gettempdir()}"
        raise ResourceError(Fault(where, reason, "Free some space there, set TMPDIR, or unpack it")) from error
