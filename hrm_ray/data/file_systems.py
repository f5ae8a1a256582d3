"""File systems, local and in the cloud: addresses, listing, opening. Data sets of the Hub are not files: see hub.py."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from hrm_ray.data.file_kinds import stem_of
from hrm_ray.data.splits import in_path_order
from hrm_ray.data.streams import BUFFER_BYTES
from hrm_ray.errors import DataError, Fault, SettingsError
from hrm_ray.regular_files import special_file
from hrm_ray.settings.hub_name import HUB, hub_name

CLOUDS = ("s3://", "gs://", "az://")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class Entry(NamedTuple):
    """A file: its name relative to the folder that was searched ("/" between the parts), its address, its size, a
    stamp that changes when it is written again, and whether it is a link that leads nowhere."""

    name: str
    address: str
    bytes: int
    stamp: str
    is_dangling: bool = False


class FileSystem(Protocol):
    """Every method may raise DataError or UnavailableError where the file system cannot be read."""

    def file(self, address: str) -> Entry | None:
        """The file at an address; None where there is none."""

    def is_folder(self, address: str) -> bool:
        """Whether there is a folder at an address."""

    def walk(self, address: str) -> Iterator[Entry]:
        """The files below a folder, in no order; hidden folders are not entered."""

    def matching(self, pattern: str) -> Iterator[Entry]:
        """The files that a pattern with `*`, `?`, `[...]` or `**` matches, named from its last plain folder on."""

    def open(self, address: str) -> BinaryIO:
        """The file as a buffered reader that can seek. Raises OSError."""


def is_local(address: str) -> bool:
    """Whether an address is a path of this machine."""
    return _SCHEME.match(address) is None


def has_wildcards(address: str) -> bool:
    """Whether an address is a pattern."""
    return glob.has_magic(address)


def absolute(address: str) -> str:
    """The address as it holds in any working folder."""
    return os.path.abspath(address) if is_local(address) else address


def real(address: str) -> str:
    """The address with symbolic links followed, to see whether two are the same file."""
    return os.path.realpath(address) if is_local(address) else address


def name_for_runs(address: str) -> str:
    """A short name for the data at an address: the stem of the file, or the last folder or name in it."""
    if is_local(address) and (not has_wildcards(address) or os.path.exists(address)):
        return stem_of(Path(address).resolve().name)
    name = hub_name(address)
    rest = _SCHEME.sub("", address) if name is None else name.id
    parts = [part for part in re.split(r"[/\\]", rest) if part and not has_wildcards(part)]
    return (stem_of(parts[-1]) if parts else "") or "data"


def split_pattern(pattern: str) -> tuple[str, str]:
    """The plain folder that a pattern begins with, and the rest of it."""
    parts = re.split(r"([/\\])" if os.sep == "\\" else "(/)", pattern)
    plain = next(number for number, part in enumerate(parts) if has_wildcards(part))
    return "".join(parts[:plain]), "".join(parts[plain:])


def file_system_of(address: str) -> FileSystem:
    """The file system of an address. Raises SettingsError for a scheme that is not supported."""
    if is_local(address):
        return _LOCAL
    if not address.startswith(CLOUDS):
        scheme = address.partition("://")[0]
        hint = f"Give a path, {', '.join(CLOUDS)}... or {HUB}..."
        raise SettingsError(Fault(address, f"`{scheme}://` addresses are not supported", hint))
    from hrm_ray.data.cloud import cloud_of

    return cloud_of(address)


def require_path(path: Path, hint: str = "Give an existing path; `hrm-ray data build` makes a data set") -> None:
    """Raises SettingsError, with `hint`, if `path` does not exist."""
    if not os.path.exists(path):
        if os.path.islink(path):
            reason = f"this link leads to {os.readlink(path)}, which does not exist"
            raise SettingsError(Fault(str(path), reason, hint))
        nearest = next((parent for parent in path.absolute().parents if os.path.exists(parent)), Path(path.anchor))
        reason = f"no such file or folder (the nearest existing folder is {nearest})"
        raise SettingsError(Fault(str(path), reason, hint))


class _Local:
    """This machine's files."""

    def file(self, address: str) -> Entry | None:
        path = os.path.abspath(address)
        special = special_file(path, address)
        if special is not None:
            raise SettingsError(special)
        return None if os.path.isdir(path) else self._entry(os.path.basename(path), path)

    def is_folder(self, address: str) -> bool:
        return os.path.isdir(address)

    def walk(self, address: str) -> Iterator[Entry]:
        pending = [("", os.path.abspath(address))]
        while pending:
            prefix, folder = pending.pop()
            try:
                with os.scandir(folder) as inside:
                    for found in inside:
                        name = prefix + found.name
                        if found.is_dir(follow_symlinks=False):
                            if not found.name.startswith("."):
                                pending.append((name + "/", found.path))
                        elif found.is_file():
                            state = found.stat()
                            yield Entry(name, found.path, state.st_size, str(state.st_mtime_ns))
                        elif found.is_symlink() and not os.path.exists(found.path):
                            yield Entry(name, found.path, 0, "", is_dangling=True)
            except OSError as error:
                reason = f"this folder cannot be read ({error.strerror})"
                raise DataError(Fault(folder, reason, "Make it readable, or remove it")) from error

    def matching(self, pattern: str) -> Iterator[Entry]:
        root = os.path.abspath(split_pattern(pattern)[0] or ".")
        for path in glob.iglob(pattern, recursive=True):
            found = os.path.abspath(path)
            if os.path.isfile(found):
                name = os.path.relpath(found, root).replace(os.sep, "/")
                entry = self._entry(name, found)
                if entry is not None:
                    yield entry
            elif os.path.islink(found) and not os.path.exists(found):
                yield Entry(os.path.relpath(found, root).replace(os.sep, "/"), found, 0, "", is_dangling=True)

    def open(self, address: str) -> BinaryIO:
        return open(address, "rb", buffering=BUFFER_BYTES)

    def _entry(self, name: str, path: str) -> Entry | None:
        try:
            state = os.stat(path)
        except OSError:
            return None
        return Entry(name, path, state.st_size, str(state.st_mtime_ns))


_LOCAL = _Local()


def in_order(entries: Iterator[Entry]) -> list[Entry]:
    """Files in the order they are read in."""
    return sorted(entries, key=lambda entry: in_path_order(entry.name))
