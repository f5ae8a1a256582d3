"""Files and folders that appear whole or not at all: written beside their place and renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hrm_ray.errors import Fault, SettingsError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes `path`'s place at the end of the block; on any error `path` stays as it was.

    The neighbour lies in the same folder, because a rename is atomic only within one file system. On Windows the
    replacement fails with PermissionError while another handle holds `path` open: close the sink first.
    """
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with neighbour.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(neighbour, path)
    finally:
        neighbour.unlink(missing_ok=True)


@contextmanager
def atomic_directory(out: Path, *, overwrite: bool, owned: frozenset[str], option: str = "--out") -> Iterator[Path]:
    """A temporary sibling of `out` to write into; it becomes `out` when the block ends without an exception.

    `owned` names the files such a folder may hold. With `overwrite` an existing folder is replaced, but only if
    everything in it bears such a name: a wrong path must not cost somebody else's files. Raises SettingsError where
    `out` cannot be used.
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
                f"this folder cannot be made ({error.strerror})",
                f"Give {option} a folder that can be written",
            )
        ) from error
    try:
        yield building
        _put_in_place(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_vacant(out: Path, *, overwrite: bool, owned: frozenset[str], option: str) -> None:
    """Raises SettingsError unless `out` is absent, empty, or a folder of ours that may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise SettingsError(Fault(str(out), "there is a file of this name", f"Give {option} another folder"))
    inside = sorted(entry.name for entry in out.iterdir())
    foreign = [name for name in inside if name not in owned]
    if inside and not overwrite:
        raise SettingsError(
            Fault(
                str(out),
                f"the folder is not empty (it holds {inside[0]})",
                f"Give {option} another folder, or --overwrite",
            )
        )
    if foreign:
        raise SettingsError(
            Fault(
                str(out),
                f"the folder holds {foreign[0]}, which is none of ours to replace",
                f"Give {option} another folder",
            )
        )


def _put_in_place(building: Path, out: Path) -> None:
    """Renames `building` to `out`. An older folder steps aside first and comes back if the rename fails."""
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
