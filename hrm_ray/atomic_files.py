"""Atomic writes: a file or folder is written under a temporary name beside its path, synced, and renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hrm_ray.errors import DiskError, Fault, SettingsError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the block ends; on any error `path` is unchanged. Raises OSError.

    On Windows the replacement fails with PermissionError while another handle has `path` open.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Like `atomic_write`, for libraries that take a path: write to the path that this yields."""
    # In the same folder, because a rename is atomic only within one file system. A random name, because a process
    # number is unique on one machine only and the folder may be shared by several.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        # "r+b": Windows syncs only files that are open for writing.
        with temporary.open("r+b") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def unwritable(path: Path, error: Exception) -> DiskError:
    """The error to raise where a file of a run cannot be written."""
    hint = "Free some space there, then run the command again (training: with --resume)"
    return DiskError(Fault(str(path), f"cannot be written ({error})", hint))


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk: a rename is lost in a power cut until then."""
    if os.name == "nt":
        return  # Windows cannot open a folder as a file.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders; theirs are durable when the rename returns, or never.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(out: Path, *, overwrite: bool, owned: frozenset[str], option: str = "--out") -> Iterator[Path]:
    """A temporary sibling of `out` to write into; it becomes `out` when the block ends without an exception.

    `owned` names the files that such a folder may contain. With `overwrite` an existing folder is replaced, but only if
    every file in it has one of these names: a wrong path must not delete somebody else's files. Raises SettingsError
    where `out` cannot be used.
    """
    out = out.absolute()
    check_vacant(out, overwrite=overwrite, owned=owned, option=option)
    building = out.parent / f".{out.name}.building-{secrets.token_hex(4)}"
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise SettingsError(
            Fault(
                str(out),
                f"the folder cannot be created ({error.strerror})",
                f"Give {option} a folder that can be written",
            )
        ) from error
    try:
        yield building
        _put_in_place(building, out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_vacant(out: Path, *, overwrite: bool, owned: frozenset[str], option: str) -> None:
    """Raises SettingsError unless `out` is absent, empty, or an earlier output that may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise SettingsError(Fault(str(out), "a file has this name", f"Give {option} another folder"))
    inside = sorted(entry.name for entry in out.iterdir())
    foreign = [name for name in inside if name not in owned]
    if inside and not overwrite:
        raise SettingsError(
            Fault(
                str(out),
                f"the folder is not empty (it contains {inside[0]})",
                f"Give {option} another folder, or --overwrite",
            )
        )
    if foreign:
        raise SettingsError(
            Fault(
                str(out),
                f"the folder contains {foreign[0]}, which --overwrite does not replace",
                f"Give {option} another folder",
            )
        )


def _put_in_place(building: Path, out: Path) -> None:
    """Renames `building` to `out`. An older folder is renamed first and restored if the rename fails."""
    if not out.exists():
        os.rename(building, out)
        return
    aside = building.with_name(building.name.replace("building", "replaced"))
    os.rename(out, aside)
    try:
        os.rename(building, out)
    except BaseException:
        os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
