"""Safetensors files read and written in parts, so that memory does not grow with the size of a tensor.

The format: 8 bytes with the length of the header, little-endian; the header, JSON with each tensor's type, shape and
place; the tensors without gaps. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from hrm_ray.errors import DataError, Fault, UnreadableError, away

Array: TypeAlias = npt.NDArray[Any]

FLOATS: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""The types that can be averaged, as their values lie in a file; numpy has no bfloat16, which is half a float32."""
WHOLE_NUMBERS: Mapping[str, np.dtype[Any]] = {
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype("u1"),
}
_STORED = {**FLOATS, **WHOLE_NUMBERS}
_BLOCK = 1 << 16
"""Values that are rounded to bfloat16 at a time."""
_FLUSH_BYTES = 4 << 20
"""Bytes after which the system is asked to begin to write what it was given, so that the last sync has little to do."""
_LENGTH = 8
"""Bytes of the header's length. The tensors begin at a multiple of it."""
_LONGEST_HEADER = 100_000_000
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type by the file's name for it, its shape, and its first byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return _STORED[self.dtype].itemsize

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def computed(self) -> np.dtype[Any]:
        """The type in which a float tensor is averaged."""
        return np.dtype(np.float64 if self.dtype == "F64" else np.float32)


class TensorFile:
    """A safetensors file that is open for reading; `tensors` by name in the order of their places.

    Raises DataError for a file that is not there, damaged, or holds a type that cannot be averaged; UnreadableError
    where its disk does not answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)
        try:
            self._begin, header = self._header()
            self.metadata: dict[str, str] = header.pop(_METADATA, {})
            self.tensors = self._places(header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def read_bytes(self, name: str, first: int, into: Array) -> None:
        """Fill `into`, an array of the stored type, with values of tensor `name` from number `first` on."""
        stored = self.tensors[name]
        target = into.data.cast("B")
        try:
            self._file.seek(self._begin + stored.start + first * stored.itemsize)
            done = 0
            while done < len(target):
                count = self._file.readinto(target[done:])
                if not count:
                    raise self._damaged("it was cut short while it was read")
                done += count
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def read_floats(self, name: str, first: int, into: Array) -> None:
        """As `read_bytes` into an array of float32 or float64, whatever float type is stored."""
        stored = self.tensors[name].dtype
        kind = FLOATS[stored]
        if kind == into.dtype:
            self.read_bytes(name, first, into)
            return
        narrow = np.empty(into.shape, kind)
        self.read_bytes(name, first, narrow)
        if stored == "BF16":
            wide = into.view("<u4") if into.dtype == np.float32 else np.empty(into.shape, "<u4")
            wide[...] = narrow
            wide <<= 16
            if into.dtype != np.float32:
                into[...] = wide.view("<f4")
        else:
            into[...] = narrow

    def _header(self) -> tuple[int, dict[str, Any]]:
        """The first byte after the header, and the header's content."""
        try:
            length = int.from_bytes(self._file.read(_LENGTH), "little")
            self._bytes = self._file.seek(0, 2)
            if not 2 <= length <= min(_LONGEST_HEADER, self._bytes - _LENGTH):
                raise self._damaged("its header is cut short, or it is a file of another kind")
            self._file.seek(_LENGTH)
            header = json.loads(self._file.read(length))
        except OSError as error:
            raise _unreadable(self.path, error) from error
        except (ValueError, RecursionError):
            raise self._damaged("its header is not JSON") from None
        texts = header.get(_METADATA, {}) if isinstance(header, dict) else None
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise self._damaged("its header does not describe tensors")
        return _LENGTH + length, header

    def _places(self, header: Mapping[str, Any]) -> dict[str, Stored]:
        """The tensors that a header describes, which must fill the rest of the file without gaps."""
        found: dict[str, tuple[Stored, int]] = {}
        for name, entry in header.items():
            try:
                dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
                described = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
                described = described and isinstance(dtype, str)
            except (TypeError, KeyError, ValueError):
                described = False
            if not described:
                raise self._damaged(f"the place of {name} is not described")
            if dtype not in _STORED:
                reason = f"tensor {name} has type {dtype}, which cannot be averaged"
                raise DataError(Fault(str(self.path), reason, "Give weights in float32, bfloat16 or float16"))
            stored = Stored(dtype, shape, start)
            if stop - start != stored.size * stored.itemsize:
                raise self._damaged(f"{name} does not have the bytes of its shape")
            found[name] = stored, stop
        ordered = sorted(found.items(), key=lambda item: (item[1][0].start, item[1][1]))
        end = 0
        for name, (stored, stop) in ordered:
            if stored.start != end:
                raise self._damaged(f"there is a gap before {name}, or it overlaps another tensor")
            end = stop
        if end != self._bytes - self._begin:
            raise self._damaged(f"it has {self._bytes} bytes, and its header describes {self._begin + end}")
        return {name: stored for name, (stored, _) in ordered}

    def _damaged(self, how: str) -> DataError:
        hint = "Copy the file again from its source, or give another one"
        return DataError(Fault(str(self.path), f"is not a whole safetensors file ({how})", hint))


class TensorWriter:
    """Writes a safetensors file in the order of its tensors; `sha256` is that of what was written so far."""

    def __init__(self, file: BinaryIO, shapes: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {_METADATA: {"format": "pt", **metadata}}
        end = 0
        for name, stored in shapes.items():
            stop = end + stored.size * stored.itemsize
            header[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [end, stop]}
            end = stop
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % _LENGTH)
        self._file = file
        self._digest = hashlib.sha256()
        self._written = self._flushing = 0
        self._write(len(text).to_bytes(_LENGTH, "little") + text)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, values: Array, dtype: str) -> None:
        """Write the next values, float32 or float64, rounded to the nearest of the stored float type."""
        kind = FLOATS[dtype]
        if dtype != "BF16":
            self.write_bytes(values.astype(kind, copy=False))
            return
        for first in range(0, values.size, _BLOCK):
            self.write_bytes(_bfloat16(values[first : first + _BLOCK]))

    def write_bytes(self, values: Array) -> None:
        """Write values as they lie in memory."""
        self._write(values.data.cast("B"))

    def _write(self, content: bytes | memoryview) -> None:
        self._digest.update(content)
        self._file.write(content)
        self._written += len(content)
        if self._written - self._flushing >= _FLUSH_BYTES:
            self._begin_flush()

    def _begin_flush(self) -> None:
        """Let the system write to the disk while the next values are computed."""
        if sys.platform == "linux":
            # What is not on the disk yet is not dropped by this, but its writing begins.
            count = self._written - self._flushing
            os.posix_fadvise(self._file.fileno(), self._flushing, count, os.POSIX_FADV_DONTNEED)
        self._flushing = self._written


def _bfloat16(values: Array) -> Array:
    """The bits of float32 values rounded to bfloat16, to even where two are as near."""
    bits = values.astype("<f4", copy=False).view("<u4")
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    # The sum would carry a NaN with many set bits over into a number.
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded >> 16).astype("<u2")


def _open(path: Path) -> FileIO:
    if not path.is_file():
        raise DataError(Fault(str(path), "no such file", "Give a file of weights that exists"))
    try:
        # Unbuffered: each read goes into its array at once.
        return path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    kind = UnreadableError if away(error) else DataError
    return kind(Fault(str(path), f"cannot be read ({error.strerror or error})", "Check its disk and its permissions"))
